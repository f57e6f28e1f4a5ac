"""Answers of a vision-language model to a batch of windows: the likeliest, or drawn by chance."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from omni_cli.models import qwen_vl
from omni_cli.recipe import BuiltModel, Prediction, Row
from omni_cli.recipes.vlm import packed
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import TiledPreprocess

Look = Callable[[nn.Module, Tensor, TiledPreprocess], Any]  # what a model sees of pictures


def answers(
    built: BuiltModel,
    rows: Sequence[Row],
    preprocess: TiledPreprocess,
    look: Look,
    processors: Sequence[LogitsProcessor] = (),
) -> list[Prediction]:
    """Answer each window from its pictures and prompt.

    Args:
        built: the model.
        rows: of the windows.
        preprocess: how they were made.
        look: the recipe's way from pictures to features.
        processors: change the logits before the likeliest token is taken.
    """
    batch = packed.left_padded(rows, built.tokenizer.pad_token_id, next(built.model.parameters()).device)
    with torch.no_grad():
        features = look(built.model, batch["pictures"], preprocess)
    said = qwen_vl.generate_text(
        built.model, built.tokenizer, batch, features, max_new_tokens=FORMATS[preprocess.labels].max_tokens,
        end=prompts.ANSWER_END, processors=processors,
    )  # fmt: skip
    return [Prediction(text, prompts.parse_answer(preprocess.labels, text)) for text in said]
