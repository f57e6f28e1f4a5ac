"""Models of random weights: the shapes of another, to be measured without a network and never to be used."""

import bitsandbytes
import pytest
import torch

from omni_cli.commands._compose import compose_recipe
from omni_cli.errors import UsageError
from omni_cli.models import families, quantised
from omni_cli.models.flops import step_flops
from omni_cli.models.qwen_vl import empty_model
from omni_cli.profiles import load_profile
from omni_cli.recipes.vlm import Vlm
from omni_cli.stages.train.forecast import forecast
from tests.support.pipeline import tiny_recipe
from tests.support.small_configs import FULL_SIZE, VOCABULARY, small_config, write_small_config

FAMILIES = tuple(FULL_SIZE)


def random_recipe(folder, family, **changes) -> Vlm:
    write_small_config(folder, family)
    values = {"cameras": "1-cam", "mode": "lora", "model": f"random:{folder}", "precision": "bfloat16", **changes}
    return tiny_recipe(family, **values)


def weights_of(recipe) -> dict[str, torch.Tensor]:
    return dict(recipe.load_base(recipe.preprocess()).named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_the_shapes_of_the_model_and_are_drawn_from_the_seed(family, tmp_path):
    recipe = random_recipe(tmp_path, family)
    before = torch.random.get_rng_state()
    drawn, again = weights_of(recipe), weights_of(recipe)
    assert torch.equal(torch.random.get_rng_state(), before)
    published = dict(empty_model(small_config(family)).named_parameters())
    assert {name: weight.shape for name, weight in drawn.items()} == {n: w.shape for n, w in published.items()}
    assert drawn["model.language_model.embed_tokens.weight"].shape[0] == VOCABULARY
    assert {weight.dtype for weight in drawn.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, again[name]) for name, weight in drawn.items())
    other = weights_of(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})}))
    assert not torch.equal(drawn["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_of_4_bits_are_those_of_16_quantised(family, tmp_path):
    recipe = random_recipe(tmp_path, family, quantization="nf4")
    base = recipe.load_base(recipe.preprocess())
    whole = recipe.model_copy(update={"quantization": "none"}).load_base(recipe.preprocess())
    layers = quantised.quantised_layers(base)
    assert len(layers) == 2 * 7
    drawn = dict(whole.named_parameters())
    for name, weight in base.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(weight, drawn[name])
    built = recipe.build(recipe.preprocess())
    rows = recipe.probe_rows(built, recipe.preprocess())
    recipe.loss(built.model, recipe.collate(rows, recipe.preprocess()), recipe.preprocess()).total.backward()
    assert all(torch.isfinite(w.grad).all() for w in built.model.parameters() if w.requires_grad)


def test_stock_trl_learns_from_the_same_4_bits_of_any_seed(tmp_path):
    """The parts of a packed weight that are not its parameters are as much of it."""
    recipe = random_recipe(tmp_path, "qwen2_5_vl", quantization="nf4")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 3})})
    built = recipe.build(recipe.preprocess())
    ours, theirs = (packed_weights(model) for model in (built.model, recipe.stock(built, recipe.preprocess()).model))
    assert len(ours) == 2 * 7
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def packed_weights(model) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    return {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_is_planned_the_same_with_random_weights(family):
    named = Vlm(model=FULL_SIZE[family])
    drawn = Vlm(model=f"random:{FULL_SIZE[family]}")
    assert drawn.preprocess() == named.preprocess()
    assert drawn.size(drawn.preprocess()) == named.size(named.preprocess())
    text = families.model_config(drawn.model).get_text_config()
    assert drawn.outline(drawn.preprocess()).get_base_model().lm_head.weight.shape == (
        text.vocab_size,
        text.hidden_size,
    )


def test_the_memory_of_a_random_model_is_foreseen(tmp_path):
    recipe = random_recipe(tmp_path, "qwen2_5_vl")
    memory = forecast(recipe, recipe.preprocess(), on_gpu=True)
    assert memory is not None
    assert memory.tokens == 2 * len(
        recipe.probe_rows(recipe.build(recipe.preprocess()), recipe.preprocess())[0]["labels"]
    )


def test_a_seven_billion_row_needs_as_many_operations_as_the_rule_says():
    """4 P T of the language model and 6 A T of its adapters, on shapes alone: what `make bench-gpu` divides by."""
    recipe = Vlm(model="random:Qwen/Qwen2.5-VL-7B-Instruct")
    model = recipe.outline(recipe.preprocess())
    layers = model.get_base_model().model.language_model.layers
    matrices = [(name, weight.numel()) for name, weight in layers.named_parameters() if weight.ndim == 2]
    frozen = sum(count for name, count in matrices if "lora" not in name)
    learning = sum(count for name, count in matrices if "lora" in name)
    assert frozen == pytest.approx(6.53e9, rel=0.01)
    assert step_flops(model, [1000], 0, recipe.preprocess().grid).language == 1000 * (4 * frozen + 6 * learning)


def test_random_weights_are_for_measuring_alone():
    """So no run, and nothing that could be pushed, ever comes of them."""
    asked = {"sets": ["model=random:Qwen/Qwen2.5-VL-3B-Instruct"]}
    measured = compose_recipe("vlm", load_profile("cpu-tiny"), **asked, is_to_measure=True)
    assert measured.value.model == "random:Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(UsageError, match=r"its weights are random, nothing made with it is of use; .* else take Qwen/"):
        compose_recipe("vlm", load_profile("cpu-tiny"), **asked)


def test_a_vocabulary_that_the_prompts_do_not_fit_is_refused(tmp_path):
    recipe = tiny_recipe(model=f"random:{write_small_config(tmp_path, 'qwen2_5_vl', vocabulary=100)}")
    with pytest.raises(UsageError, match=r"random:.* has a vocabulary of 100 tokens; the prompts need \d+"):
        recipe.load_base(recipe.preprocess())


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model .*/nowhere: no such folder"):
        tiny_recipe(model=f"random:{tmp_path}/nowhere").preprocess()
