"""Answers held to their format: the grammar beside each parser, and models that are held to it while they answer."""

import re
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from omni_cli.errors import DataError
from omni_cli.models.grammar import Grammar
from omni_cli.models.tiny import tiny_tokenizer
from omni_cli.recipe import Formatted
from omni_cli.recipes.vlm import Vlm
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.prompts import ANSWER_END, parse_answer, render_answer
from omni_cli.samples.reasoning import MAX_CHARACTERS, plain_text, text_refusal
from tests.test_models import make_rows

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
OWN_THOUGHT = "Slow down to 10 m/s because the road bends to the left ahead."


def written(labels: str, thought: str, said: str) -> str:
    return f"<think>\n{thought}\n</think>\n{said}" if FORMATS[labels].grammar.thought_tokens else said


@pytest.mark.parametrize("labels", FORMATS)
@given(data=st.data())
@settings(max_examples=40)
def test_whatever_the_grammar_holds_is_read_to_finite_numbers(labels, data) -> None:
    form = FORMATS[labels].grammar
    said = data.draw(st.from_regex(re.compile(form.said, re.ASCII), fullmatch=True))
    thought = data.draw(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1))
    text = written(labels, thought.replace("</think>", ""), said)
    if not form.holds(text):  # nothing was left of the thought
        assert form.thought_tokens
        return
    values = parse_answer(labels, text)
    assert values is not None
    numbers = [value for name, value in values.items() if name != "reasoning"]
    assert all(np.isfinite(number).all() for number in numbers)


METRES = st.floats(-999, 999, allow_nan=False)


@pytest.mark.parametrize("labels", FORMATS)
@given(
    motion=st.tuples(st.floats(-99_999, 99_999), st.floats(-99_999, 99_999)),
    path_m=st.lists(METRES, min_size=13, max_size=13).map(
        lambda few: [value for value in few for _ in range(15)][:192]
    ),
    text=st.text(min_size=1, max_size=MAX_CHARACTERS).map(plain_text),
)
@settings(max_examples=50)
def test_whatever_labels_are_rendered_to_is_in_the_grammar(labels, motion, path_m, text) -> None:
    thought = OWN_THOUGHT if text_refusal(text, "recording") else text
    targets = {"mean_speed_mps": motion[0], "displacement_m": motion[1], "future_xyz_m": path_m, "reasoning": thought}
    assert FORMATS[labels].grammar.holds(render_answer(labels, targets))


PLAIN = st.from_regex(r"-?[0-9]{1,6}(\.[0-9]{1,6})?", fullmatch=True)
OF_A_PATH = st.from_regex(r"-?[0-9]{1,3}\.[0-9]", fullmatch=True)
ODD = st.from_regex(r"[ +-]{0,2}[0-9]{0,7}\.?[0-9]{0,7}", fullmatch=True)
STATED = re.compile(r"-?[0-9]+(\.[0-9]+)?")


@pytest.mark.parametrize("labels", FORMATS)
@given(data=st.data())
@settings(max_examples=100)
def test_in_the_words_of_the_labels_the_grammar_holds_what_is_read_and_nothing_else(labels, data) -> None:
    """However a number is written: signed, with zeros before it, whole, with few decimals or many."""
    zero = render_answer(labels, FORMATS[labels].zero)
    stated, of_a_path = len(STATED.findall(zero)), "Waypoints" in zero
    numbers = data.draw(st.lists(OF_A_PATH if of_a_path else PLAIN, min_size=stated, max_size=stated))
    if data.draw(st.booleans()):
        numbers[data.draw(st.integers(0, stated - 1))] = data.draw(PLAIN | ODD)
    if labels == "ego-motion":
        numbers[2] = numbers[1]  # the displacement, which is said twice
    left = iter(numbers)
    text = STATED.sub(lambda _: next(left), zero)
    assert FORMATS[labels].grammar.holds(text) == (parse_answer(labels, text) is not None)


@pytest.mark.parametrize("labels", FORMATS)
def test_a_grammar_always_reaches_its_end(labels) -> None:
    """If each byte is a token, what is said, the tags and the longest thought fit into its most tokens."""
    form = FORMATS[labels].grammar
    tags = len("<think>\n\n</think>\n") if form.thought_tokens else 0
    longest = re._parser.parse(form.said).getwidth()[1]
    assert tags + form.thought_tokens + longest + len([ANSWER_END]) <= form.most_tokens


