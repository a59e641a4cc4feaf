"""Published numbers: fixtures worked out by hand and confirmed against the official code of each method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmkd.divergences import DIVERGENCES
from llmkd.objectives import CrossEntropy, TokenDistill
from llmkd.rows import DenseRows, HeadRows, weighted_sum
from llmkd.types import Outputs

# Fixture A: four tokens, three positions, the third is padding
Z_S = [[1.0, 0.5, -0.5, 0.0], [0.2, -0.1, 0.4, 0.3], [3.0, -3.0, 0.0, 1.0]]
Z_T = [[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, -0.5, 0.25], [-3.0, 3.0, 1.0, 0.0]]
LABELS = [0, 1, -100]
UNMASKED = 1.84921091
PER_TOKEN = {"forward_kl": [0.16858368, 0.26733630], "reverse_kl": [0.20502446, 0.25401159]}
MEANS = [
    ("forward_kl", {}, 1.0, 0.21795999),
    ("reverse_kl", {}, 1.0, 0.22951803),
    ("tvd", {}, 1.0, 0.27877618),
    ("jsd", {"beta": 0.1}, 1.0, 0.01946418),
    ("jsd", {}, 1.0, 0.05394588),
    ("jsd", {"beta": 0.5}, 1.0, 0.05394588),
    ("jsd", {"beta": 0.9}, 1.0, 0.02026048),
    ("jsd", {"beta": 1e-4}, 1e-4, 0.21793613),
    ("jsd", {"beta": 1 - 1e-4}, 1e-4, 0.22949011),
    ("skew_kl", {}, 1.0, 0.17409606),
    ("skew_kl", {"alpha": 0.1}, 1.0, 0.17409606),
    ("skew_reverse_kl", {}, 1.0, 0.17919969),
    ("skew_reverse_kl", {"alpha": 0.1}, 1.0, 0.17919969),
]
FORWARD_KL_GRADIENT = [-0.25504569, 0.17990277, 0.06618253, 0.00896039]  # q - p of the first position
CROSS_ENTROPY = 1.24517033

# Fixture B and the pair that tells the variants of adaptive KL apart, as probabilities
PAIRS = [
    ([0.55, 0.25, 0.12, 0.05, 0.02, 0.01], [0.30, 0.30, 0.20, 0.10, 0.06, 0.04], "forward_kl", 0.15600268),
    ([0.55, 0.25, 0.12, 0.05, 0.02, 0.01], [0.30, 0.30, 0.20, 0.10, 0.06, 0.04], "tvd", 0.25),
    ([0.4, 0.3, 0.2, 0.1], [0.45, 0.15, 0.25, 0.15], "forward_kl", 0.07565572),
    ([0.4, 0.3, 0.2, 0.1], [0.45, 0.15, 0.25, 0.15], "reverse_kl", 0.06563594),
]
EXACT = {"rtol": 0, "atol": 1e-7}


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(actual: Tensor, expected: float | list[float]) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **EXACT)


def log_probs() -> tuple[Tensor, Tensor]:
    return torch.log_softmax(tensor(Z_T), -1), torch.log_softmax(tensor(Z_S), -1)


@pytest.mark.parametrize(("name", "knobs", "unit", "mean"), MEANS)
def test_fixture_a_means(name, knobs, unit, mean):
    log_t, log_s = log_probs()
    near(DIVERGENCES[name](log_t[:2], log_s[:2], **knobs).mean() / unit, mean)


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_fixture_a_per_token(name):
    log_t, log_s = log_probs()
    near(DIVERGENCES[name](log_t[:2], log_s[:2]), PER_TOKEN[name])


@pytest.mark.parametrize(("p", "q", "name", "value"), PAIRS)
def test_pairs_of_probabilities(p, q, name, value):
    near(DIVERGENCES[name](tensor([p]).log(), tensor([q]).log())[0], value)


def test_fixture_a_gradient():
    z_s = tensor(Z_S).requires_grad_()
    DIVERGENCES["forward_kl"](log_probs()[0], torch.log_softmax(z_s, -1))[0].backward()
    near(z_s.grad[0], FORWARD_KL_GRADIENT)


def outputs(logits: list, labels: Tensor) -> Outputs:
    """A model whose logits are the fixture's: position t predicts label t + 1, supervised positions only."""
    hidden = torch.cat([tensor(logits), torch.zeros(1, 4, dtype=torch.float64)])[None]
    hidden = hidden[:, :-1][labels[:, 1:] != -100].requires_grad_()
    head = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    return Outputs(rows=HeadRows(hidden, head))


def test_masking_through_the_labels():
    labels = torch.tensor([[-100, *LABELS]])
    student, teacher = outputs(Z_S, labels), outputs(Z_T, labels)
    loss = TokenDistill("forward_kl")(student, teacher, {"labels": labels})
    near(loss["total"] / 2, 0.21795999)
    loss["total"].backward()
    near(student.rows.hidden.grad[0], FORWARD_KL_GRADIENT)
    assert student.rows.hidden.grad.shape == (2, 4)
    near(CrossEntropy()(student, teacher, {"labels": labels})["total"] / 2, CROSS_ENTROPY)


def test_masking_through_the_weights():
    fn, z_s, teacher = DIVERGENCES["forward_kl"], tensor(Z_S).requires_grad_(), DenseRows(tensor(Z_T))
    near(weighted_sum(fn, DenseRows(z_s), teacher, tensor([1 / 3] * 3)), UNMASKED)
    masked = weighted_sum(fn, DenseRows(z_s), teacher, tensor([1.0, 1.0, 0.0]))
    near(masked / 2, 0.21795999)
    masked.backward()
    near(z_s.grad[0], FORWARD_KL_GRADIENT)
    assert (z_s.grad[2] == 0).all()
