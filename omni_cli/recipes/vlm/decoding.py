"""The language model as ONNX holds it, and the proof that with the tower it answers as the library's own model does."""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from omni_cli.errors import OmniError
from omni_cli.models import packing, wiring
from omni_cli.models.decoder_program import NAME, Decoder, by_kind, next_inputs
from omni_cli.models.qwen_vl import base_of
from omni_cli.models.vision_tower import INPUT_NAME
from omni_cli.recipe import BuiltModel, Program, Rehearsed, Row, RunProgram
from omni_cli.recipes.vlm import packed
from omni_cli.recipes.vlm.exporting import tower_programs
from omni_cli.recipes.vlm.rows import time_step, video_token
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.tiling import TiledPreprocess

_CPU = torch.device("cpu")
_STEPS = 4  # tokens after a prompt
_SHORTER = 3  # tokens by which a prompt is cut, so that it is padded on the left
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}  # of the largest number of its kind
_SPEED_MPS = 10.0  # that the prompt in the file tells, where prompts tell one


class Choices(NamedTuple):
    """Which token comes first at answered places, (places,) each."""

    agree: Tensor  # of the programs and the model
    clear: Tensor  # in the model's own logits the second is further from the first than programs may part


def programs(recipe: Any, built: BuiltModel, preprocess: TiledPreprocess, batches: Sequence[int]) -> list[Program]:
    """Return the tower, for each number of windows where the grid is fixed inside it, and the language model."""
    towers = tower_programs(built.model, preprocess, batches)
    return [*towers, decoder_program(recipe, built, preprocess, batches[0])]


@torch.no_grad()
def decoder_program(recipe: Any, built: BuiltModel, preprocess: TiledPreprocess, windows: int) -> Program:
    """Return the language model with its embedding and head, shown the prompts of so many windows of noise.

    Args:
        recipe: how windows are asked about.
        built: the model, its adapter merged.
        preprocess: of its windows.
        windows: in the example; the program takes any number, of any length, after any past.
    """
    base = base_of(built.model)
    decoder = Decoder(base)
    rows = recipe.probe_rows(built, preprocess)
    batch = _asked([rows[number % len(rows)] for number in range(windows)], built)
    inputs = decoder.first_inputs(batch, _levels(_seen(base, batch, preprocess)))
    return Program(
        NAME,
        decoder,
        inputs,
        decoder.output_names(),
        metadata=_told(recipe.model, built.tokenizer, preprocess),
        free_axes=decoder.free_axes(),
        traced=decoder.traced_inputs(),
    )


def _told(model: str, tokenizer: Any, preprocess: TiledPreprocess) -> dict[str, str]:
    """Return what whoever runs the programs needs to know: an example of a prompt, tokens by their meaning."""
    facts = {
        "prompt": prompts.render_prompt(preprocess, _SPEED_MPS),
        "video_token": video_token(model, preprocess),
        "end_token": tokenizer.convert_tokens_to_ids(prompts.ANSWER_END),
        "max_tokens": FORMATS[preprocess.labels].max_tokens,
        "time_step": time_step(model, preprocess),
    }
    return {f"omni_{name}": fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}


@torch.no_grad()
def rehearse(
    recipe: Any,
    built: BuiltModel,
    preprocess: TiledPreprocess,
    written: Sequence[Program],
    run: RunProgram,
    *,
    dtype: str,
) -> Rehearsed:
    """Answer one window, and two of which one is padded on the left, with the programs and with the library's model.

    Args:
        recipe: how windows are asked about.
        built: the model.
        preprocess: of its windows.
        written: the programs, the tower's first.
        run: (program, inputs) -> outputs.
        dtype: of the programs.

    Returns:
        by case and kind of output how far they part at most, as a share of the largest number of the kind; and at how
        many of the answered places the first choices agree.

    Raises:
        OmniError: that is more than 1e-4 (float16: 2e-2), or a clear first choice is another.
    """
    base, rows = base_of(built.model), recipe.probe_rows(built, preprocess)
    decoder = Decoder(base)
    found: dict[str, float] = {}
    choices: list[Choices] = []
    for case, chosen in {"1 window": rows[:1], "2 windows, 1 padded": [rows[0], _cut(rows[1])]}.items():
        batch = _asked(chosen, built)
        seen = _seen_by_program(run, written[0], batch["pictures"], preprocess)
        truth = _by_library(base, batch, preprocess)
        said = _by_program(run, decoder.first_inputs(batch, seen))
        for expected, outputs in _answered(truth, said):
            for kind, share in _apart(expected, outputs).items():
                what = f"{case}, prompt and {_STEPS} tokens: {kind}"
                found[what] = max(found.get(what, 0.0), share)
            choices.append(first_choices(expected[0], outputs[0], _TOLERANCE[dtype]))
    _check(found, _TOLERANCE[dtype])
    return Rehearsed(found, agreement(choices))


