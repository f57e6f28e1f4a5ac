"""Answers of a vision-language model to a batch of windows: the likeliest, or drawn by chance; free, or held."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from omni_cli.models import families, qwen_vl
from omni_cli.models.grammar import Grammar
from omni_cli.recipe import BuiltModel, Held, Prediction, Row
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
        built: the model; the longest answer is its grammar's, where it has one.
        rows: of the windows.
        preprocess: how they were made.
        look: the recipe's way from pictures to features.
        processors: change the logits before the likeliest token is taken.
    """
    batch = packed.left_padded(rows, built.tokenizer.pad_token_id, next(built.model.parameters()).device)
    with torch.no_grad():
        features = look(built.model, batch["pictures"], preprocess)
    held = built.grammar.over(len(rows)) if built.grammar else None
    most = built.grammar.most_tokens if built.grammar else FORMATS[preprocess.labels].max_tokens
    said = qwen_vl.generate_text(
        built.model, built.tokenizer, batch, features, max_new_tokens=most, end=prompts.ANSWER_END,
        processors=[*processors, *([held] if held else [])],
    )  # fmt: skip
    how = [Held(*of_row) for of_row in zip(held.tokens, held.off_grammar, strict=True)] if held else [None] * len(said)
    read = [prompts.parse_answer(preprocess.labels, text) for text in said]
    return [Prediction(*answer) for answer in zip(said, read, how, strict=True)]


def held_to_format(built: BuiltModel, preprocess: TiledPreprocess) -> BuiltModel:
    """Return the model so that its answers are those of the grammar of their format.

    Raises:
        DataError: its tokenizer is not byte-level.
    """
    form = FORMATS[preprocess.labels].grammar
    return replace(built, grammar=Grammar(form.lark, form.most_tokens, built.tokenizer, prompts.ANSWER_END))


def untrained(model: str) -> str:
    """Return what it means for the answers of a base model that it never learned to give them."""
    if families.is_drawn(model):
        return f"{model}, untrained: weights drawn from a seed, its answers are noise"
    return f"{model}, zero-shot: it never saw the answer's format"
