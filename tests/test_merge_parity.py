"""What a merge may cost in nats, what wrong ones cost, and that those are refused."""

import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import entropy
from typer.testing import CliRunner

from omni_cli.commands import app
from omni_cli.errors import OmniError
from omni_cli.files import receipt_path, write_json
from omni_cli.models import tiny
from omni_cli.models.shard_merge import ShardMerge
from omni_cli.recipes.vlm import Vlm
from omni_cli.recipes.vlm.settings import VlmTune
from omni_cli.report import Console
from omni_cli.stages import divergence, memory, models, parity, runs
from omni_cli.stages import merge as merge_stage
from omni_cli.stages.merge import MergeRequest, merge
from tests.support.pipeline import QUIET, tiny_recipe

FAMILIES, MODES, PRECISIONS = ("qwen2_5_vl", "qwen3_vl"), ("lora", "dora"), ("float32", "bfloat16")


def learned(folder: Path, recipe: Vlm, rate: float = 0.05) -> runs.Run:
    """A run whose adapter moves its base as two steps of training at a high rate do (0.03 to 0.1 nats)."""
    built, final = recipe.build(recipe.preprocess()), folder / runs.FINAL
    torch.manual_seed(1)
    for name, weight in built.model.named_parameters():
        if "lora_B" in name:
            weight.data += rate * torch.randn_like(weight)
        elif "magnitude" in name:
            weight.data *= 1 + rate * torch.randn_like(weight)
        elif "modules_to_save" in name:
            weight.data += rate * weight.abs().mean() * torch.randn_like(weight)
    recipe.save(built, final)
    runs.seal_folder(final)
    write_json(folder / runs.LEARNED, runs.Learned(recordings=("r",), windows=1, medians={}).model_dump(mode="json"))
    manifest = runs.RunManifest(
        recipe="vlm",
        profile="test",
        settings=recipe.model_dump(mode="json"),
        preprocess=recipe.preprocess(),
        shards=runs.ShardsUsed(folder=str(folder / "gone"), fingerprint="f", split_rule="hash"),
        base_fingerprint=recipe.base_fingerprint(),
        machine={},
    )
    return runs.Run(folder, manifest)


def a_recipe(family: str, mode: str, precision: str = "float32", **changes) -> Vlm:
    return tiny_recipe(family, cameras="1-cam", mode=mode, precision=precision, **changes)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_keeps_the_logits_in_float32_and_the_probabilities_in_bfloat16(family, mode, precision, tmp_path):
    """pain 14, 16: what issue 5 says is done."""
    recipe = a_recipe(family, mode, precision)
    run = learned(tmp_path / "run", recipe)
    result = merge(recipe, run, MergeRequest(), QUIET)
    found, folder = result["parity"], Path(result["model"])
    assert found["kl_adapter"] > 0.01
    assert found["kl_mean"] <= found["kl_mean_allowed"]
    if precision == "float32":
        assert found["merged"] <= 1e-4
        assert found["kl_mean"] < 1e-10
    else:
        assert found["kl_mean_allowed"] <= 5e-3
        assert 1e-6 < found["kl_mean"] < 5e-5
        assert found["kl_largest"] < 2e-4
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {getattr(torch, precision)}
    assert models.open_model(folder).card.parity == found == runs.verified_folder(folder)["parity"]


def with_merger() -> VlmTune:
    return VlmTune(mode="dora", rank=4, alpha=8, train_merger=True)


def halved(change, weight):
    return (weight + change(weight)) / 2


def doubled(change, weight):
    return 2 * change(weight) - weight


def without_magnitude(change, weight):
    """DoRA taken for LoRA: every output keeps the length that base and product give it."""
    found = change(weight)
    return found if found.ndim == 1 else found * (weight.norm(dim=1) / found.norm(dim=1))[:, None]


WRONG = {"half the scale": halved, "twice the scale": doubled, "no magnitudes": without_magnitude}


LEFT_OUT = {"one layer left out": ".layers.1.", "the merger left out": "merger"}


