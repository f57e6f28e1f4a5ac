"""What a run's folder tells without opening the run, which would import torch: that it is one, and of which shards."""

from pathlib import Path

from omni_cli import files

RUN_FILE = "run.json"
FINAL = "final"
MODEL_CARD = "omni.json"  # of a model folder


def shards_of(folder: Path) -> Path | None:
    """Return the shard folder that a run learned from; None where the folder is no run of omni's."""
    try:
        return Path(files.read_json(folder / RUN_FILE)["shards"]["folder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
