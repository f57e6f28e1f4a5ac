"""What a driving net learns from: formulas against independent ones, gradients, masks, sums over micro-batches."""

import math

import pytest
import torch
from scipy.stats import laplace as scipy_laplace
from torch.nn import functional

from omni_cli.models import driving_losses
from omni_cli.models.driving_losses import Summed, VisionLabels
from omni_cli.models.driving_net import Plans, VisionOutputs
from omni_cli.models.driving_units import plan_units

STEPS, PLANS = 5, 3


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_plans(seed: int = 0) -> Plans:
    shape = (STEPS, PLANS, 33, 2)
    return Plans(draw(*shape, seed=seed, scale=5), draw(*shape, seed=seed + 1), draw(STEPS, PLANS, seed=seed + 2))


def some_vision(seed: int = 0) -> VisionOutputs:
    shapes = [(512,), (4, 33, 2), (4, 33, 2), (4,), (2, 33, 2), (2, 33, 2), (3, 4), (3, 4), (3,)]
    drawn = (draw(STEPS, *shape, seed=seed + i, scale=2) for i, shape in enumerate(shapes))
    return VisionOutputs(*(tensor.requires_grad_() for tensor in drawn))


def some_labels(seed: int = 50) -> VisionLabels:
    return VisionLabels(
        known=torch.tensor([True, True, False, True, False]),
        lane_lines_m=draw(STEPS, 4, 33, 2, seed=seed),
        lane_line_prob=torch.sigmoid(draw(STEPS, 4, seed=seed, scale=3)),
        road_edges_m=draw(STEPS, 2, 33, 2, seed=seed),
        lead=draw(STEPS, 3, 4, seed=seed, scale=3),
        lead_prob=torch.sigmoid(draw(STEPS, 3, seed=seed, scale=3)),
    )


PATH, POINTS = draw(STEPS, 33, 2, seed=9, scale=5), torch.tensor([33, 10, 0, 1, 32])


def mean_plan_loss(plans: Plans) -> torch.Tensor:
    losses = driving_losses.plan_losses(plans, PATH, POINTS, beta=0.0)
    return (losses["plan"].total + losses["plan_choice"].total) / losses["plan"].count


def test_laplace_is_scipys() -> None:
    mean, log_scale, target = draw(50), draw(50, seed=1), draw(50, seed=2, scale=4)
    expected = -scipy_laplace.logpdf(target.numpy(), loc=mean.numpy(), scale=log_scale.exp().numpy())
    found = driving_losses.laplace_nll(mean, log_scale, target)
    assert torch.allclose(found, torch.from_numpy(expected), rtol=1e-12)
    clipped = driving_losses.laplace_nll(mean, torch.full_like(mean, 12.0), target)
    assert torch.equal(clipped, driving_losses.laplace_nll(mean, torch.full_like(mean, 11.0), target))


def test_plan_losses_are_a_loop_over_steps() -> None:
    plans = some_plans()
    nll, choice = 0.0, 0.0
    for step, points in enumerate(POINTS.tolist()):
        distances = [
            math.fsum(math.dist(plans.mean_m[step, m, i], PATH[step, i]) for i in range(points)) / max(points, 1)
            for m in range(PLANS)
        ]
        best = distances.index(min(distances))
        for i in range(points):
            for axis in range(2):
                mean, log_scale = plans.mean_m[step, best, i, axis], plans.log_scale[step, best, i, axis]
                nll += float(abs(mean - PATH[step, i, axis]) / log_scale.exp() + math.log(2) + log_scale)
        if points:
            choice += float(torch.logsumexp(plans.logit[step], 0) - plans.logit[step, best])
    losses = driving_losses.plan_losses(plans, PATH, POINTS, beta=0.0)
    assert losses["plan"].total.item() == pytest.approx(nll)
    assert losses["plan_choice"].total.item() == pytest.approx(choice)
    assert int(losses["plan"].count) == int(losses["plan_choice"].count) == 4


def test_what_lies_behind_the_end_of_a_path_is_not_looked_at() -> None:
    plans = Plans(*(tensor.requires_grad_() for tensor in some_plans()))
    beyond = PATH.clone()
    beyond[~driving_losses.path_mask(POINTS)] = float("nan")
    losses = driving_losses.plan_losses(plans, beyond, POINTS)
    assert losses["plan"].total.item() == driving_losses.plan_losses(plans, PATH, POINTS)["plan"].total.item()
    (losses["plan"].total + losses["plan_choice"].total).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in plans)
    assert not plans.mean_m.grad[1, :, 10:].any()
    assert not plans.log_scale.grad[2].any()
    assert not plans.logit.grad[2].any()


