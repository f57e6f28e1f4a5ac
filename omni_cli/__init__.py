"""omni: from multi-camera driving video to a fine-tuned, merged, exported, measured model."""

import logging
import os

__version__ = "0.8.0"
SCHEMA_VERSION = 1  # of the JSON document that ends the stdout of `--json`

# TRL's trainers would tell the hub of every training; huggingface_hub reads this when it is imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# peft imports bitsandbytes where it is installed, which then tells of a kernel that it would fetch from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
