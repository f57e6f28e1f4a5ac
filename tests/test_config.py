"""Settings: layers win in order, and a mistake is one line that says what would be right."""

from pathlib import Path
from typing import Literal

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from omni_cli.config import (
    Layer,
    Settings,
    differences,
    dump_toml,
    override_layer,
    read_document,
    read_layer,
    resolve,
)
from omni_cli.errors import DataError, UsageError


class Lora(Settings):
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj",)


class Train(Settings):
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    learning_rate: float = 1e-4
    lora: Lora = Lora()
    note: str | None = None
    parts: tuple[Literal["tower", "merger"], ...] = ()
    sizes: tuple[int, ...] = ()


def test_later_layers_win_and_origins_are_kept():
    layers = [
        Layer("p.toml", {"learning_rate": 1e-3, "lora": {"rank": 4}}),
        override_layer(["lora.rank=16", "dtype=float32"]),
    ]
    found = resolve(Train, layers)
    assert found.value == Train(dtype="float32", learning_rate=1e-3, lora=Lora(rank=16))
    assert found.origin_of("lora.rank") == "--set"
    assert found.origin_of("learning_rate") == "p.toml"
    assert found.origin_of("note") == "default"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lora.rnak=4", "--set: unknown key lora.rnak; did you mean 'rank'?"),
        ("rank=4", "--set: unknown key rank; did you mean 'lora.rank'?"),
        ("zzz=4", "--set: unknown key zzz; known: dtype, learning_rate, lora, note, parts, sizes"),
        ("lora.rank=four", "--set: lora.rank = 'four': input should be a valid integer"),
        ("lora.rank=4.5", "--set: lora.rank = 4.5: input should be a valid integer"),
        ("dtype=fp8", "--set: dtype = 'fp8': input should be 'bfloat16' or 'float32'"),
        ("dtype=float3", "--set: dtype = 'float3': input should be 'bfloat16' or 'float32'; did you mean 'float32'?"),
        ("learning_rate=nan", "--set: learning_rate = nan: input should be a finite number"),
        ("lora=3", "--set: lora = 3: input should be a valid dictionary"),
        ("lora.rank", "--set lora.rank: expected KEY=VALUE"),
        ("parts=towr,merger", "--set: parts.0 = 'towr': input should be 'tower' or 'merger'; did you mean 'tower'?"),
        ("parts=3", """--set: parts = 3: input should be a valid tuple, such as ["A", "B"]; in --set A,B does too"""),
        ("sizes=1,2", "--set: sizes = '1,2': input should be a valid tuple"),
        ("lora.tragets=q_proj", "--set: unknown key lora.tragets; did you mean 'targets'?"),
        ("laro.targets=q_proj", "--set: unknown key laro; known: dtype, learning_rate, lora, "),
        ("dtype.targets=q_proj", "--set: dtype: input should be 'bfloat16' or 'float32'"),
    ],
)
@pytest.mark.fault("F25")
def test_a_wrong_setting_is_one_line(assignment, message):
    with pytest.raises(UsageError) as caught:
        resolve(Train, [override_layer([assignment])])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("lora.targets=q_proj", ("q_proj",)),
        ("lora.targets=q_proj, v_proj", ("q_proj", "v_proj")),
        ('lora.targets="q_proj,v_proj"', ("q_proj", "v_proj")),
        ('lora.targets=["q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("lora.targets=[]", ()),
    ],
)
def test_a_list_of_words_may_be_typed_with_commas(assignment, expected):
    assert resolve(Train, [override_layer([assignment])]).value.lora.targets == expected


def test_commas_stand_for_a_list_where_a_list_is_wanted_and_in_typed_words_alone():
    found = resolve(Train, [override_layer(["parts=tower,merger", "note=a,b"])]).value
    assert (found.parts, found.note) == (("tower", "merger"), "a,b")
    with pytest.raises(UsageError, match=r"run.toml: lora.targets = 'q_proj': input should be a valid tuple, such as"):
        resolve(Train, [Layer("run.toml", {"lora": {"targets": "q_proj"}})])


@pytest.mark.fault("F25")
def test_a_bad_file_is_named(tmp_path: Path):
    path = tmp_path / "run.toml"
    with pytest.raises(UsageError, match="no config file"):
        read_layer(path)
    path.write_text("a = = 1")
    with pytest.raises(UsageError, match=r"run\.toml: not valid TOML"):
        read_layer(path)
    path.write_text("#" * (2 << 20))
    with pytest.raises(UsageError, match="larger than"):
        read_layer(path)


def test_what_cannot_be_read_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "run.toml", "Not a directory"),
        (tmp_path / "loop.toml", "Too many levels of symbolic links"),
    ):
        with pytest.raises(UsageError, match=rf"cannot be read \({reason}\); give the path of a TOML file") as caught:
            read_layer(path)
        assert str(caught.value).startswith(f"{path}: ")


class Renamed(Settings):
    origin: str | None = Field(None, alias="from")
    chunks: int = 2


def test_a_key_is_known_by_the_word_that_the_user_types():
    assert resolve(Renamed, [override_layer(["from=routes"])]).value.origin == "routes"
    with pytest.raises(UsageError, match=r"--set: unknown key origin; known: chunks, from"):
        resolve(Renamed, [override_layer(["origin=routes"])])


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(1, 99),
)
def test_dumped_settings_read_back_equal(note, rate, rank):
    settings = Train(note=note, learning_rate=rate, lora=Lora(rank=rank, targets=("a", "b")))
    assert resolve(Train, [Layer("x", tomli.loads(dump_toml(settings)))]).value == settings


def test_differences_name_the_keys():
    assert differences(Train(), Train(lora=Lora(rank=9))) == ["lora.rank: 8 -> 9"]


def test_a_document_of_another_format_is_named_with_its_first_wrong_key(tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"lora": {"rank": "high"}}')
    with pytest.raises(DataError, match=r"run\.json: not a run \(lora\.rank = 'high': .*integer"):
        read_document(path, Train, "a run")