def test_gradients_of_the_plan_losses() -> None:
    plans = [tensor.requires_grad_() for tensor in some_plans()]
    assert torch.autograd.gradcheck(lambda *parts: mean_plan_loss(Plans(*parts)), plans)


def test_every_point_of_a_plan_learns_with_the_same_strength() -> None:
    """However sure it is of the near ones: with beta 1 a mean's slope is its sign over the spread alone."""
    plans = Plans(*(tensor[:, :1].clone().requires_grad_() for tensor in some_plans()))
    losses = driving_losses.plan_losses(plans, PATH, torch.full((STEPS,), 33))
    losses["plan"].total.backward()
    spread = plan_units(PATH)[1]
    sign = torch.sign(plans.mean_m[:, 0] - PATH)
    torch.testing.assert_close(plans.mean_m.grad[:, 0], sign / spread)
    error, scale = (plans.mean_m[:, 0] - PATH).abs(), plans.log_scale[:, 0].exp()
    torch.testing.assert_close(plans.log_scale.grad[:, 0], (1 - error / scale) * scale / spread)


def test_the_winner_alone_learns_its_path() -> None:
    """Central differences, by hand: away from ties the winner's slope is autograd's, a loser's is exactly zero."""
    plans = Plans(*(tensor.requires_grad_() for tensor in some_plans()))
    best = driving_losses.winners(plans, PATH, driving_losses.path_mask(POINTS))
    mean_plan_loss(plans).backward()
    step, width = 1, 1e-6
    for plan in range(PLANS):
        for point, axis in ((0, 0), (7, 1), (20, 0)):  # the last one is behind this path's end
            values = []
            for sign in (1, -1):
                moved = plans.mean_m.detach().clone()
                moved[step, plan, point, axis] += sign * width
                values.append(mean_plan_loss(plans._replace(mean_m=moved)).item())
            slope = (values[0] - values[1]) / (2 * width)
            found = float(plans.mean_m.grad[step, plan, point, axis])
            assert found == pytest.approx(slope, abs=1e-6)
            assert (found != 0) == (plan == best[step] and point < 10)


def test_gradients_of_the_single_losses() -> None:
    target, mask = draw(STEPS, 2, 6, seed=3), torch.tensor([[True, False]] * STEPS)
    mean, log_scale = draw(STEPS, 2, 6).requires_grad_(), draw(STEPS, 2, 6, seed=1).requires_grad_()
    logit, probability = draw(STEPS, 2, seed=4).requires_grad_(), torch.sigmoid(draw(STEPS, 2, seed=5))
    check = torch.autograd.gradcheck
    assert check(lambda m: driving_losses.l1(m, target, mask).total, mean)
    assert check(lambda m: driving_losses.huber(m, target, mask).total, mean)
    assert check(lambda s: driving_losses.scale_nll(mean, s, target, mask).total, log_scale)
    assert check(lambda s: driving_losses.laplace_nll(mean.detach(), s, target), log_scale)
    assert check(lambda z: driving_losses.bce(z, probability, mask).total, logit)


def test_single_losses_are_their_formulas() -> None:
    mean, target, mask = (
        draw(3, 2, 6),
        draw(3, 2, 6, seed=1, scale=3),
        torch.tensor([[True, True], [False, True]] * 2)[:3],
    )
    error = (mean - target).abs()
    huber = torch.where(error < 1, error**2 / 2, error - 0.5)
    things = [(step, thing) for step in range(3) for thing in range(2) if mask[step, thing]]
    for found, each in ((driving_losses.l1, error), (driving_losses.huber, huber)):
        summed = found(mean, target, mask)
        assert summed.total.item() == pytest.approx(sum(float(each[thing].mean()) for thing in things))
        assert int(summed.count) == len(things) == 5
    logit, probability = draw(3, 2, seed=2), torch.sigmoid(draw(3, 2, seed=3))
    p = torch.sigmoid(logit)
    expected = -(probability * p.log() + (1 - probability) * (1 - p).log())
    assert driving_losses.bce(logit, probability, mask).total.item() == pytest.approx(float((expected * mask).sum()))


def test_a_scale_settles_at_the_mean_error() -> None:
    """The scale of greatest likelihood is the mean absolute error, and no mean is moved on the way to it."""
    mean, target = draw(1, 1, 400).requires_grad_(), draw(1, 1, 400, seed=1, scale=4)
    log_scale = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = driving_losses.scale_nll(
            mean, log_scale.expand_as(mean), target, torch.ones(1, 1, dtype=torch.bool)
        ).total
        total.backward()
        return total

    optimizer.step(loss)
    assert log_scale.exp().item() == pytest.approx(float((mean - target).detach().abs().mean()), rel=1e-5)
    assert mean.grad is None


