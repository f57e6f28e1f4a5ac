"""Configurations of published architectures with few and narrow layers: `random:FOLDER` has their shapes."""

from pathlib import Path

from transformers import PreTrainedConfig

from omni_cli.models import families

FULL_SIZE = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct", "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct"}
VOCABULARY = 2048


def write_small_config(folder: Path, family: str, *, vocabulary: int = VOCABULARY) -> Path:
    """Write the `config.json` of a small model, and nothing else, into a folder; return the folder."""
    small_config(family, vocabulary).save_pretrained(folder)
    return folder


def small_config(family: str, vocabulary: int = VOCABULARY) -> PreTrainedConfig:
    """Return the published configuration, cut down to two layers of 64 numbers."""
    config = families.model_config(FULL_SIZE[family])
    text = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0}
    text |= {"layer_types": ["full_attention"] * 2} if family == "qwen2_5_vl" else {}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1]} if family == "qwen2_5_vl" else {"deepstack_visual_indexes": [0]}
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    return config
