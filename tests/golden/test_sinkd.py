"""SinKD: golden numbers of the official code, its limits and bounds, and what its official code gets wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from transport import cost_of, examples, language_rows, official

from llmkd.divergences import DIVERGENCES
from llmkd.objectives import Mix, SinKD
from llmkd.objectives.sinkhorn import sinkhorn
from llmkd.rows import DenseRows
from llmkd.types import Outputs

Z_S = torch.tensor([[2, 0, -1], [0.5, 0.2, 0], [-1, 1, 0]], dtype=torch.float64)
Z_T = torch.tensor([[3, 0, -2], [0, 1, 0], [-2, 2, 1]], dtype=torch.float64)
W = torch.tensor(
    [[0.27525097, 0.70892620, 1.10167228], [0.77459766, 0.25155267, 0.60232559], [1.15966697, 0.17548979, 0.21725629]],
    dtype=torch.float64,
)
PLAN = torch.tensor(
    [[0.99102776, 0.00633397, 0.00088736], [0.00895308, 0.81760905, 0.17428427], [0.00001916, 0.17605698, 0.82482837]],
    dtype=torch.float64,
)
GRADIENTS = {
    "plan": [[-0.248337, 0.154580, 0.093757], [0.128156, -0.233110, 0.104954], [0.166006, -0.103332, -0.062674]],
    "envelope": [[-0.229699, 0.142978, 0.086721], [0.139914, -0.200098, 0.060184], [0.098356, -0.061222, -0.037133]],
}


# Golden numbers


def test_the_plan_of_the_golden_batch():
    cost = cost_of(Z_S, Z_T)
    torch.testing.assert_close(cost, W, rtol=0, atol=1e-8)
    plan = sinkhorn(cost, 0.1, 20)
    torch.testing.assert_close(plan, PLAN, rtol=0, atol=1e-8)
    torch.testing.assert_close(plan.sum(0), torch.ones(3).double(), rtol=0, atol=1e-12)
    rows = torch.tensor([0.99824909, 1.00084639, 1.00090451], dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1), rows, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": "sum"}, 0.80594948),
        ({}, 0.26864983),
        ({"granularity": "sample", "normalize": "sum"}, 0.74405994),
        ({"granularity": "sample"}, 0.74405994 / 3),
        ({"granularity": "sequence", "normalize": "sum"}, 0.74405994),
        ({"normalize": "sum", "epsilon": 1e6}, 1.75557918),
        ({"normalize": "sum", "epsilon": 0.01}, 0.74215909),
    ],
)
def test_golden_values(options, expected):
    assert examples(Z_S, Z_T, **options).item() == pytest.approx(expected, abs=1e-6)


def test_the_official_value_is_the_sum_times_a_thousandth():
    objective = Mix([SinKD(normalize="sum")], weights=[0.001])
    batch = {"labels": torch.zeros(3, dtype=torch.int64)}
    total = objective(Outputs(rows=DenseRows(Z_S)), Outputs(rows=DenseRows(Z_T)), batch)["total"]
    assert (total / 3).item() == pytest.approx(0.00080595, abs=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_golden_gradients(gradient):
    z_s = Z_S.clone().requires_grad_()
    examples(z_s, Z_T, normalize="sum", gradient=gradient).backward()
    torch.testing.assert_close(z_s.grad, torch.tensor(GRADIENTS[gradient]).double(), rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_formula():
    z_s, z_t = torch.randn(5, 7).double().requires_grad_(), torch.randn(5, 7).double()
    assert torch.autograd.gradcheck(lambda z: examples(z, z_t, iterations=4), z_s)
    (grad,) = torch.autograd.grad(3 * examples(z_s, z_t, normalize="sum"), z_s)
    (expected,) = torch.autograd.grad(3 * official(z_s, z_t), z_s)
    torch.testing.assert_close(grad, expected)


# Limits, identities, bounds


def test_one_example_is_twice_the_total_variation():
    loss = examples(Z_S[:1], Z_T[:1])
    assert loss.item() == pytest.approx(0.27525097, abs=1e-8)
    log_t, log_s = (z.div(2).log_softmax(-1) for z in (Z_T[:1], Z_S[:1]))
    torch.testing.assert_close(loss, 2 * DIVERGENCES["tvd"](log_t, log_s).squeeze())


def test_limits_of_epsilon():
    z_s, z_t = torch.randn(5, 6).double() * 3, torch.randn(5, 6).double() * 3
    cost = cost_of(z_s, z_t)
    far = examples(z_s, z_t, normalize="sum", epsilon=1e7)
    torch.testing.assert_close(far, 5 * cost.mean(), rtol=1e-6, atol=0)
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    near = examples(z_s, z_t, normalize="sum", epsilon=1e-3, iterations=2000)
    torch.testing.assert_close(near, best, rtol=1e-3, atol=0)
    assert near < cost.trace()


def test_rows_may_be_permuted_on_either_side():
    z_s, z_t = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    loss = examples(z_s, z_t, iterations=300)
    for _ in range(3):
        torch.testing.assert_close(examples(z_s[torch.randperm(6)], z_t[torch.randperm(6)], iterations=300), loss)


def test_identical_batches_are_not_at_zero():
    loss = examples(Z_S, Z_S, normalize="sum")
    assert loss.item() == pytest.approx(0.02288968, abs=1e-8)


@pytest.mark.parametrize("size", [0.1, 5.0, 100.0])
def test_bounds(size):
    loss = examples(size * torch.randn(9, 5), size * torch.randn(9, 5))
    assert 0 <= loss <= 2 + 1e-5


def test_the_plain_domain_agrees_until_it_underflows():
    z_s, z_t = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(examples(z_s, z_t, normalize="sum"), official(z_s, z_t))
    z_s, z_t = 40 * torch.eye(3)[[1, 2, 0]], 40 * torch.eye(3) - 40 * torch.ones(3, 1) * torch.eye(3)[0]
    assert official(z_s, z_t, epsilon=0.01).isnan(), "exp(-200) is 0 in float32"
    ours = examples(z_s.requires_grad_(), z_t, normalize="sum", epsilon=0.01)
    ours.backward()
    assert ours.isfinite()
    assert z_s.grad.isfinite().all()


def test_the_value_under_no_grad_is_the_same():
    with torch.no_grad():
        value = examples(Z_S, Z_T)
    assert not value.requires_grad
    torch.testing.assert_close(value, examples(Z_S.clone().requires_grad_(), Z_T).detach())


def test_a_constant_added_to_the_logits_changes_nothing():
    z_s, z_t = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    shifted = examples(z_s + torch.randn(5, 1), z_t + torch.randn(5, 1))
    torch.testing.assert_close(shifted, examples(z_s, z_t))


# What the official code gets wrong


def test_the_temperature_is_honoured():
    values = [examples(Z_S, Z_T, normalize="sum", temperature=tau).item() for tau in (1.0, 2.0, 3.5)]
    assert values == pytest.approx([official(Z_S, Z_T, tau).item() for tau in (1.0, 2.0, 3.5)])
    assert len(set(values)) == 3


def test_the_mean_does_not_grow_with_the_batch():
    for copies in (2, 5):
        repeated = examples(Z_S.repeat(copies, 1), Z_T.repeat(copies, 1), iterations=200)
        torch.testing.assert_close(repeated, examples(Z_S, Z_T, iterations=200))


def test_a_row_is_a_token_and_never_a_whole_sequence():
    """Three-dimensional logits were normalised over the positions of the target there."""
    z_s, z_t, batch = language_rows()
    total = SinKD(normalize="sum")(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    torch.testing.assert_close(total / len(z_s), official(z_s, z_t))


# Granularity


def test_sequences_are_transported_alone_and_add_up():
    z_s, z_t, batch = language_rows()
    kept = (batch["labels"] != -100).sum(1).tolist()
    parts = list(zip(z_s.split(kept), z_t.split(kept), strict=True))
    for normalize, factor in (("mean", 1), ("sum", len(z_s))):
        objective = SinKD(granularity="sequence", normalize=normalize)
        whole = objective(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
        torch.testing.assert_close(whole, factor * sum(official(a, b) for a, b in parts))
    objective = SinKD(granularity="sequence")
    whole = objective(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    alone = [
        objective(Outputs(rows=DenseRows(a)), Outputs(rows=DenseRows(b)), {"labels": batch["labels"][i : i + 1]})
        for i, (a, b) in enumerate(parts)
    ]
    torch.testing.assert_close(sum(loss["total"] for loss in alone), whole)


def test_samples_add_up_over_the_whole_vocabulary():
    z_s, z_t, batch = language_rows(vocab=300)
    leaf = z_s.clone().requires_grad_()
    total = SinKD(granularity="sample")(Outputs(rows=DenseRows(leaf)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    expected = sum(cost_of(leaf[i : i + 1], z_t[i : i + 1]).sum() for i in range(len(z_s)))
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(torch.autograd.grad(total, leaf), torch.autograd.grad(expected, leaf), strict=True):
        torch.testing.assert_close(found, wanted)