def spoiled(planned: ShardMerge, how: str) -> ShardMerge:
    if how in LEFT_OUT:
        return replace(
            planned, changes={name: one for name, one in planned.changes.items() if LEFT_OUT[how] not in name}
        )
    return replace(planned, changes={name: partial(WRONG[how], one) for name, one in planned.changes.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_merges_cost_far_more_nats_than_rounding_and_than_is_allowed(family, tmp_path):
    """pain 14: the limit of bfloat16, the widest, tells right merges from wrong ones, with room on either side."""
    recipe = a_recipe(family, "dora", "bfloat16", tune=with_merger())
    run, preprocess = learned(tmp_path / "run", recipe), recipe.preprocess()
    (tmp_path / "work").mkdir()
    planned = recipe.merge_files(preprocess, run.final, tmp_path / "work")
    expected = parity.expect(recipe, run, planned.types, QUIET)
    for how in (None, *WRONG, *LEFT_OUT):
        folder = tmp_path / str(how)
        folder.mkdir()
        (spoiled(planned, how) if how else planned).write(folder, lambda count: None)
        found, _ = parity.compare(recipe, folder, expected, preprocess)
        if how is None:
            assert found.kl.mean < found.kl.mean_allowed / 10
            parity.check_parity(found)
        else:
            if how != "the merger left out":  # which here is one layer: 1.2e-3 nats, as much as is allowed
                assert found.kl.mean > 1.5 * found.kl.mean_allowed, how
            assert found.kl.apart > 100 * found.kl.apart_allowed, how
            with pytest.raises(OmniError, match=r"^the merged files are .*: they are not that merge; nothing is publ"):
                divergence.check_divergence(found.kl)


class WithoutALayer(Vlm):
    """A recipe that forgets a layer."""

    def merge_files(self, preprocess, adapter, work):
        return spoiled(super().merge_files(preprocess, adapter, work), "one layer left out")


class Wrong(Vlm):
    """A recipe that merges with half the scale."""

    how: ClassVar[str] = "half the scale"

    def merge_files(self, preprocess, adapter, work):
        return spoiled(super().merge_files(preprocess, adapter, work), self.how)


def test_what_a_wrong_merge_wrote_is_not_published(tmp_path):
    recipe = a_recipe("qwen3_vl", "lora", "bfloat16")
    run = learned(tmp_path / "run", recipe)
    with pytest.raises(OmniError, match="nothing is published"):
        merge(Wrong(**dict(recipe)), run, MergeRequest(), QUIET)
    assert sorted(path.name for path in run.folder.iterdir()) == ["final", receipt_path(run.final).name, runs.LEARNED]


def test_divergences_are_what_scipy_computes():
    generator = torch.Generator().manual_seed(0)
    logits, others = ([5 * torch.randn(k, 7, generator=generator) for k in (3, 1)] for _ in range(2))
    expected = [
        entropy(one.double().softmax(-1), other.double().softmax(-1), axis=-1)
        for one, other in zip(logits, others, strict=True)
    ]
    assert divergence.divergences(logits, others) == pytest.approx([*expected[0], *expected[1]], rel=1e-9)
    assert max(map(abs, divergence.divergences(logits, logits))) < 1e-15


@pytest.mark.parametrize(
    ("dtype", "adapter", "allowed"),
    [
        (torch.bfloat16, 0.1, 2e-3),  # a fiftieth of what was learned
        (torch.bfloat16, 9.0, 5e-3),  # and no more, however much that was
        (torch.bfloat16, 1e-3, 2e-4),  # nor less than noise may cost
        (torch.bfloat16, 1e-4, 1e-4),  # but never more than was learned
        (torch.float16, 1.0, 1e-4),
        (torch.float32, 1.0, 1e-6),
    ],
)
def test_what_is_allowed_follows_what_was_learned_between_two_limits(dtype, adapter, allowed):
    logits = [torch.zeros(2, 3)]
    found = divergence.measured(an_expected(logits, logits, adapter_kl=adapter, dtype=dtype), logits)
    assert (found.mean_allowed, found.largest_allowed, found.tokens) == (allowed, 50 * allowed, 2)
    assert (found.rounding, found.apart_allowed, found.unrounded_allowed <= 1e-6) == (0.0, 1e-7, True)


def an_expected(logits, rounded, **changes) -> divergence.Expected:
    given = {"adapter_moves": 1.0, "adapter_kl": 0.1, "unrounded_kl": 0.0, "dtype": torch.bfloat16, "windows": 0}
    return divergence.Expected(rows=[{}], logits=logits, rounded=rounded, **{**given, **changes})


def test_three_times_what_rounding_in_memory_costs_is_allowed_and_to_be_that_merge_a_fiftieth():
    logits, rounded = [torch.zeros(2, 3)], [torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.0, 0.3]])]
    found = divergence.measured(an_expected(logits, rounded), rounded)
    assert (found.rounding > 5e-3, found.mean, found.apart) == (True, found.rounding, 0.0)
    assert found.mean_allowed == 3 * found.rounding
    assert found.apart_allowed == pytest.approx(0.02 * found.rounding)
    divergence.check_divergence(found)
    with pytest.raises(
        OmniError, match=r"^the merged files are 1\.0e\+00 nats a token from the adapter merged in memory"
    ):
        divergence.check_divergence(replace(found, apart=1.0))
    with pytest.raises(
        OmniError, match=r"^merged in memory, in float32, the adapter is 2\.0e-02 nats a token from the"
    ):
        divergence.check_divergence(replace(found, unrounded=0.02))


