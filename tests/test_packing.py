"""Rows in one flat row: equal to rows alone, in the loss and in every gradient, and to a padded forward of the library.

Pain 3 of facts/vlm-finetuning.md (packing leaks between samples), with pains 1, 4 and 11.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from omni_cli.errors import DataError, OmniError
from omni_cli.models import adapters, packing, qwen_vl
from omni_cli.recipes.vlm import Vlm, packed
from omni_cli.report import Console
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.shards import open_shards
from omni_cli.stages.etl import EtlRequest, etl
from omni_cli.stages.train import TrainRequest, train
from omni_cli.stages.train.fit import make_trainer
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic
from tests.test_models import FAMILIES, librarys_own, make_rows, recipe

SAME_LENGTH, MIXED = [3.2, 5.1, 8.4], [3.2, 115.75, -0.5]
EIGHT_SPEEDS = [3.2, 115.75, -0.5, 7.25, 12.0, 21.5, 0.0, 9.75]
IGNORED = -100


def lengths(rows):
    return [len(row["input_ids"]) for row in rows]


def padded_loss(library, rows, preprocess):
    """What any user of transformers would do: pad on the right, mask, all logits, mean over labelled tokens."""
    longest = max(lengths(rows))

    def pad(name, value):
        return torch.stack(
            [torch.nn.functional.pad(row[name], (0, longest - row[name].shape[-1]), value=value) for row in rows]
        )

    labels = pad("labels", IGNORED)
    logits = library(
        input_ids=pad("input_ids", 0),
        attention_mask=(torch.arange(longest) < torch.tensor(lengths(rows))[:, None]).long(),
        position_ids=pad("position_ids", 0)[:, 1:].transpose(0, 1),
        pixel_values_videos=preprocess.pixel_values(torch.stack([row["pictures"] for row in rows])),
        video_grid_thw=torch.tensor([preprocess.grid] * len(rows)),
        use_cache=False,
    ).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model):
    names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight.grad.double() for name, weight in names.items()}


def apart(ones, others):
    """Return the distance of two sets of gradients as a share of their length."""
    assert ones.keys() == others.keys()
    both = [torch.cat([grad.flatten() for _, grad in sorted(each.items())]) for each in (ones, others)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def mean_loss(vlm, model, rows):
    loss = vlm.loss(model, vlm.collate(rows, vlm.preprocess()), vlm.preprocess())
    return loss.total / loss.count


def stirred(model):
    """Draw an adapter's weights from one seed, B's too, which begin as zero."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    return model


