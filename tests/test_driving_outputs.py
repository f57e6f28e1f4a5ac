"""The output parser against scipy, torch and vectors built from known means and scales."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

from omni_cli.errors import DataError
from omni_cli.formats.driving_model import (
    MEAN_SHAPES,
    POLICY_SLICES,
    POLICY_WIDTH,
    VISION_SLICES,
    VISION_WIDTH,
    read_metadata,
)
from omni_cli.models.driving_outputs import parse_outputs, safe_exp, sigmoid, softmax

RNG = np.random.default_rng(7)


def random_raw(*shape, scale=3.0):
    return RNG.normal(0, scale, shape).astype(np.float32)


def test_the_elementary_functions_agree_with_scipy_and_torch():
    x = random_raw(5, 40)
    np.testing.assert_allclose(sigmoid(x), special.expit(x), rtol=1e-5)
    np.testing.assert_allclose(softmax(x, axis=0), torch.softmax(torch.from_numpy(x), 0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(safe_exp(x), np.exp(x.astype(np.float64)), rtol=1e-6)


def test_nothing_overflows_and_a_scale_fits_float16():
    x = np.array([[-1e4, 0, 12.0, 1e4]], np.float32)
    assert safe_exp(x).max() == pytest.approx(math.exp(11))
    assert np.float16(safe_exp(x).max()) < np.inf
    assert np.isfinite(sigmoid(x)).all()
    np.testing.assert_allclose(softmax(x), [[0, 0, 0, 1]])


def test_a_vision_vector_gives_back_what_it_was_built_from():
    truth = {name: random_raw(3, *MEAN_SHAPES[name]) for name in ("lane_lines", "road_edges", "lead", "pose")}
    stds = {name: np.exp(random_raw(3, *MEAN_SHAPES[name], scale=1.0)) for name in truth}
    raw = random_raw(3, VISION_WIDTH)
    for name, mean in truth.items():
        raw[:, VISION_SLICES[name]] = np.hstack([mean.reshape(3, -1), np.log(stds[name]).reshape(3, -1)])
    prob = np.array([[0.9, 0.1, 0.5, 0.7]] * 3)
    raw[:, VISION_SLICES["lane_lines_prob"]][:, 1::2] = special.logit(prob)
    raw[:, VISION_SLICES["lead_prob"]] = special.logit([0.2, 0.4, 0.6])
    features = raw[:, VISION_SLICES["hidden_state"]].copy()

    found = parse_outputs(raw, VISION_SLICES)
    for name, mean in truth.items():
        np.testing.assert_array_equal(found[name], mean)
        np.testing.assert_allclose(found[f"{name}_std"], stds[name], rtol=1e-5)
    np.testing.assert_allclose(found["lane_lines_prob"], prob, rtol=1e-5)
    np.testing.assert_allclose(found["lead_prob"], [[0.2, 0.4, 0.6]] * 3, rtol=1e-5)
    np.testing.assert_array_equal(found["hidden_state"], features)
    assert found["desire_pred"].shape == (3, 4, 8)
    np.testing.assert_allclose(found["desire_pred"].sum(axis=-1), 1, rtol=1e-5)
    assert found["meta"].shape == (3, 55)
    assert found["road_transform"].shape == (3, 6)
    assert found["wide_from_device_euler"].shape == (3, 3)
    assert "pad" not in found


def test_one_plan_and_its_scale_are_those_of_a_normal_distribution():
    mean, std = random_raw(2, 33, 15), np.exp(random_raw(2, 33, 15, scale=0.5))
    raw = random_raw(2, POLICY_WIDTH)
    raw[:, :990] = np.hstack([mean.reshape(2, -1), np.log(std).reshape(2, -1)])
    found = parse_outputs(raw, POLICY_SLICES)
    quantile = stats.norm(mean, std).ppf(0.8)
    np.testing.assert_allclose(found["plan"] + found["plan_std"] * stats.norm.ppf(0.8), quantile, rtol=1e-4, atol=1e-4)
    expected = torch.softmax(torch.from_numpy(raw[:, 990:998]), -1).numpy()
    np.testing.assert_allclose(found["desire_state"], expected, rtol=1e-5)


def test_of_five_plans_the_likeliest_is_taken():
    means, log_stds, scores = random_raw(4, 5, 33, 15), random_raw(4, 5, 33, 15, scale=1.0), random_raw(4, 5)
    pieces = [[means[b, k].ravel(), log_stds[b, k].ravel(), scores[b, k : k + 1]] for b in range(4) for k in range(5)]
    raw = np.concatenate([np.concatenate(piece) for piece in pieces]).reshape(4, 4955)
    found = parse_outputs(raw, {"plan": slice(0, 4955), "pad": slice(-3, None)})
    weights = torch.softmax(torch.from_numpy(scores), 1).numpy()
    np.testing.assert_allclose(found["plan_weights"][:, :, 0], weights, rtol=1e-5)
    np.testing.assert_array_equal(found["plan_hypotheses"], means)
    assert len(set(scores.argmax(axis=1))) > 1  # more than one hypothesis wins somewhere
    for b in range(4):
        winner = max(range(5), key=lambda k: scores[b, k])
        np.testing.assert_array_equal(found["plan"][b], means[b, winner])
        np.testing.assert_allclose(found["plan_std"][b], np.exp(log_stds[b, winner]), rtol=1e-5)


def test_each_of_three_leads_selects_its_own_of_two_hypotheses():
    means, log_stds, scores = random_raw(6, 2, 6, 4), random_raw(6, 2, 6, 4, scale=1.0), random_raw(6, 2, 3)
    rows = [
        np.concatenate([part[b, k].ravel() for part in (means, log_stds, scores)]) for b in range(6) for k in (0, 1)
    ]
    found = parse_outputs(np.concatenate(rows).reshape(6, 102), {"lead": slice(0, 102)})
    assert found["lead"].shape == (6, 3, 6, 4)
    for b in range(6):
        for lead in range(3):
            winner = 0 if scores[b, 0, lead] > scores[b, 1, lead] else 1
            np.testing.assert_array_equal(found["lead"][b, lead], means[b, winner])
            np.testing.assert_allclose(found["lead_std"][b, lead], np.exp(log_stds[b, winner]), rtol=1e-5)


def test_float16_is_read_as_float32():
    raw = random_raw(1, POLICY_WIDTH).astype(np.float16)
    found = parse_outputs(raw, POLICY_SLICES)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found["plan"].ravel(), raw[0, :495].astype(np.float32))


def test_a_part_of_an_unknown_width_is_refused():
    with pytest.raises(DataError, match=r"'plan' is 1980 wide in a vector of 2000, expected 990 or 4955"):
        parse_outputs(random_raw(1, 2000), {"plan": slice(0, 1980)})
    with pytest.raises(DataError, match="'hidden_state' is 436 wide in a vector of 1500, expected 512"):
        parse_outputs(random_raw(1, 1500), VISION_SLICES)  # a shorter vector cuts the last slice


@pytest.mark.real_data
def test_the_released_models_are_understood_in_full():
    if "OMNI_REAL_DATA" not in os.environ:
        pytest.skip("OMNI_REAL_DATA is not set")
    folder = Path(os.environ["OMNI_REAL_DATA"]) / "openpilot_model_metadata"
    seen = {"driving_vision": 0, "driving_policy": 0}
    for path in sorted(folder.glob("*driving_*.pkl")):
        metadata = read_metadata(path)
        width = metadata.output_shapes["outputs"][1]
        found = parse_outputs(random_raw(2, width), metadata.output_slices)
        assert set(metadata.output_slices) - {"pad"} <= set(found)
        covered = sum(part.stop - part.start for name, part in metadata.output_slices.items() if name != "pad")
        assert width - covered == {1576: 0, 1536: 2, 1000: 2, 4968: 3}[width]
        five = "v0.10.0" in path.name
        assert ("plan_hypotheses" in found) == (five and "policy" in path.name)
        assert ("lead_hypotheses" in found) == (five and "vision" in path.name)
        seen[path.stem.split("_", 2)[2].removesuffix("_metadata")] += 1
    assert min(seen.values()) >= 4
