"""Layers as programs of `torch.compile`: they learn as those that are not, and are saved by the same names."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo import lookup_backend

from omni_cli.errors import UsageError
from omni_cli.models import compiled, qwen_vl
from omni_cli.models.adapters import trainable_count
from omni_cli.recipes.distill import Distill
from omni_cli.recipes.vlm import Vlm
from tests import test_frame_families, test_models
from tests.test_models import make_rows
from tests.test_packing import apart, gradients, mean_loss, stirred

# What inductor of torch 2.13 imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
BATCHES = [[3.2, 115.75, -0.5], [3.2, 5.1, 8.4], [115.75, 3.2], [1.2, -3.1, 101.5, 7.25]]  # m/s; as many digits, tokens
MOST_APART = 1e-5  # in float32


@dataclass
class Counting:
    """A backend that counts the programs that it makes, and how often they run."""

    backend: str
    made: int = 0
    ran: int = 0

    def __call__(self, graph, inputs):
        self.made += 1
        program = lookup_backend(self.backend)(graph, inputs)

        def run(*values):
            self.ran += 1
            return program(*values)

        return run


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def recipe(family, mode="lora", **tune):
    made = test_models.recipe(family, mode) if "qwen" in family else test_frame_families.recipe(family, mode)
    return made.model_copy(update={"tune": made.tune.model_copy(update=tune)})


def pair(vlm, backend, *, recomputed=False):
    """Return a model twice, the second with its layers compiled."""
    models = [stirred(vlm.build(vlm.preprocess()).model).train() for _ in range(2)]
    for model in models if recomputed else ():
        model.activation_checkpointing_enable()
    compiled.compile_layers(models[1], backend)
    return models


def learned(vlm, model, speeds):
    """Return the loss of a batch and all gradients."""
    model.zero_grad()
    loss = mean_loss(vlm, model, make_rows(vlm, speeds))
    loss.backward()
    return float(loss.detach()), gradients(model)


def check_learns_alike(vlm, backend, batches, *, recomputed, most_apart=MOST_APART):
    """Compare a model with its compiled twin over batches packed in several ways; return what was counted."""
    counting = Counting(backend)
    plain, programs = pair(vlm, counting, recomputed=recomputed)
    check_only_training_is_compiled(vlm, plain, programs, batches[0])
    assert counting.ran == 0
    for number, speeds in enumerate(batches):
        before = counting.made, counting.ran
        (expected, expected_gradients), (found, found_gradients) = (learned(vlm, m, speeds) for m in (plain, programs))
        assert found == pytest.approx(expected, rel=most_apart)
        assert apart(found_gradients, expected_gradients) < most_apart
        assert counting.ran > before[1]
        assert counting.made == before[0] or number == 0, "a batch that is packed in another way made new programs"
    return counting


def check_only_training_is_compiled(vlm, plain, programs, speeds):
    """Ask both out of training, and the one that shares its classes with a compiled one in training."""
    rows = make_rows(vlm, speeds)
    with torch.no_grad():
        expected, found = (float(mean_loss(vlm, model.eval(), rows)) for model in (plain, programs))
    assert found == expected
    mean_loss(vlm, plain.train(), rows)
    programs.train()


def test_compiled_layers_learn_as_others_from_batches_packed_in_any_way():
    """Forward, and again in the way back: 2 layers of the decoder of 4 programs, computed twice, and 3 of the tower."""
    counting = check_learns_alike(recipe("qwen2_5_vl"), "aot_eager", BATCHES[::2], recomputed=True)
    assert counting.ran == 2 * (2 * 2 * 4 + 3 * 4)


@pytest.mark.marathon
@pytest.mark.parametrize(
    ("family", "mode", "recomputed"),
    [*product(FAMILIES, ["lora"], [True]), *product(FAMILIES, ["full"], [False])],
)
def test_programs_of_inductor_learn_as_others(family, mode, recomputed):
    check_learns_alike(recipe(family, mode), "inductor", BATCHES, recomputed=recomputed)


def test_a_compiled_model_is_saved_by_the_same_names(tmp_path):
    for mode, name in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        vlm = recipe("qwen3_vl", mode)
        models = pair(vlm, "eager")
        assert list(models[0].state_dict()) == list(models[1].state_dict())
        assert trainable_count(models[0]) == trainable_count(models[1])
        for folder, model in zip(("plain", "compiled"), models, strict=True):
            qwen_vl.save_model(model, vlm.tokenizer(vlm.preprocess()), tmp_path / mode / folder)
        plain, found = (load_file(tmp_path / mode / folder / name) for folder in ("plain", "compiled"))
        assert plain.keys() == found.keys()
        assert all(torch.equal(plain[key], found[key]) for key in plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": "nf4"}, "quantization = nf4"),
        ({"tune": {"mode": "dora"}}, "tune.mode = dora"),
        ({"tune": {"mode": "full"}, "train": {"sharding": "fsdp2", "optimizer": "adamw_torch"}}, "sharding = fsdp2"),
    ],
)
def test_what_is_not_compiled_is_refused(changes, said):
    train = {"compile": True, **changes.get("train", {})}
    with pytest.raises(ValueError, match=f"compile = true does not go with {said}; leave it at false"):
        Vlm(model="tiny:qwen2_5_vl", **{**changes, "train": train})


def test_another_recipe_has_no_such_setting():
    with pytest.raises(ValueError, match="compile"):
        Distill(train={"compile": True})


def test_a_machine_without_a_compiler_is_refused_before_a_model_is_trained(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UsageError, match=r"train.compile = true: torch cannot compile here \(.*\); it needs a C\+\+"):
        compiled.compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("error", [ImportError("ab.main.so: file too short"), AssertionError()])
def test_a_program_that_cannot_be_made_is_one_line(error):
    def fail(*_):
        raise error

    why = str(error) or "AssertionError"
    said = rf"^train.compile = true: a layer could not be compiled \(.*{why}\); .*delete \S+ and run"
    with pytest.raises(compiled.CompilerFailed, match=said), compiled.in_words():
        torch.compile(torch.sin, backend=fail)(torch.zeros(2))


def test_memory_that_runs_out_while_a_layer_is_compiled_is_told_as_that():
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), compiled.in_words():
        torch.compile(torch.sin, backend=fail)(torch.zeros(2))
