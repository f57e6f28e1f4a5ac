"""omni: from multi-camera driving video to a fine-tuned, merged, exported, measured model."""

__version__ = "0.3.0"
SCHEMA_VERSION = 1  # of the JSON document that ends the stdout of `--json`
