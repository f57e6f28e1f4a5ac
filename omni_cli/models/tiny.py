"""Tiny models of the real architectures, built from a seed with a tokenizer of their own.

They are complete: saved to a folder, `AutoModelForImageTextToText` and `AutoTokenizer` load them. About 1.4 million
parameters learn ego speed from pictures in a few minutes of two CPU cores.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Tokenizer,
    Qwen3VLConfig,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from omni_cli.models.families import TINY_SIDE_PX

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_MORE_TOKENS = {
    "llava_onevision": ("<image>", "<video>"),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
}
_HIDDEN, _HEADS, _KV_HEADS, _INNER, _LAYERS = 128, 4, 2, 384, 2
_VISION_DEPTH, _VISION_INNER, _SQUARE_PATCH_PX = 3, 256, 14
# The library's 0.02 suits widths of thousands. Here signals would fade layer by layer, and what the pictures show would
# be found only after 700 steps of the demo instead of 350 (measured).
_INITIAL_STD = _HIDDEN**-0.5
_MROPE = [4, 6, 6]  # sums to half of a head's 32 dimensions
TOKENS_PER_SECOND = 10  # two-frame grids at 10 Hz get time ids 0, 2, 4: none coincide, as they would at Qwen's 2


def tiny_tokenizer(texts: Sequence[str], family: str = "qwen2_5_vl") -> Qwen2Tokenizer:
    """Train a byte-level BPE on the recipe's own sentences, with Qwen's pre-tokenizer and a family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = _bpe_state(tokenizer)
    result = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    result.add_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL_TOKENS, *_MORE_TOKENS.get(family, ()))
        ]
    )
    return result


def tiny_model(family: str, tokenizer: Qwen2Tokenizer, seed: int) -> PreTrainedModel:
    """Build a tiny model of a family with weights drawn from a seed, leaving the global generator as it was."""
    config = tiny_config(family, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model


def tiny_config(family: str, tokenizer: Qwen2Tokenizer) -> PreTrainedConfig:
    """Return the configuration of a tiny model."""
    return _TINY[family](tokenizer)


def _bpe_state(tokenizer: Tokenizer) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return state


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the special tokens that a Qwen-VL configuration names."""
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _text_config(tokenizer: Qwen2Tokenizer, rope_extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "dtype": "float32",  # said where the library says it too once it has loaded one
        "hidden_size": _HIDDEN,
        "initializer_range": _INITIAL_STD,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **rope_extra},
    }


def _vision_config(patch_px: int) -> dict[str, Any]:
    return {
        "depth": _VISION_DEPTH,
        "dtype": "float32",
        "hidden_size": _HIDDEN,
        "initializer_range": _INITIAL_STD,
        "intermediate_size": _VISION_INNER,
        "num_heads": _HEADS,
        "patch_size": patch_px,
        "out_hidden_size": _HIDDEN,
    }


def _tiny_qwen2_5(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    vision = _vision_config(14) | {
        "window_size": 56,
        "fullatt_block_indexes": [_VISION_DEPTH - 1],
        "tokens_per_second": TOKENS_PER_SECOND,
    }
    text = _text_config(tokenizer, {"mrope_section": _MROPE})
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **token_ids(tokenizer))


def _tiny_qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    vision = _vision_config(16) | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    text = _text_config(tokenizer, {"mrope_section": _MROPE, "mrope_interleaved": True}) | {
        "head_dim": _HIDDEN // _HEADS
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **token_ids(tokenizer))


def _tiny_llava_onevision(tokenizer: Qwen2Tokenizer) -> LlavaOnevisionConfig:
    vision = {
        **_square_vision_config(),
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    ids = tokenizer.convert_tokens_to_ids
    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer, {})},
        vision_config=vision,
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        tie_word_embeddings=True,
    )


def _tiny_internvl(tokenizer: Qwen2Tokenizer) -> InternVLConfig:
    return InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer, {})},
        vision_config=_square_vision_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TINY_SIDE_PX // _SQUARE_PATCH_PX // 2) ** 2,
        tie_word_embeddings=True,
    )


def _square_vision_config() -> dict[str, Any]:
    return {
        "num_hidden_layers": _VISION_DEPTH,
        "dtype": "float32",
        "hidden_size": _HIDDEN,
        "initializer_range": _INITIAL_STD,
        "intermediate_size": _VISION_INNER,
        "num_attention_heads": _HEADS,
        "patch_size": _SQUARE_PATCH_PX,
        "image_size": TINY_SIDE_PX,
    }


_TINY: dict[str, Callable[[Qwen2Tokenizer], PreTrainedConfig]] = {
    "qwen2_5_vl": _tiny_qwen2_5,
    "qwen3_vl": _tiny_qwen3,
    "llava_onevision": _tiny_llava_onevision,
    "internvl": _tiny_internvl,
}
