"""From what the user typed to settings: layers win in their order, and a wrong word is one line with the right one."""

import json
from pathlib import Path

import pytest

from omni_cli.commands._compose import (
    camera_list,
    choose_profile,
    compose_recipe,
    recipe_of_shards,
    table_of,
    typed_keys,
)
from omni_cli.commands._options import parse_share, parse_split
from omni_cli.config import comma_list
from omni_cli.errors import UsageError
from omni_cli.profiles import default_profile, load_profile
from omni_cli.report import Console
from omni_cli.stages.fetch import FetchRequest, parse_size
from omni_cli.stages.pipeline import FetchSettings, fetch_request
from omni_cli.world.clip import SyntheticSpec


def test_each_layer_wins_over_the_one_before(tmp_path: Path):
    config = tmp_path / "run.toml"
    config.write_text("[sample]\nwindow = 5\nstride = 5\nrate_hz = 5.0\n")
    flags = {"--stride": 6, "--rate-hz": 6.0, "--canvas": None}
    composed = compose_recipe("vlm", load_profile("cpu-tiny"), config=config, sets=["sample.rate_hz=7.0"], flags=flags)
    sample, origin_of = composed.value.sample, composed.origin_of
    assert (sample.max_age_ms, origin_of("sample.max_age_ms")) == (100.0, "default")
    assert (sample.canvas_px, origin_of("sample.canvas_px")) == (112, "profile cpu-tiny")
    assert (sample.window, origin_of("sample.window")) == (5, str(config))
    assert (sample.stride, origin_of("sample.stride")) == (6, "--stride")
    assert (sample.rate_hz, origin_of("sample.rate_hz")) == (7.0, "--set")
    typed = typed_keys(composed, load_profile("cpu-tiny"))
    assert typed == {"sample.window", "sample.stride", "sample.rate_hz"}


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("vml", {}, r"unknown recipe 'vml'; did you mean 'vlm'\?"),
        ("vlm", {"sets": ["sample.windw=3"]}, r"--set: unknown key sample\.windw; did you mean 'window'\?"),
        (
            "vlm",
            {"flags": {"--window": 0}},
            r"--window: sample\.window = 0: input should be greater than or equal to 1",
        ),
        (
            "vlm",
            {"flags": {"--labels": "poetry"}},
            r"--labels: sample\.labels = 'poetry': input should be 'ego-motion'",
        ),
        ("vlm", {"config": Path("absent.toml")}, r"no config file absent\.toml"),
    ],
)
def test_a_wrong_setting_names_the_option_it_came_from(recipe, options, message):
    with pytest.raises(UsageError, match=message):
        compose_recipe(recipe, load_profile("cpu-tiny"), **options)


