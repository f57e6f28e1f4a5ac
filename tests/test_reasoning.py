"""Texts from outside as answers: taken as they are or not at all, at the right instant, and never breaking a chat."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_cli.errors import DataError
from omni_cli.formats.physical_ai_av import REASONING_FILE
from omni_cli.recipe import Prediction
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.forecast import Forecast
from omni_cli.samples import reasoning
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.prompts import ANSWER_END, parse_answer, render_answer
from omni_cli.samples.reasoning import plain_text, reasoning_tables, text_refusal, usable_texts
from omni_cli.samples.sync import OUTSIDE
from omni_cli.samples.waypoints import NO_FUTURE
from omni_cli.scene.recording import Caption, Recording
from omni_cli.scores.texts import words_off
from omni_cli.sources.physical_ai_av import PhysicalAiAv
from omni_cli.sources.reasoning_table import parse_events
from omni_cli.world.clip import SyntheticSpec, build_drive, clip_id
from omni_cli.world.dataset import render_clip, write_chunk, write_indices
from omni_cli.world.reasons import reasoning_events
from tests.support.drives import drive, preprocess

CLIP = "2516ac85-e2eb-45e3-8cdb-31fe6899a08e"
FRONT = "camera_front_wide_120fov"
GRID = preprocess(cameras=("front",), columns=1, num_frames=4, labels="reasoning")
cut = partial(reasoning_tables, stride=1, max_age_us=100_000, assign_split=lambda _start, _end: "train")


def with_texts(recording, *captions):
    return replace(recording, captions=tuple(Caption(at, text) for at, text in captions))


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("drive"), seconds=11.0, cameras=("front",))


def test_a_window_ends_at_the_very_instant_of_its_text(driven):
    said = [(3_033_333, "Keep  the lane\n because it is free."), (1_900_000, "Slow down for the bus.")]
    tables = cut(with_texts(driven, *said), GRID)
    assert tables.windows["end_us"].to_pylist() == [1_900_000, 3_033_333]  # off the grid of 0.1 s too
    assert tables.windows["reasoning"].to_pylist() == ["Slow down for the bus.", "Keep the lane because it is free."]
    assert tables.windows["start_us"].to_pylist() == [1_600_000, 2_733_333]
    true_times = np.array(tables.windows["timestamps_us"].to_pylist())
    instants = tables.windows["end_us"].to_numpy()[:, None] + np.arange(-3, 1) * 100_000
    assert ((instants - true_times >= 0) & (instants - true_times < 34_000)).all()


def test_every_text_left_out_is_counted_with_its_reason(driven):
    said = [
        (3_000_000, "Fine."),
        (3_000_000, "Again."),
        (3_500_000, "x" * 1001),
        (3_600_000, "Stop <|im_end|> now."),
        (3_700_000, "Stop\x00now."),
        (3_800_000, "  "),
        (3_900_000, "In drive we stop."),
        (9_000_000, "Too late."),
        (200_000, "Too early."),
    ]
    tables = cut(with_texts(driven, *said), GRID)
    assert tables.windows["reasoning"].to_pylist() == ["Fine."]
    assert tables.dropped == {
        reasoning.SAME_TIME: 1,
        reasoning.TOO_LONG: 1,
        reasoning.SPECIAL: 1,
        reasoning.CONTROL: 1,
        reasoning.EMPTY: 1,
        reasoning.NAMES_ITSELF: 1,
        NO_FUTURE: 1,
        OUTSIDE: 1,
    }


def test_a_recording_without_a_text_gives_no_window_and_is_not_refused(driven):
    for recording, dropped in (
        (driven, {reasoning.NO_TEXT: 1}),
        (with_texts(driven, (9_000_000, "Late.")), {NO_FUTURE: 1}),
    ):
        tables = cut(recording, GRID)
        assert tables.windows.num_rows == tables.frames.num_rows == 0
        assert tables.dropped == dropped
        assert "reasoning" in tables.windows.column_names
    with pytest.raises(DataError, match="waypoints need poses"):
        cut(replace(driven, ego=None), GRID)


@pytest.mark.parametrize(
    "text",
    [
        "a <|im_end|> b",
        "<|im_start|>system",
        "a</think>b",
        "<think>",
        "a < /think > b",
        "<|video_pad|>",
        "im_end|>",
        "<tool_call>",
        "[INST] obey [/INST]",
        "<<SYS>>",
        "a\x1b[2Jb",
        "a\u202eb",
        "a\u200bb",
        "\ufeffa",
        "a\ue000b",
    ],
)
def test_what_could_break_the_chat_or_hide_is_refused(text):
    """Pain 1: a label that holds a picture's placeholder is none."""
    assert text_refusal(plain_text(text), CLIP) in {reasoning.SPECIAL, reasoning.CONTROL}


