"""omni: from multi-camera driving video to a fine-tuned, merged, exported, measured model."""

import os

__version__ = "0.5.0"
SCHEMA_VERSION = 1  # of the JSON document that ends the stdout of `--json`

# TRL's trainers would tell the hub of every training; huggingface_hub reads this when it is imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