def tokenizer(*more: str) -> Any:
    made = tiny_tokenizer([render_answer(labels, form.zero) for labels, form in FORMATS.items()])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in more])
    return made


@pytest.mark.parametrize("added", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("labels", FORMATS)
def test_noise_held_to_a_grammar_is_an_answer_in_it(labels, added) -> None:
    """Also where a tag is one token, as in Qwen3's vocabulary; tokens of the chat never are in a thought."""
    of, form, rows = tokenizer(*added), FORMATS[labels].grammar, 8
    held = Grammar(form.lark, form.most_tokens, of, ANSWER_END).over(rows)
    generator, end = torch.Generator().manual_seed(0), of.convert_tokens_to_ids(ANSWER_END)
    ids = torch.zeros((rows, 1), dtype=torch.long)
    for _ in range(form.most_tokens):
        scores = held(ids, torch.randn((rows, len(of) + 5), generator=generator))
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
        ids[:, -1][(ids[:, 1:-1] == end).any(1)] = of.pad_token_id  # as `generate` does with answers that have ended
    answers = [row[: row.index(end)] for row in ids[:, 1:].tolist()]
    texts = [of.decode(answer) for answer in answers]
    assert all(form.holds(text) and parse_answer(labels, text) is not None for text in texts)
    assert len(set(texts)) > 1
    assert held.tokens == [len(answer) + 1 for answer in answers]
    if added and form.thought_tokens:
        assert all(of.encode(tag)[0] in answer for answer in answers for tag in added)


PATH = "Waypoints:" + 11 * " 000.0,-0.0" + " 007.5,-03.2 999.9,-999.9"


@pytest.mark.parametrize(
    ("labels", "wish"),
    [
        ("speed", "Speed 7 m/s."),
        ("speed", "Speed 12 m/s."),
        ("speed", "Speed 12.5 m/s."),
        ("speed", "Speed -3 m/s."),
        ("speed", "Speed -123456.123456 m/s."),
        ("ego-motion", "<think>\nAvg Velocity: 5.2m/s. Total displacement: 42m.\n</think>\n"
         "Action: Displacement of 42 meters."),
        ("ego-motion", "<think>\nAvg Velocity: 05.234m/s. Total displacement: -0.5m.\n</think>\n"
         "Action: Displacement of -0.50 meters."),
        ("waypoints", PATH),
        ("reasoning", f"<think>\nIt is 7 m to the bend.\n</think>\n{PATH}"),
    ],
)  # fmt: skip
def test_an_answer_that_is_read_anyhow_is_never_changed(labels, wish) -> None:
    """Another number would be no answer of the model's; one in other digits than labels have is as good."""
    assert parse_answer(labels, wish) is not None
    of, form = tokenizer(), FORMATS[labels].grammar
    held = Grammar(form.lark, form.most_tokens, of, ANSWER_END).over(1)
    wished, ids = of.encode(wish + ANSWER_END), torch.zeros((1, 1), dtype=torch.long)
    for token in wished:
        scores = torch.zeros((1, len(of)))
        scores[0, token] = 1.0
        ids = torch.cat([ids, held(ids, scores).argmax(1, keepdim=True)], 1)
    assert of.decode(ids[0, 1:]) == wish + ANSWER_END
    assert (held.off_grammar, held.tokens) == ([0], [len(wished)])
    assert len(wished) <= min(form.most_tokens, FORMATS[labels].max_tokens)


def test_a_model_of_nans_is_refused_where_a_grammar_would_make_numbers_of_it() -> None:
    """Also after good tokens; not where the answer of that row has ended, for what follows is padding."""
    of, form = tokenizer(), FORMATS["speed"].grammar
    held = Grammar(form.lark, form.most_tokens, of, ANSWER_END).over(2)
    short, long = (of.encode(f"Speed {number} m/s.{ANSWER_END}") for number in ("7", "123456.123456"))
    ids = torch.zeros((2, 1), dtype=torch.long)
    for tokens in zip([*short, of.pad_token_id], long, strict=False):
        scores = torch.nn.functional.one_hot(torch.tensor(tokens), len(of)).float()
        scores[0] += torch.nan if len(ids[0]) > len(short) else 0.0
        ids = torch.cat([ids, held(ids, scores).argmax(1, keepdim=True)], 1)
    assert held.tokens == [len(short), len(short) + 1]
    scores[1, 5] = torch.nan
    with pytest.raises(DataError, match=r"scores its next token NaN, so that no answer is its own: .* or in float32"):
        held(ids, scores)


def test_a_thought_is_closed_when_its_budget_is_used_up() -> None:
    """Where a model would think for ever, 512 tokens of it are kept, and the answer follows."""
    of, form = tokenizer(), FORMATS["reasoning"].grammar
    held = Grammar(form.lark, form.most_tokens, of, ANSWER_END).over(1)
    scores = torch.zeros((1, len(of)))
    scores[0, of.encode("a")[0]] = 1.0
    ids = torch.zeros((1, 1), dtype=torch.long)
    while len(ids[0]) < form.most_tokens and ids[0, -1] != of.convert_tokens_to_ids(ANSWER_END):
        ids = torch.cat([ids, held(ids, scores.clone()).argmax(1, keepdim=True)], 1)
    values = parse_answer("reasoning", of.decode(ids[0, 1:-1]))
    assert values is not None
    assert values["reasoning"] == "a" * form.thought_tokens
    assert held.tokens == [len(ids[0]) - 1]
    assert held.off_grammar == [held.tokens[0] - form.thought_tokens]


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    class Words:
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def get_vocab(self) -> dict[str, int]:
            return {"▁car": 0}

        def convert_tokens_to_ids(self, _token: str) -> int:
            return 0

    with pytest.raises(DataError, match=r"token '▁car' holds '▁', which stands for no byte; .* byte-level tokenizer"):
        Grammar(FORMATS["speed"].grammar.lark, 24, Words(), ANSWER_END)


def recipe(family: str, labels: str = "ego-motion") -> Vlm:
    sample = {"cameras": "4-cam", "window": 4, "canvas_px": 112, "labels": labels}
    return Vlm(model=f"tiny:{family}", precision="float32", sample=sample, tune={"mode": "full"})


@pytest.mark.parametrize("labels", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_model_gives_answers_that_all_can_be_read(family, labels) -> None:
    """Greedy and drawn by chance, in a batch whose rows end at different times, each as it answers alone."""
    vlm = recipe(family, labels)
    preprocess, rows = vlm.preprocess(), make_rows(vlm, (3.0, 12.5))
    built = vlm.build(preprocess)
    assert isinstance(vlm, Formatted)
    held = vlm.held_to_format(replace(built, model=built.model.eval()), preprocess)
    said = vlm.predict(held, rows, preprocess)
    assert all(one.values is not None and FORMATS[labels].grammar.holds(one.text) for one in said)
    assert all(one.held.off_grammar > 0 for one in said)  # and none of them is the model's own
    if labels == "speed":
        drawn = vlm.draw(held, rows, preprocess, [5, 6], 1.0)
        assert all(one.values is not None for one in drawn)
        assert vlm.draw(held, rows[1:], preprocess, [6], 1.0) == drawn[1:]
        assert vlm.predict(held, rows[:1], preprocess) == said[:1]
        assert vlm.predict(built, rows, preprocess)[0].held is None


def test_who_is_not_forced_says_what_it_says_when_free() -> None:
    """A model that has half learned the format: some answers are its own, letter for letter, and the others marked."""
    vlm = recipe("qwen2_5_vl", "speed")
    preprocess, rows = vlm.preprocess(), make_rows(vlm, (3.0, 12.5, 21.0))
    built = vlm.build(preprocess)
    held = vlm.held_to_format(built, preprocess)
    optimizer, kinds = torch.optim.AdamW(built.model.parameters(), lr=1e-3), set()
    for _ in range(8):
        built.model.eval()
        for free, bound in zip(vlm.predict(built, rows, preprocess), vlm.predict(held, rows, preprocess), strict=True):
            is_own = FORMATS["speed"].grammar.holds(free.text)
            assert is_own == (bound.held.off_grammar == 0) == (bound.text == free.text)
            assert (bound.held.line()["forced"], bound.held.line()["tokens"]) == (not is_own, bound.held.tokens)
            kinds.add(is_own)
        optimizer.zero_grad()
        loss = vlm.loss(built.model.train(), vlm.collate(rows, preprocess), preprocess)
        (loss.total / loss.count).backward()
        optimizer.step()
    assert kinds == {True, False}