def _cut(row: Row) -> Row:
    """Return a row whose prompt begins later."""
    return {**row, **{name: row[name][..., _SHORTER:] for name in ("input_ids", "labels", "position_ids")}}


def _asked(rows: Sequence[Row], built: BuiltModel) -> Mapping[str, Tensor]:
    return packed.left_padded(rows, built.tokenizer.pad_token_id, _CPU)


def _seen(base: Any, batch: Mapping[str, Tensor], preprocess: TiledPreprocess) -> Any:
    return packed.features(base, batch["pictures"], preprocess, is_blind=False)


def _levels(features: Any) -> list[Tensor]:
    """Return what a tower said of all windows as its program says it: the embeddings, then each deepstack level."""
    levels = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
    return [level.flatten(0, -2) if isinstance(level, Tensor) else torch.cat(tuple(level)) for level in levels]


def _seen_by_program(run: RunProgram, tower: Program, pictures: Tensor, preprocess: TiledPreprocess) -> list[Tensor]:
    at_once = tower.batch or len(pictures)
    missing = -len(pictures) % at_once
    filled = torch.cat([pictures, pictures[-1:].expand(missing, *pictures.shape[1:])])
    parts = [run(tower.name, {INPUT_NAME: preprocess.pixel_values(part)}) for part in torch.split(filled, at_once)]
    tokens = len(pictures) * preprocess.visual_tokens
    return [torch.cat(level)[:tokens] for level in zip(*parts, strict=True)]


def _by_program(run: RunProgram, inputs: Mapping[str, Tensor]) -> Generator[Sequence[Tensor], Tensor | None, None]:
    """Yield all outputs at each step; the token that is sent in is what comes next."""
    while True:
        outputs = run(NAME, inputs)
        token = yield outputs
        assert token is not None
        inputs = next_inputs(inputs, outputs[1:], token)


def _by_library(base: Any, batch: Mapping[str, Tensor], preprocess: TiledPreprocess) -> Iterator[list[Tensor]]:
    """Yield the same of the library's own model, which goes on by its own likeliest tokens."""
    seen = {wiring.wiring_of(base).heard_as: _seen(base, batch, preprocess)}
    given = {"input_ids": batch["input_ids"], "mm_encoder_outputs": seen}
    mask, places = batch["attention_mask"], wiring.positions(base, batch["position_ids"])
    cache = DynamicCache(config=base.config.get_text_config())
    for _ in range(1 + _STEPS):
        with packing.by_library(base):
            output = base(**given, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
        yield [logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
        given = {"input_ids": logits.argmax(-1, keepdim=True)}
        mask, places = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), places[..., -1:] + 1


def _answered(
    truth: Iterator[list[Tensor]], said: Generator[Sequence[Tensor], Tensor | None, None]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield at each step what the library says and what the programs say, which are told the library's own tokens."""
    token: Tensor | None = None
    for expected in truth:
        yield expected, said.send(token)
        token = expected[0].argmax(-1, keepdim=True)


def _apart(expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Return by kind of output the largest difference, as a share of the largest number."""
    kinds = by_kind(found)
    return {kind: _share(kinds[kind], tensors) for kind, tensors in by_kind(expected).items()}


def first_choices(expected: Tensor, found: Tensor, allowed: float) -> Choices:
    """Compare the likeliest token of each row.

    Args:
        expected: (rows, tokens) logits of the model.
        found: those of the programs.
        allowed: difference of one logit, as a share of the largest.
    """
    first, second = expected.topk(2).values.unbind(-1)
    return Choices(expected.argmax(-1) == found.argmax(-1), first - second > allowed * expected.abs().max())


def agreement(choices: Sequence[Choices]) -> float:
    """Return the share of the places where first choices agree.

    Raises:
        OmniError: they do not where the model's is clear.
    """
    agree, clear = (torch.cat(places) for places in zip(*choices, strict=True))
    if other := int((clear & ~agree).sum()):
        raise OmniError(
            f"the first choice of the ONNX programs is another at {other} of the {int(clear.sum())} places where the "
            "model's is clear; nothing is published: try --dtype float32 or another --opset"
        )
    return float(agree.double().mean())


def _share(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    difference = max(float((one - other).abs().nan_to_num(torch.inf).max()) for one, other in pairs)
    return difference / max(float(one.abs().max()) for one in expected)


def _check(found: Mapping[str, float], allowed: float) -> None:
    what, share = max(found.items(), key=lambda item: item[1])
    if not share <= allowed:
        raise OmniError(
            f"{what} of the ONNX programs differ from the model's by {share:.1e} of the largest, {allowed:.0e} "
            "allowed; nothing is published: try --dtype float32 or another --opset"
        )