def vision_totals(seen: VisionOutputs, labels: VisionLabels) -> dict[str, float]:
    return {name: one.total.item() for name, one in driving_losses.vision_losses(seen, labels).items()}


def test_vision_losses_count_what_has_labels() -> None:
    labels = some_labels()
    losses = driving_losses.vision_losses(some_vision(), labels)
    known, steps = labels.known[:, None], int(labels.known.sum())
    lines, leads = (int((known & (prob > 0.5)).sum()) for prob in (labels.lane_line_prob, labels.lead_prob))
    assert 0 < lines < 4 * steps
    assert 0 < leads < 3 * steps
    counts = {"lane_lines": lines, "lane_line_prob": 4 * steps, "road_edges": 2 * steps, "leads": leads}
    scales = {"lane_lines_scale": lines, "road_edges_scale": 2 * steps, "leads_scale": leads}
    assert {name: int(one.count) for name, one in losses.items()} == {**counts, **scales, "lead_prob": 3 * steps}


def test_what_has_no_label_teaches_nothing() -> None:
    seen, labels = some_vision(), some_labels()
    expected = vision_totals(seen, labels)
    nothing = labels._replace(**{name: tensor.clone() for name, tensor in labels._asdict().items()})
    for tensor in nothing[1:]:
        tensor[~labels.known] = float("nan")
    nothing.lane_lines_m[labels.lane_line_prob < 0.5] = float("nan")
    nothing.lead[..., 3] = float("nan")  # a lead's acceleration is never learned
    nothing.lead[labels.lead_prob < 0.5] = float("nan")
    assert vision_totals(seen, nothing) == expected
    sum(one.total for one in driving_losses.vision_losses(seen, nothing).values()).backward()
    grads = {name: tensor.grad for name, tensor in seen._asdict().items() if name != "features"}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not any(grad[~labels.known].any() for grad in grads.values())
    assert not grads["lead"][..., 3].any()
    assert not grads["lane_lines_m"][labels.lane_line_prob < 0.5].any()
    assert all(grad[labels.known].any() for grad in grads.values())


def test_scale_losses_leave_the_means_alone() -> None:
    seen, labels = some_vision(), some_labels()
    losses = driving_losses.vision_losses(seen, labels)
    sum(one.total for name, one in losses.items() if name.endswith("_scale")).backward()
    assert seen.lane_lines_m.grad is seen.road_edges_m.grad is seen.lead.grad is None
    assert seen.lane_lines_log_scale.grad.any()


def joined(parts: list[dict[str, Summed]]) -> dict[str, tuple[float, int]]:
    return {
        name: (sum(p[name].total.item() for p in parts), sum(int(p[name].count) for p in parts)) for name in parts[0]
    }


@pytest.mark.parametrize("cut", [1, 3])
def test_micro_batches_add_up(cut: int) -> None:
    """A step without a label in one of them changes nothing: sums and counts, never means of means."""
    plans, seen, labels = some_plans(), some_vision(), some_labels()

    def losses(part: slice) -> dict[str, Summed]:
        of_plans = driving_losses.plan_losses(Plans(*(tensor[part] for tensor in plans)), PATH[part], POINTS[part])
        seen_part = VisionOutputs(*(tensor[part] for tensor in seen))
        return of_plans | driving_losses.vision_losses(seen_part, VisionLabels(*(tensor[part] for tensor in labels)))

    whole, parts = joined([losses(slice(None))]), joined([losses(slice(cut)), losses(slice(cut, None))])
    for name, (total, count) in whole.items():
        assert parts[name] == (pytest.approx(total), count)


def test_one_hypothesis_is_plain_regression() -> None:
    plans = Plans(*(tensor[:, :1] for tensor in some_plans()))
    losses = driving_losses.plan_losses(plans, PATH, torch.full((STEPS,), 33), beta=0.0)
    nll = driving_losses.laplace_nll(plans.mean_m[:, 0], plans.log_scale[:, 0], PATH).sum()
    assert losses["plan"].total.item() == pytest.approx(float(nll))
    assert losses["plan_choice"].total.item() == 0


def test_huber_is_torchs() -> None:
    mean, target, mask = draw(4, 3, 3), draw(4, 3, 3, seed=1, scale=3), torch.ones(4, 3, dtype=torch.bool)
    expected = functional.smooth_l1_loss(mean, target, reduction="sum") / 3
    assert driving_losses.huber(mean, target, mask).total.item() == pytest.approx(float(expected))