@pytest.mark.parametrize(
    ("spread", "learned_nats", "reason"),
    [
        (
            0.8,
            9.0,
            r"5\.0e-02 \(2\.5e\+00\) are allowed: rounding alone costs .*, where the adapter moves its base by 9",
        ),
        (
            0.3,
            0.008,
            r"8\.0e-03 \(4\.0e-01\) are allowed: rounding alone costs .*, as much as was learned \(8\.0e-03\)",
        ),
    ],
)
def test_a_right_merge_that_rounding_costs_too_much_is_refused_with_what_to_do(spread, learned_nats, reason):
    """However right it is: no more than a twentieth of a nat, nor than was learned."""
    logits, rounded = [torch.zeros(2, 3)], [spread * torch.eye(2, 3)]
    found = divergence.measured(an_expected(logits, rounded, adapter_kl=learned_nats), rounded)
    with pytest.raises(OmniError, match=rf"^the merge is right, but .* {reason}.*; keep the adapter beside its base"):
        divergence.check_divergence(found)


def test_a_right_merge_of_which_rounding_moves_one_logit_as_far_as_the_adapter_is_published():
    """What counts is nats: the largest of many logits is an accident."""
    logits, rounded = [torch.zeros(2, 3)], [0.05 * torch.eye(2, 3)]
    kl = divergence.measured(an_expected(logits, rounded), rounded)
    good = {"merged": 0.05, "allowed": 0.15, "choices_agree": 1.0, "choices_needed": 0.9, "changed_weights": 0}
    parity.check_parity(parity.Parity(adapter_moves=0.04, kl=kl, **good))
    with pytest.raises(OmniError, match="costs as much as was learned; keep the adapter as it is, or train longer"):
        parity.check_parity(parity.Parity(adapter_moves=0.04, **good))


