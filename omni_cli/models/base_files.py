"""The files of a base model: where they lie, and those beside its weights that a model made from it needs too."""

import shutil
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from omni_cli.models.model_folders import INDEX, check_weights, read_object, reading
from omni_cli.models.qwen_vl import load_tokenizer, weights_fingerprint

_BESIDE = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    "LICENSE",
    "NOTICE",
)
_TEMPLATES = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)  # raw, and as JSON before transformers 5


def find(source: str) -> Path:
    """Return the folder of a base's files: itself, or the hub's snapshot of the commit that is loaded from the cache.

    Raises:
        DataError: there are no weights in it, or they are damaged.
        OmniError: the hub cannot be reached, and its cache does not hold them.
    """
    folder = Path(source)
    if not folder.is_dir():
        commit = weights_fingerprint(source).rpartition("@")[2]
        wanted = ["model*.safetensors", INDEX, *_BESIDE, *_TEMPLATES]
        with reading("find the files of", source):
            folder = Path(snapshot_download(source, revision=commit, allow_patterns=wanted))
    check_weights(folder, is_quantized=True)  # what is quantised is refused where it is merged into
    return folder


def write_beside(base: Path, adapter: Path, folder: Path) -> None:
    """Write all but the weights of a model that came of a base: its configurations, and the tokenizer that was trained.

    The chat template is the tokenizer's, or the base's processor's where that alone has one. It is never written as
    the JSON of old: libraries take that before the file that all tools write now.
    """
    for name in _BESIDE:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(str(adapter))
    tokenizer.chat_template = tokenizer.chat_template or _template(base)
    tokenizer.save_pretrained(folder)


def _template(base: Path) -> str | None:
    raw, legacy = (base / name for name in _TEMPLATES)
    if raw.is_file():
        return str(raw.read_text())
    return cast(str | None, read_object(legacy).get("chat_template")) if legacy.is_file() else None