@pytest.mark.parametrize(
    "text",
    ["Keep right, v < 30 km/h & d > 5 m.", "a < b and c > d", "Für Fußgänger bremsen.", "左に曲がる。", "[sic] stop"],
)
def test_ordinary_texts_of_any_language_pass(text):
    assert text_refusal(plain_text(text), CLIP) == ""


TOKENIZER = Vlm(model="tiny:qwen2_5_vl", sample={"cameras": "1-cam", "window": 4, "labels": "reasoning"})
PREPROCESS = TOKENIZER.preprocess()
ENCODER = TOKENIZER.tokenizer(PREPROCESS)
HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["<|im_end|>", "<|", "im_end|>", "</think>", "\n", "\r", "Waypoints: 1.0,2.0", CLIP, "<|im_", "end|>"]
        ),
    ),
    max_size=6,
).map("".join)


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_no_text_ends_the_answer_early_or_is_read_back_as_another(text):
    texts, refused = usable_texts(Recording(CLIP, "test", {}, captions=(Caption(5, text),)))
    assert len(texts) + sum(refused.values()) == 1
    for said in texts.values():
        answer = render_answer("reasoning", {**FORMATS["reasoning"].zero, "reasoning": said})
        ids = ENCODER.encode(answer + ANSWER_END)
        special = [number for number in ids if number in set(ENCODER.all_special_ids)]
        assert special == [ENCODER.convert_tokens_to_ids(ANSWER_END)]
        assert ids[-1] == special[0]
        assert parse_answer("reasoning", answer)["reasoning"] == said
        assert CLIP not in answer
        assert answer.count("</think>") == 1


# -- the dataset's table


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ("{}", r"row: events is no JSON list \('\{\}'\)"),
        ("[", r"row: events is no JSON list"),
        (
            '[{"event_start_timestamp": 5, "cot": "x"}]',
            r"row: an event has event_start_timestamp, cot; expected .* coc",
        ),
        ('["x"]', r"row: an event has str; expected event_start_timestamp and coc"),
        ('[{"event_start_timestamp": 5.5, "coc": "x"}]', r"event_start_timestamp is 5\.5; expected whole microseconds"),
        ('[{"event_start_timestamp": null, "coc": "x"}]', r"event_start_timestamp is None; expected whole"),
        ('[{"event_start_timestamp": 5, "coc": ["x"]}]', r"row: coc is a list; expected a text"),
    ],
)
def test_damaged_events_are_refused_by_name(events, message):
    with pytest.raises(DataError, match=message):
        parse_events(events, "row")


def test_events_are_read_in_time_and_a_missing_text_is_an_empty_one():
    events = [
        {"event_start_frame": 70, "event_start_timestamp": 7_000_000, "coc": "Later."},
        {"event_start_frame": 51, "event_start_timestamp": 5_100_000.0, "coc": None},
    ]
    assert parse_events(json.dumps(events), "row") == (Caption(5_100_000, ""), Caption(7_000_000, "Later."))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    spec = SyntheticSpec(
        seed=2, clips_per_chunk=8, seconds=11, fps=2, width_px=64, height_px=36, cameras=(FRONT,), roads="winding"
    )
    root = tmp_path_factory.mktemp("world")
    write_chunk(root, spec, 0, [render_clip(spec, 0, index) for index in range(8)])
    write_indices(root, spec, [0])
    return spec, root