def test_a_profile_of_another_machine_is_for_dry_runs_only(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no vendor's tool: a machine without a GPU
    with pytest.raises(UsageError, match="needs a rocm accelerator, this machine has cpu; use --profile cpu-tiny"):
        choose_profile("mi300x-bf16", Console(quiet=True), dry_run=False)
    assert choose_profile("mi300x-bf16", Console(quiet=True), dry_run=True).name == "mi300x-bf16"


def test_the_profile_that_fits_is_said_in_one_line(capsys):
    chosen = choose_profile(None, Console(), dry_run=True)
    assert chosen.name == default_profile()
    assert f"profile: {chosen.name}, which fits this machine" in capsys.readouterr().err


def test_the_shards_say_for_which_recipe_they_are(tmp_path: Path):
    assert recipe_of_shards(None, tmp_path) == "vlm"
    shards = tmp_path / "shards" / "mine"
    shards.mkdir(parents=True)
    (shards / "manifest.json").write_text(json.dumps({"recipe": "control"}))
    assert recipe_of_shards(None, tmp_path) == recipe_of_shards(shards, tmp_path) == "control"


@pytest.mark.parametrize("content", ["[]", '"vlm"', "{}", "3", "no json", ""])
def test_shards_that_cannot_say_it_are_left_to_the_stage_that_reads_them(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    assert recipe_of_shards(tmp_path, tmp_path) == "vlm"


def asked_by_table(tmp_path: Path, table: str) -> FetchRequest:
    config = tmp_path / "pipeline.toml"
    config.write_text(f"[fetch]\n{table}\n")
    return fetch_request(table_of(config, "fetch", FetchSettings), Path("data"))


@pytest.mark.parametrize(
    ("table", "asked"),
    [
        ("chunks = 3", {"source": "synthetic", "chunks": "3"}),
        ('chunks = "0-4"', {"source": "synthetic", "chunks": "0-4"}),
        (
            'size = "96x54"\nfps = 10\nseconds = 2',
            {
                "source": "synthetic",
                "chunks": "2",
                "synthetic": SyntheticSpec(seconds=2, fps=10, width_px=96, height_px=54),
            },
        ),
        ('source = "openpilot"\nfrom = "routes"', {"source": "openpilot", "origin": Path("routes")}),
        (
            'source = "physical_ai_av"\nclips = "a, b"\nmax_gb = 5\nrevision = "main"',
            {"source": "physical_ai_av", "clips": ("a", "b"), "max_gb": 5.0, "revision": "main"},
        ),
        ('source = "physical_ai_av"\nclips = ["a"]', {"source": "physical_ai_av", "clips": ("a",)}),
    ],
)
def test_the_fetch_table_speaks_the_words_of_omni_fetch(tmp_path: Path, table: str, asked: dict):
    assert asked_by_table(tmp_path, table) == FetchRequest(data=Path("data"), **asked)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('origin = "routes"', "unknown key origin; "),
        ("width_px = 96", "unknown key width_px; known: "),
        ('form = "routes"', "unknown key form; did you mean 'from'?"),
        ("size = 320", "size = 320: input should be a valid string"),
        ("chunks = true", "chunks = True: input should be a valid string"),
        ("chunks = [0, 1]", "chunks = (0, 1): input should be a valid string"),
        ("workers = 0", "workers = 0: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_word_of_the_fetch_table_is_one_line(tmp_path: Path, table: str, message: str):
    with pytest.raises(UsageError) as caught:
        asked_by_table(tmp_path, table)
    assert str(caught.value).startswith(f"{tmp_path / 'pipeline.toml'} [fetch]: {message}")
    assert "\n" not in str(caught.value)


def test_the_fetch_table_asks_for_chunks_or_for_clips(tmp_path: Path):
    with pytest.raises(UsageError, match=r"\[fetch\] holds both chunks and clips; keep one of them"):
        asked_by_table(tmp_path, 'chunks = 2\nclips = "a"')


def test_camera_sets_and_names_may_be_mixed():
    assert camera_list(None) is None
    assert camera_list("1-cam,road") == ("camera_front_wide_120fov", "road")
    assert comma_list(" a, ,b") == ("a", "b")


def test_sizes_shares_and_splits_are_read(tmp_path: Path):
    names = tmp_path / "splits.csv"
    names.write_text("")
    assert parse_size("320x180") == (320, 180)
    assert parse_share("2/8") == (2, 8)
    assert (parse_split("time"), parse_split(str(names)), parse_split(None)) == (
        ("time", None),
        (None, names),
        (None, None),
    )


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_size, "320", "size 320: expected WIDTHxHEIGHT in pixels"),
        (parse_size, "0x180", "size 0x180: expected WIDTHxHEIGHT"),
        (parse_share, "9/8", "--shard 9/8: expected I/N with I from 1 to N"),
        (parse_share, "0/8", "--shard 0/8: expected I/N"),
        (parse_share, "two", "--shard two: expected I/N"),
        (parse_split, "hahs", "--split hahs: expected hash, time, or a file"),
    ],
)
def test_what_cannot_be_read_is_one_line(parse, text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)
