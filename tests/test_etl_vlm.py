"""The `vlm` recipe's shards from the dataset's own layout: several cameras, tokens, a leak check."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from omni_cli.errors import DataError
from omni_cli.models.losses import IGNORED
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.rows import SIDECAR
from omni_cli.recipes.vlm.settings import VlmSample, VlmTune
from omni_cli.report import Console
from omni_cli.samples import answer_formats, prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.samples.splits import check_no_leak
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from tests.support import pai
from tests.support.pipeline import QUIET

SAMPLE = VlmSample(cameras=",".join(pai.CAMERAS), window=8, stride=4, canvas_px=112, aspect=4 / 3)
RECIPE = Vlm(model="tiny:qwen2_5_vl", sample=SAMPLE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    pai.write_repository(data / "raw" / "synthetic", clips=3)
    result = etl(RECIPE, EtlRequest(data=data, workers=0), Console(quiet=True))
    return result, open_shards(data / "shards" / result["shards"].rpartition("/")[2])


def test_windows_of_two_cameras_have_their_skew_and_their_motion(made):
    result, shards = made
    assert (result["recordings"], result["windows"]) == (3, {"train": 6, "val": 3})
    assert result["skew_ms"] == {"median": 93.0, "max": 93.0}  # 7 ms later means 93 ms earlier, one frame before
    row = WindowDataset(shards, "train")[0]
    assert row["displacement_m"] == pytest.approx(0.7 * pai.SPEED_MPS)
    assert row["pictures"].shape == shards.manifest.preprocess.window_shape
    greys = row["pictures"][:, :, 20, 28, 0].numpy().astype(int)
    assert (np.diff(greys, axis=0) > 5).all()  # the pictures brighten by 10 a frame
    assert (greys[:, 0] > greys[:, 1]).all()  # and the rear camera shows the frame before


def test_each_window_has_the_tokens_of_its_answer(made):
    """pain 9: what is learned is the answer with the end of its turn, all of it and nothing else."""
    result, shards = made
    dataset = WindowDataset(shards, "train", result["sidecar"])
    tokenizer = RECIPE.tokenizer(dataset.preprocess)
    for index in range(len(dataset)):
        row = dataset.row(index)
        ids, is_learned = row["input_ids"], row["labels"] >= 0
        answer = tokenizer.decode(row["labels"][is_learned])
        assert answer == prompts.render_answer("ego-motion", row) + prompts.ANSWER_END
        assert torch.equal(row["labels"][is_learned], ids[is_learned])
        assert is_learned.tolist() == sorted(is_learned.tolist())  # from its first token to the last of the row
        assert tokenizer.decode(ids[~is_learned]) == prompts.render_prompt(dataset.preprocess, row["start_speed_mps"])
        assert f"Total displacement: {row['displacement_m']:.2f}m." in answer
        assert row["position_ids"].shape == (4, len(row["input_ids"]))
        assert not any(text in tokenizer.decode(row["input_ids"]) for text in (row["recording"], "train", ".mp4"))


def test_the_manifest_shows_no_leak_and_a_leak_would_be_found(made):
    entries = made[1].manifest.recordings
    check_no_leak([(entry.id, entry.group, entry.windows) for entry in entries], "hash")
    with pytest.raises(DataError, match="windows in train and in val"):
        check_no_leak([(entry.id, "one drive", entry.windows) for entry in entries], "hash")


@pytest.fixture(scope="module")
def of_a_folder(tmp_path_factory):
    """Recipes on a base whose tokenizer is what it is, whatever is said to it."""
    folder = tmp_path_factory.mktemp("base")
    drawn = Vlm(model="tiny:qwen2_5_vl", sample=SAMPLE, tune=VlmTune(mode="full"))
    drawn.save(drawn.build(drawn.preprocess()), folder)
    return lambda **sample: Vlm(model=str(folder), sample=SAMPLE.model_copy(update=sample))


@pytest.mark.parametrize("changed", ["system", "question", "answer", "order", "spoken", "nothing"])
def test_other_words_have_another_sidecar(of_a_folder, monkeypatch, changed):
    """pain 9: ids of an older template would be learned from, and no line would say so."""
    recipe = of_a_folder(labels="waypoints" if changed == "spoken" else "ego-motion")
    preprocess, said = recipe.preprocess(), FORMATS["ego-motion"]
    before = recipe.sidecar_key(preprocess)
    render = said.render
    changes = {
        "question": {"question": said.question + " Say it."},
        "answer": {"render": lambda targets: render(targets).replace("Action", "Act")},
        "order": {"render": lambda targets: render(dict(zip(targets, reversed(targets.values()), strict=True)))},
    }
    if changed == "system":
        monkeypatch.setattr(prompts, "SYSTEM", "You drive.")
    elif changed == "spoken":
        monkeypatch.setattr(answer_formats, "SPOKEN", tuple(at - 1 for at in answer_formats.SPOKEN))
    elif changed in changes:
        monkeypatch.setitem(FORMATS, "ego-motion", replace(said, **changes[changed]))
    assert (recipe.sidecar_key(preprocess) == before) == (changed == "nothing")


def test_tokens_of_other_words_are_made_anew_beside_the_old(made, of_a_folder, monkeypatch):
    shards, recipe = made[1], of_a_folder()
    before = ensure_sidecar(shards, recipe, QUIET)
    assert ensure_sidecar(shards, recipe, QUIET) == before
    monkeypatch.setattr(prompts, "SYSTEM", "You drive.")
    after = ensure_sidecar(shards, recipe, QUIET)
    old, new = (WindowDataset(shards, "train", key).row(0)["input_ids"] for key in (before, after))
    tokenizer = recipe.tokenizer(shards.manifest.preprocess)
    assert tokenizer.decode(old).startswith("<|im_start|>system\nYou are a driving assistant.<|im_end|>")
    assert tokenizer.decode(new).startswith("<|im_start|>system\nYou drive.<|im_end|>")


class Silent(Vlm):
    """Has nothing to say of the second window of each recording."""

    def encode_windows(self, windows, preprocess):
        tokens = super().encode_windows(windows, preprocess).to_pylist()
        tokens[1]["labels"] = [IGNORED] * len(tokens[1]["labels"])
        return pa.Table.from_pylist(tokens, schema=SIDECAR)


def test_a_window_without_a_label_is_refused_by_name(made, monkeypatch):
    shards = made[1]
    monkeypatch.setattr(prompts, "SYSTEM", "Say nothing.")
    recipe, first = Silent(model=RECIPE.model, sample=SAMPLE), shards.manifest.recordings[0].id
    with pytest.raises(DataError, match=rf"^window 1 of {first} has no label that counts: its prompt would be read, "):
        ensure_sidecar(shards, recipe, QUIET)
    assert ensure_sidecar(shards, Vlm(model=RECIPE.model, sample=SAMPLE), QUIET)  # and nothing of it stays
    assert WindowDataset(shards, "all", recipe.sidecar_key(shards.manifest.preprocess)).row(1)["labels"].max() >= 0