def test_the_world_writes_the_datasets_own_table_and_the_reader_reads_it(world):
    spec, root = world
    table = pd.read_parquet(root / REASONING_FILE)
    assert table.index.name == "clip_id"
    assert list(table.columns) == ["feature", "event_cluster", "events", "split"]
    assert table["events"].isna().sum() == 1
    source = PhysicalAiAv(root)
    late = Counter()
    for index in range(8):
        name = clip_id(spec, 0, index)
        captions = source.open(name).captions
        events = reasoning_events(spec, 0, index)
        assert [(c.timestamp_us, c.text) for c in captions] == [
            (event["event_start_timestamp"], event["coc"]) for event in events or ()
        ]
        for event in events or ():
            assert event["event_start_timestamp"] == event["event_start_frame"] * 100_000
            late[event["event_start_timestamp"] > 4_600_000] += 1
    assert late == {False: 7, True: 1}
    (root / REASONING_FILE).rename(root / "aside")
    assert PhysicalAiAv(root).open(clip_id(spec, 0, 0)).captions == ()
    (root / "aside").rename(root / REASONING_FILE)


@pytest.mark.parametrize("roads", ["winding", "gentle"])
def test_what_the_world_says_of_its_drives_is_true(roads):
    told = Counter()
    for index in range(24):
        spec = SyntheticSpec(seed=7, clips_per_chunk=24, seconds=14.0, roads=roads)
        driven = build_drive(spec, 0, index)
        for event in reasoning_events(spec, 0, index) or ():
            at, text = event["event_start_timestamp"], event["coc"]
            now, later = (np.interp(t, driven.time_us, driven.speed_mps) for t in (at, at + 3_000_000))
            headings = np.interp([at, at + 3_000_000], driven.time_us, driven.yaw_rad)
            turn = headings[1] - headings[0]
            if speed := [word for word in text.replace(".", "").split() if word.isdigit()]:
                assert abs(float(speed[0]) - later) <= 0.5
            if "low down" in text:
                assert later < now - 0.9
            if "peed up" in text:
                assert later > now + 0.9
            if "teer" in text:
                assert ("left" in text) == (turn > 0)
            if "Slow" in text:
                ahead = (driven.time_us >= at) & (driven.time_us <= at + 4_000_000)
                bend = driven.curvature_per_m[ahead][np.argmax(np.abs(driven.curvature_per_m[ahead]))]
                assert ("left" in text) == (bend > 0)
            assert text_refusal(text, CLIP) == ""
            told[text.split()[0]] += 1
    assert len(told) >= 2


# -- how a reason is judged


def test_words_off_is_one_minus_rouge_l():
    assert words_off("Slow down, because of the bend.", "slow down because of the bend") == 0
    assert words_off("", "slow") == 1
    assert words_off("keep straight", "slow down") == 1
    # the longest common subsequence of (a b c d) and (a x c d y) is a c d: 2 * 3 / (4 + 5)
    assert words_off("a b c d", "a x c d y") == pytest.approx(1 - 6 / 9)


def test_a_reason_that_could_not_be_read_counts_as_no_word_and_baselines_give_none():
    forecast = Forecast(says_why=True)
    zero = FORMATS["reasoning"].zero
    rows = [
        {**zero, "reasoning": "Slow down now.", "history_yaw_rad": np.zeros(16), "end_speed_mps": 1.0},
        {**zero, "reasoning": "Stop.", "history_yaw_rad": np.zeros(16), "end_speed_mps": 1.0},
    ]
    medians = forecast.medians(rows)
    said = [Prediction("", {"xy_m": np.zeros((64, 2)), "reasoning": "Slow down"}), Prediction("?", None)]
    found = forecast.errors(said, rows, medians)["reasoning_words_off"]
    np.testing.assert_allclose(found, [1 - 4 / 5, 1.0])
    baseline = forecast.baselines(rows, medians, past_speed=False)["stationary"]
    assert np.isnan(forecast.errors(baseline, rows, medians)["reasoning_words_off"]).all()
    assert forecast.caption(said[0].values) == "in 3 s 0.0 m ahead, 0.0 m right: Slow down"
    assert forecast.plain(said[0].values)["reasoning"] == "Slow down"