@pytest.mark.parametrize("speeds", [SAME_LENGTH, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_row_learns_as_the_librarys_padded_batch(family, mode, speeds):
    """Pain 3, and 11: loss and gradients of packed rows are those of a padded batch in the library's own model."""
    vlm, full = recipe(family, mode), recipe(family)
    rows, preprocess = make_rows(vlm, speeds), vlm.preprocess()
    assert len(set(lengths(rows))) == (1 if speeds == SAME_LENGTH else 3)
    library = librarys_own(full.build(preprocess).model)
    if mode == "lora":
        library = stirred(adapters.attach(library, vlm._adapter()))
    model = stirred(vlm.build(preprocess).model)
    expected = padded_loss(library, rows, preprocess)
    found = mean_loss(vlm, model, rows)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    found.backward()
    assert apart(gradients(model), gradients(library)) < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_row_learns_as_padded_under_autocast(family):
    vlm = recipe(family, "lora")
    rows, preprocess = make_rows(vlm, MIXED), vlm.preprocess()
    library = stirred(adapters.attach(librarys_own(recipe(family).build(preprocess).model), vlm._adapter()))
    model = stirred(vlm.build(preprocess).model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = padded_loss(library, rows, preprocess), mean_loss(vlm, model, rows)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    expected.backward()
    found.backward()
    assert apart(gradients(model), gradients(library)) < 0.05


@pytest.mark.parametrize("attention", [packing.BY_SAMPLE, "sdpa", "eager"])
@pytest.mark.parametrize("speeds", [SAME_LENGTH, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_rows_alone(family, speeds, attention):
    """Pain 3: under our attention, and under the library's own where somebody chose that."""
    vlm = recipe(family)
    rows, preprocess, model = make_rows(vlm, speeds), vlm.preprocess(), vlm.build(vlm.preprocess()).model.eval()
    model.model.language_model.config._attn_implementation = attention
    with torch.no_grad():
        together = packed.answers(vlm, model, preprocess, rows)
        alone = torch.cat([packed.answers(vlm, model, preprocess, [row]) for row in rows])
    assert together.shape == (
        sum(int((row["labels"] != IGNORED).sum()) for row in rows),
        model.config.text_config.vocab_size,
    )
    assert float((together - alone).abs().max()) < 3e-6 * float(alone.abs().max())


def test_no_gradient_reaches_another_row():
    """Pain 3: the loss of one row moves nothing in the embeddings of its neighbours."""
    vlm = recipe("qwen2_5_vl")
    rows, preprocess, model = make_rows(vlm, MIXED), vlm.preprocess(), vlm.build(vlm.preprocess()).model
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits = vlm.outputs(model, vlm.collate(rows, preprocess), preprocess)
    seen[0].retain_grad()
    ends = torch.tensor([int((row["labels"] != IGNORED).sum()) for row in rows]).cumsum(0)
    logits[ends[0] : ends[1]].square().sum().backward()
    moved = seen[0].grad[0].abs().amax(-1) > 0
    first, second, _ = lengths(rows)
    assert not moved[:first].any()
    assert moved[first : first + second - 1].all()
    assert not moved[first + second :].any()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_are_computed_again_row_by_row(family, reentrant):
    """Pains 3 and 4: what tells rows apart is there when a layer is computed again; the frozen tower stays outside."""
    vlm = recipe(family, "lora")
    rows, preprocess, model = make_rows(vlm, MIXED), vlm.preprocess(), stirred(vlm.build(vlm.preprocess()).model)
    mean_loss(vlm, model.train(), rows).backward()
    plain = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()  # as the Trainer does
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    model.base_model.model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    mean_loss(vlm, model, rows).backward()
    assert len(runs) == 2
    assert apart(gradients(model), plain) < 1e-6
    pictures = vlm.collate(rows, preprocess)["pictures"]
    assert not packed.features(model, pictures, preprocess, is_blind=False).pooler_output[0].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_where_only_the_merger_learns_the_blocks_below_stay_outside_autograd(family):
    """Pain 4: the library lets embedded patches ask for gradients where layers are checkpointed."""
    plain = recipe(family, "lora")
    vlm = plain.model_copy(update={"tune": plain.tune.model_copy(update={"train_merger": True})})
    rows, preprocess, model = make_rows(vlm, SAME_LENGTH), vlm.preprocess(), vlm.build(vlm.preprocess()).model
    mean_loss(vlm, model.train(), rows).backward()
    expected = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    visual, seen = qwen_vl.base_of(model).model.visual, []
    for block in visual.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    mean_loss(vlm, model, rows).backward()
    assert seen == [False] * len(visual.blocks)
    assert apart(gradients(model), expected) < 1e-6
    assert sum("merger" in name for name in expected) >= 4
    pictures = vlm.collate(rows, preprocess)["pictures"]
    assert packed.features(model, pictures, preprocess, is_blind=False).pooler_output[0].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_librarys_own(family):
    """Answers of a batch padded on the left, with our attention in force and with the library's."""
    vlm = recipe(family)
    rows, preprocess, built = make_rows(vlm, MIXED), vlm.preprocess(), vlm.build(vlm.preprocess())
    built.model.eval()
    ours = [answer.text for answer in vlm.predict(built, rows, preprocess)]
    with packing.by_library(built.model):
        assert [answer.text for answer in vlm.predict(built, rows, preprocess)] == ours
    assert built.model.model.language_model.config._attn_implementation == packing.BY_SAMPLE


def test_without_lengths_our_attention_is_the_librarys():
    vlm = recipe("qwen2_5_vl")
    (row,), model = make_rows(vlm, [3.2]), vlm.build(vlm.preprocess()).model.eval()
    ids = torch.stack([row["input_ids"], row["input_ids"].flip(0)])
    ids[ids == model.config.video_token_id] = 5
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        with packing.by_library(model):
            theirs = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours, theirs)


def test_our_marks_fit_no_attention_but_ours():
    """An empty mask in four dimensions: with another attention it is an error, never a leak."""
    vlm = recipe("qwen2_5_vl")
    rows, preprocess, model = make_rows(vlm, MIXED), vlm.preprocess(), vlm.build(vlm.preprocess()).model
    batch = vlm.collate(rows, preprocess)
    told = packing.told_apart(model, batch)
    assert told["sample_lengths"] == tuple(lengths(rows))
    with packing.by_library(model), pytest.raises(RuntimeError):
        model(input_ids=batch["input_ids"], **told)


def test_a_saved_model_does_not_name_our_attention(tmp_path):
    vlm = recipe("qwen2_5_vl")
    vlm.save(vlm.build(vlm.preprocess()), tmp_path)
    assert "omni" not in (tmp_path / "config.json").read_text()


def test_sliding_windows_are_refused():
    vlm = recipe("qwen2_5_vl")
    model = vlm.build(vlm.preprocess()).model
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(OmniError, match="attends in sliding windows, which omni cannot train"):
        packing.attend_by_sample(model)


def test_the_flat_row_is_what_it_says():
    rows = make_rows(recipe("qwen2_5_vl"), MIXED)
    batch = packing.pack(rows)
    assert batch["position_ids"].shape == (4, 1, sum(lengths(rows)))
    assert (batch["cu_seq_lens"].dtype, batch["cu_seq_lens"][0]) == (torch.int32, 0)
    assert batch["cu_seq_lens"].diff().tolist() == lengths(rows)
    for row, end, length in zip(rows, batch["cu_seq_lens"][1:].tolist(), lengths(rows), strict=True):
        place = slice(end - length, end)
        assert torch.equal(batch["input_ids"][0, place], row["input_ids"])
        assert torch.equal(batch["labels"][0, place], row["labels"])
        assert torch.equal(batch["position_ids"][1:, 0, place], row["position_ids"][1:])
        assert batch["position_ids"][0, 0, place].tolist() == list(range(length))


def test_a_label_that_the_row_before_would_predict_is_refused():
    rows = make_rows(recipe("qwen2_5_vl"), SAME_LENGTH)
    rows[1] = {**rows[1], "labels": rows[1]["input_ids"].clone()}
    with pytest.raises(DataError, match="the first token of a sample has a label"):
        packing.pack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_counted_window_by_window(family):
    """Pain 1: one too few here and one too many there add up, and the library would not see it."""
    vlm = recipe(family)
    rows, preprocess = make_rows(vlm, SAME_LENGTH), vlm.preprocess()
    token = vlm.build(preprocess).model.config.video_token_id
    short, long = rows[1]["input_ids"].clone(), rows[2]["input_ids"].clone()
    short[(short == token).nonzero()[0]] = 5
    long[-1] = token
    rows[1] = {**rows[1], "input_ids": short, "recording": "drive-7", "window": 3}
    rows[2] = {**rows[2], "input_ids": long}
    tokens = preprocess.visual_tokens
    with pytest.raises(DataError, match=f"window 3 of drive-7 has {tokens - 1} video tokens, .* {tokens}; nothing is"):
        vlm.collate(rows, preprocess)
    with pytest.raises(DataError, match=f"a window of no shard has {tokens + 1} video tokens"):
        vlm.collate(rows[2:], preprocess)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write_synthetic(folder / "data")
    recipe = tiny_recipe(mode="lora")
    return recipe, Path(etl(recipe, EtlRequest(folder / "data", out=folder / "shards", workers=0), QUIET)["shards"])


def leaking(_module, query, key, value, _mask, *, sample_lengths=None, scaling=None, **_):
    """An attention that ignores where a row ends, as the library's does where it is not told in the one right form."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_whose_rows_see_each_other_is_stopped_before_its_first_step(cut, precision, tmp_path, monkeypatch):
    """Pain 3: said in one line at the start of every run, on its own model and windows."""
    recipe = cut[0].model_copy(update={"precision": precision})
    requests = [TrainRequest(cut[1], cut[1], tmp_path, name, "test") for name in ("good", "bad")]
    console = Heard()
    train(recipe, requests[0], console)
    (said,) = [line for line in console.lines if "as rows alone" in line]
    assert said.startswith("packed rows answer as rows alone: largest logit difference")
    monkeypatch.setitem(AttentionInterface._global_mapping, packing.BY_SAMPLE, leaking)
    with pytest.raises(OmniError, match=r"packed rows do not answer as rows alone: .*: nothing is learned from"):
        train(recipe, requests[1], console)
    assert not list(tmp_path.glob("bad/checkpoints/checkpoint-*"))


class Heard(Console):
    """A console that keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_the_trainer_is_told_true_numbers_of_packed_rows(cut, tmp_path):
    """The count of labels is that of padded rows, and no metric of TRL's, which would read shapes, is logged."""
    recipe, shards = cut
    dataset = WindowDataset(open_shards(shards), "train", recipe.sidecar_key(recipe.preprocess()))
    trainer = make_trainer(tmp_path, recipe, recipe.build(dataset.preprocess), dataset, 2)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = sum(int((label != IGNORED).sum()) for label in batch["labels"])
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == expected
    trainer.args.logging_steps = 1
    trainer.train()
    assert len(trainer.state.log_history) >= 2
    assert not any("num_tokens" in line for line in trainer.state.log_history)


def lengthened(row, tokens):
    """A row with random text before its answer, until it has so many tokens."""
    prompt, missing = int((row["labels"] == IGNORED).sum()), tokens - len(row["input_ids"])
    text = torch.randint(5, 300, (missing,), generator=torch.Generator().manual_seed(tokens))
    last = int(row["position_ids"][1:, prompt - 1].max())
    places = torch.arange(missing + len(row["labels"]) - prompt)
    rope = torch.cat([row["position_ids"][1:, :prompt], (last + 1 + places).expand(3, -1)], dim=1)
    return {
        "input_ids": torch.cat([row["input_ids"][:prompt], text, row["input_ids"][prompt:]]),
        "labels": torch.cat([row["labels"][:prompt], torch.full((missing,), IGNORED), row["labels"][prompt:]]),
        "position_ids": torch.cat([torch.arange(tokens)[None], rope]),
        "pictures": row["pictures"],
    }


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.numbers = max([self.numbers, *(one.untyped_storage().nbytes() // one.itemsize for one in made)])
        return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [8192, pytest.param(65_536, marks=pytest.mark.marathon)])
def test_a_long_packed_row_is_learned_from_without_a_square_of_memory(family, tokens):
    """Pain 3: a mask alone would take tokens ** 2 bytes, 4 GB in the longer case; the shorter one shows the same."""
    vlm = recipe(family, "lora")
    rows = [lengthened(row, 512) for row in make_rows(vlm, [3.2, 115.75])] * (tokens // 1024)
    model = stirred(vlm.build(vlm.preprocess()).model)
    with Largest() as largest:
        loss = mean_loss(vlm, model, rows)
        loss.backward()
    assert sum(lengths(rows)) == tokens
    assert torch.isfinite(loss)
    adapters.check_gradients(model)
    assert largest.numbers < tokens**2 // 8


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_64_frames_are_learned_from(family):
    sample = {"cameras": "1-cam", "window": 64, "canvas_px": 112}
    vlm = Vlm(model=f"tiny:{family}", precision="float32", sample=sample, tune={"mode": "lora", "rank": 4})
    rows, model = make_rows(vlm, MIXED), stirred(vlm.build(vlm.preprocess()).model)
    loss = mean_loss(vlm, model, rows)
    loss.backward()
    assert torch.isfinite(loss)
    adapters.check_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_samples_are_learned_to_exact_answers(family):
    """The prompts are all the same: only the pictures tell which answer is asked for."""
    vlm = recipe(family)
    rows, preprocess, built = make_rows(vlm, EIGHT_SPEEDS), vlm.preprocess(), vlm.build(vlm.preprocess())
    optimizer = torch.optim.AdamW(built.model.train().parameters(), lr=2e-3)
    for _ in range(28):
        optimizer.zero_grad()
        mean_loss(vlm, built.model, rows).backward()
        optimizer.step()
    answers = [row["input_ids"][row["labels"] != IGNORED] for row in rows]
    expected = [built.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    built.model.eval()
    assert len(set(expected)) == len({bytes(row["pictures"].numpy().tobytes()) for row in rows}) == 8
    assert [answer.text for answer in vlm.predict(built, rows, preprocess)] == expected
    held = vlm.predict(vlm.held_to_format(built, preprocess), rows, preprocess)
    assert [(answer.text, answer.held.off_grammar) for answer in held] == [(text, 0) for text in expected]
