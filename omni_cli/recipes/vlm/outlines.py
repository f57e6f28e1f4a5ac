"""The model of a training without storage, and a batch for it: enough to walk through a step and count its memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from omni_cli.models import families, qwen_vl, tiny, wiring
from omni_cli.models.drawn import drawn_config
from omni_cli.recipe import Batch, Row
from omni_cli.recipes.vlm import packed
from omni_cli.recipes.vlm.rows import encode_row, make_tokenizer, time_step
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.recipes.vlm.tuning import tuned
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import TiledPreprocess


def empty_base(model: str, preprocess: TiledPreprocess) -> PreTrainedModel:
    """Return the base model, of shapes alone."""
    if not families.is_drawn(model):
        return qwen_vl.empty_model(families.model_config(model))
    tokenizer = make_tokenizer(model, tuple(prompts.sample_sentences(preprocess)))
    return qwen_vl.empty_model(drawn_config(model, tokenizer))


def outline(
    model: str, precision: str, tune: VlmTune, preprocess: TiledPreprocess, *, ready: Callable[[Any], Any]
) -> nn.Module:
    """Return the model as it learns, of shapes alone; weights that would be quantised have the type of the others.

    Args:
        model: name of the base.
        precision: of its weights.
        tune: what of it learns.
        preprocess: of the model.
        ready: makes of a base what works as it does in training.
    """
    base = empty_base(model, preprocess)
    for weight in base.parameters():
        weight.data = weight.data.to(qwen_vl.DTYPES[precision])
    return tuned(ready(base), tune, qwen_vl.DTYPES[precision])


def outline_batch(name: str, net: nn.Module, windows: int, preprocess: TiledPreprocess) -> Batch:
    """Return a batch of equal windows whose pictures have a shape and no storage.

    Their text is in the words of a tiny model's tokenizer, which needs some tokens more for it than a tokenizer that
    is fetched would: nothing is fetched.

    Args:
        name: of the base model.
        net: what `outline` returned.
        windows: in the batch.
        preprocess: of the model.
    """
    video_token = wiring.placeholder_id(qwen_vl.base_of(net).config)
    with torch.device("meta"):
        pictures = torch.empty(preprocess.window_shape, dtype=torch.uint8)
    row = {**_made_up(name, preprocess, video_token), "pictures": pictures}
    return packed.collate([row] * windows, preprocess, video_token)


def _made_up(name: str, preprocess: TiledPreprocess, video_token: int) -> Row:
    family = preprocess.vision.family
    tokenizer = tiny.tiny_tokenizer(tuple(prompts.sample_sentences(preprocess)), family)
    targets = {**FORMATS[preprocess.labels].zero, "start_speed_mps": 0.0}
    encoded = encode_row(targets, preprocess, tokenizer, time_step(name, preprocess))
    ids = torch.tensor(encoded["input_ids"])
    seen = ids == tokenizer.convert_tokens_to_ids(prompts.video_token(family))
    return {
        "input_ids": torch.where(seen, video_token, ids),
        "labels": torch.tensor(encoded["labels"]),
        "position_ids": torch.tensor(encoded["position_ids"]).view(4, len(ids)),
    }
