"""omni: from multi-camera driving video to a fine-tuned, merged, exported, measured model."""

__version__ = "0.1.0"