def test_the_help_states_the_rule_that_holds():
    told = " ".join(CliRunner().invoke(app, ["merge", "--help"]).output.replace("│", " ").split())
    (low_32, high_32), (low_16, high_16), (low_b, high_b) = (
        [f"{limit:.0e}".replace("e-0", "e-") for limit in divergence.KL_LIMITS[dtype]]
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    share = f"within {divergence.KL_SHARE:.0%}".replace("%", " %")
    assert f"says what it said: {share} of how far it moves its base, at least {low_32} and at most {high_32}" in told
    assert f"rounded once to its own file's type: {share} of what the rounding costs, at least {low_32}." in told
    assert (
        f"(at least {low_b} and at most {high_b} in bfloat16, {low_16} and {high_16} in float16, {low_32} and {high_32}"
        " in float32), or within three times what the rounding costs, whichever is more; but never further than "
        f"{divergence.KL_CEILING}, nor than the base is. One token may be {divergence.KL_WORST} times as far."
    ) in told
    assert (divergence.ROUNDINGS, [100 * of for of, _ in parity.TOLERANCE.values()]) == (3, [0.01, 1, 5])
    assert "differs by more than 5 % of the largest (bfloat16; 1 % in float16, 0.01 % in float32)" in told


def a_base(folder: Path, family: str, stored_in) -> Path:
    """A base in float32, each tensor of which is stored in a type of its own."""
    plain = a_recipe(family, "full")
    plain.save(plain.build(plain.preprocess()), folder)
    path = folder / "model.safetensors"
    save_file({name: weight.to(stored_in(name)) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("coarse", ["layers.1.", "layers.0.self_attn.q_proj"])
def test_files_of_mixed_types_are_rounded_each_alike_and_wrong_merges_of_them_are_refused(coarse, tmp_path):
    base = a_base(tmp_path / "base", "qwen2_5_vl", lambda name: torch.bfloat16 if coarse in name else torch.float32)
    recipe = a_recipe("qwen2_5_vl", "lora", "bfloat16", model=str(base))
    run, preprocess = learned(tmp_path / "run", recipe, rate=0.002), recipe.preprocess()
    (tmp_path / "work").mkdir()
    planned = recipe.merge_files(preprocess, run.final, tmp_path / "work")
    compared = parity.as_compared(recipe, planned.types)
    expected = parity.expect(compared, run, planned.types, QUIET)
    for scale in (1.0, 0.95, 1.05):
        folder = tmp_path / str(scale)
        folder.mkdir()
        changes = {name: partial(scaled, one, scale=scale) for name, one in planned.changes.items()}
        (planned if scale == 1 else replace(planned, changes=changes)).write(folder, lambda count: None)
        found, _ = parity.compare(compared, folder, expected, preprocess)
        if scale == 1:
            assert found.kl.apart < 1e-12 < found.kl.rounding
            parity.check_parity(found)
        else:
            with pytest.raises(OmniError, match=r"^the merged files are .*: they are not that merge"):
                parity.check_parity(found)


def scaled(change, weight, scale):
    return weight + scale * (change(weight) - weight)


def test_a_base_in_float64_is_merged_and_compared_as_one_in_float32(tmp_path):
    base = a_base(tmp_path / "base", "qwen2_5_vl", lambda name: torch.float64 if "layers" in name else torch.float32)
    recipe = a_recipe("qwen2_5_vl", "lora", model=str(base))
    done = merge(recipe, learned(tmp_path / "run", recipe), MergeRequest(), QUIET)
    assert (done["parity"]["kl_mean"] < 1e-10, done["parity"]["kl_mean_allowed"]) == (True, 1e-6)
    stored = load_file(Path(done["model"]) / "model.safetensors")
    assert {weight.dtype for name, weight in stored.items() if "layers" in name} == {torch.float64}


def test_a_right_merge_that_rounding_costs_dearly_is_published_and_one_without_a_layer_is_not(tmp_path, monkeypatch):
    """Eight layers whose signals grow: rounding costs more nats than a fiftieth of what was learned."""
    monkeypatch.setattr(tiny, "_LAYERS", 8)
    monkeypatch.setattr(tiny, "_INITIAL_STD", 2 * tiny._INITIAL_STD)
    recipe = a_recipe("qwen2_5_vl", "lora", "bfloat16")
    run = learned(tmp_path / "run", recipe, rate=0.007)
    found = merge(recipe, run, MergeRequest(), QUIET)["parity"]
    assert found["kl_mean"] > max(2e-4, 0.02 * found["kl_adapter"])
    assert found["kl_mean"] == pytest.approx(found["kl_rounding"], rel=1e-3)
    assert found["kl_mean_allowed"] == 3 * found["kl_rounding"]
    shutil.rmtree(run.folder / "merged")
    with pytest.raises(OmniError, match=r"^the merged files are .* nothing is published"):
        merge(WithoutALayer(**dict(recipe)), run, MergeRequest(), QUIET)
    assert not (run.folder / "merged").exists()


def test_files_that_are_finer_than_the_recipe_loads_are_compared_as_they_are(tmp_path):
    """A base in float32 that learns in bfloat16: rounding both models as they are read is no part of the merge."""
    base, whole = tmp_path / "base", a_recipe("qwen3_vl", "full")
    whole.save(whole.build(whole.preprocess()), base)
    recipe = a_recipe("qwen3_vl", "lora", "bfloat16", model=str(base))
    found = merge(recipe, learned(tmp_path / "run", recipe), MergeRequest(), QUIET)["parity"]
    assert (found["kl_mean"] < 1e-10, found["kl_mean_allowed"]) == (True, 1e-6)


def test_where_the_windows_of_the_run_are_gone_it_is_said_that_noise_alone_was_compared(tmp_path, capsys):
    recipe = a_recipe("qwen2_5_vl", "lora")
    found = merge(recipe, learned(tmp_path / "run", recipe), MergeRequest(), Console())["parity"]
    said = capsys.readouterr().err
    assert (found["kl_windows"], found["kl_tokens"] > 10) == (0, True)
    assert "comparing on seeded noise alone: the shards that the run learned from are gone or were made anew" in said
    assert "tokens of noise alone\n" in said
    assert f"KL {found['kl_mean']:.1e} nats a token, 1.0e-06 allowed" in said


def test_a_disk_without_room_is_told_before_anything_is_merged(tmp_path, monkeypatch):
    recipe = a_recipe("qwen2_5_vl", "lora")
    run = learned(tmp_path / "run", recipe)
    monkeypatch.setattr(merge_stage, "_BESIDE_BYTES", 1 << 60)
    with pytest.raises(OmniError, match=r"a merged model needs about [\d.]+ GiB, [\d.]+ GiB are free; .* with --out$"):
        merge(recipe, run, MergeRequest(), QUIET)
    assert not (run.folder / "merged").exists()


def test_a_machine_with_less_memory_than_the_comparison_takes_is_warned_of_before_it_starts(
    tmp_path, monkeypatch, capsys
):
    recipe = a_recipe("qwen2_5_vl", "lora", "bfloat16")
    run = learned(tmp_path / "run", recipe)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1 << 20)
    merge(recipe, run, MergeRequest(), Console())
    told = next(line for line in capsys.readouterr().err.splitlines() if "at its peak" in line)
    assert "comparing the merged model with the adapted one, of 0.00 GiB of weights, takes about 0.01 GiB" in told
    assert "this machine has 0.00 GiB" in told


def test_the_memory_of_a_comparison_is_once_the_files_and_one_model_in_float32(monkeypatch):
    planned = SimpleNamespace(total_bytes=1000, types={"a": torch.bfloat16})
    monkeypatch.setattr(models, "best_device", lambda: "cpu")
    assert parity.peak_bytes(planned) == pytest.approx(3400)
    monkeypatch.setattr(models, "best_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10_000, 10_000))
    assert parity.peak_bytes(planned) == 1000  # it is moved to the GPU as it is mapped
    help_text = " ".join(CliRunner().invoke(app, ["merge", "--help"]).output.replace("│", " ").split())
    assert "about 3.4 times the bytes of a 16-bit base's files in memory" in help_text


@pytest.mark.marathon
@pytest.mark.parametrize("mode", MODES)
def test_a_merge_takes_no_more_memory_than_is_foretold(mode, tmp_path):
    """Nor far less: about 3.1 times the files, of which one is the files as they are mapped."""
    command = [sys.executable, "-m", "tests.support.merge_memory", str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    grown, foretold = map(int, done.stdout.split()[-2:])
    assert 0.8 * foretold < grown <= foretold


def test_what_learned_over_4_bits_is_merged_into_the_base_that_they_were_made_from(tmp_path, capsys):
    """pain 14: and it is said how far the two are apart, or that nobody looked."""
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    plain = a_recipe("qwen3_vl", "full")
    plain.save(plain.build(plain.preprocess()), base)
    recipe = a_recipe("qwen3_vl", "dora", "float32", model=str(base), quantization="nf4")
    run = learned(tmp_path / "run", recipe)
    folder = Path(merge(recipe, run, MergeRequest(), Console())["model"])
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert len(changed) == 2 * 4
    assert "quantization_config" not in (folder / "config.json").read_text()
    said = capsys.readouterr().err
    told = next(line for line in said.splitlines() if line.startswith("the model that learned (nf4) is"))
    assert 1e-5 < float(told.split()[6]) < 0.2


def test_a_magnitude_that_is_not_a_number_is_named(tmp_path):
    recipe = a_recipe("qwen3_vl", "dora")
    run = learned(tmp_path / "run", recipe)
    path = run.final / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.self_attn.v_proj.lora_magnitude_vector"))
    weights[name][3] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(OmniError, match=r"layers\.1\.self_attn\.v_proj\.weight cannot be merged: NaNs detected"):
        merge(recipe, run, MergeRequest(), QUIET)
    assert not (run.folder / "merged").exists()
