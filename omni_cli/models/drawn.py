"""Models whose weights are drawn here from a seed: tiny ones, and published architectures that are only measured.

A machine that is lent for an hour has no network and no weights. How fast a step is depends on neither what the weights
are nor what they have learned, so `random:HUB_ID` has the shapes and the vocabulary of a model, drawn in their final
type on the device that computes: 16 GB of bfloat16 for 8 billion weights, and never 33 GB of float32 in host memory.
"""

from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from omni_cli.errors import UsageError
from omni_cli.models import families, quantised, qwen_vl, tiny

_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
_ENDS = ("pad_token_id", "eos_token_id")


def drawn_config(model: str, tokenizer: Any) -> PreTrainedConfig:
    """Return the configuration of a model that is drawn here, with the ids of a tiny model's tokenizer.

    Args:
        model: `tiny:FAMILY`, or `random:` before a published id, a hub id or a folder with a `config.json`.
        tokenizer: `tiny.tiny_tokenizer` of its family.

    Raises:
        UsageError: it is not of a family whose steps are counted, or knows fewer tokens than the tokenizer.
    """
    if families.is_tiny(model):
        return tiny.tiny_config(families.family_of(model).name, tokenizer)
    config = families.model_config(model)
    if config.model_type not in _FAMILIES:
        raise UsageError(f"model {model}: is of family {config.model_type!r}; expected {' or '.join(_FAMILIES)}")
    known = config.get_text_config().vocab_size
    if known < len(tokenizer):
        raise UsageError(f"model {model}: has a vocabulary of {known} tokens; the prompts need {len(tokenizer)}")
    ids = tiny.token_ids(tokenizer)
    for part, names in ((config, ids), (config.get_text_config(), _ENDS)):
        for name in names:
            setattr(part, name, ids[name])
    config.name_or_path = model
    return config


def draw(model: str, tokenizer: Any, seed: int, precision: str, quantization: str) -> PreTrainedModel:
    """Return a model drawn from a seed, as if it had been loaded in this type and quantised so.

    Args:
        model: see `drawn_config`.
        tokenizer: see `drawn_config`.
        seed: of the weights; the global generators stay as they were.
        precision: a name of `qwen_vl.DTYPES`.
        quantization: `none` or `nf4`.
    """
    config = drawn_config(model, tokenizer)
    if families.is_tiny(model):
        drawn = tiny.tiny_model(families.family_of(model).name, tokenizer, seed)
        return qwen_vl.as_loaded(drawn, precision, quantization)
    dtype, device = qwen_vl.DTYPES[precision], "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        whole: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return whole if quantization == "none" else _quantised(whole, dtype)


def _quantised(whole: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Quantise a model as the library does while it loads one, without a file between them."""
    wanted = {"config": whole.config, "state_dict": whole.state_dict(), "dtype": dtype}
    model = type(whole).from_pretrained(None, **wanted, quantization_config=quantised.nf4(dtype))
    quantised.ready(model, dtype)
    return cast(PreTrainedModel, model)
