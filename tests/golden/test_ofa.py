"""OFA's target: the teacher at gamma = 1, more of the label above."""

from __future__ import annotations

import pytest
import torch
from fixture_a import LABEL, Z_S, Z_T, logs

from llmkd.divergences import forward_kl
from llmkd.errors import ConfigError
from llmkd.objectives import OFA
from llmkd.objectives.ofa import ofa, ofa_target
from llmkd.rows import DenseRows, TopKRows
from llmkd.types import Outputs

BATCH = {"labels": torch.tensor([[-100, 0, 1, -100]])}


def by_hand(p: list[float], log_q: list[float], label: int, gamma: float) -> float:
    total = 0.0
    for c, (x, y) in enumerate(zip(p, log_q, strict=True)):
        mark = 1.0 if c == label else 0.0
        total -= ((x + mark) ** gamma - mark) * y
    return total


@pytest.mark.parametrize("gamma", [1.0, 1.2, 1.5, 2.0])
def test_value_against_a_loop(gamma):
    log_t, log_s = logs(Z_T, Z_S)
    rows = zip(log_t.exp().tolist(), log_s.tolist(), LABEL.tolist(), strict=True)
    expected = torch.tensor([by_hand(p, log_q, y, gamma) for p, log_q, y in rows], dtype=torch.float64)
    torch.testing.assert_close(ofa(log_t, log_s, LABEL, gamma=gamma), expected)
    loss = OFA(gamma)(Outputs(DenseRows(Z_S)), Outputs(DenseRows(Z_T)), BATCH)
    torch.testing.assert_close(loss["total"], expected.sum())
    torch.testing.assert_close(loss["ofa"], expected.sum())


def test_gamma_one_is_the_kl_and_the_teacher_s_entropy():
    log_t, log_s = logs(Z_T, Z_S)
    entropy = -(log_t.exp() * log_t).sum(-1)
    torch.testing.assert_close(ofa(log_t, log_s, LABEL, gamma=1.0), forward_kl(log_t, log_s) + entropy)
    torch.testing.assert_close(ofa_target(log_t, LABEL, 1.0), log_t.exp())


def test_above_one_the_label_gains_and_all_others_lose():
    log_t = Z_T.log_softmax(-1)
    change = ofa_target(log_t, LABEL, 1.4) - log_t.exp()
    label = torch.zeros_like(change).scatter(-1, LABEL[:, None], 1.0).bool()
    assert (change[label] > 0).all()
    assert (change[~label] < 0).all()


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_gradient(gamma):
    z_s, log_t = Z_S.clone().requires_grad_(), Z_T.log_softmax(-1)
    log_s = z_s.log_softmax(-1)
    (grad,) = torch.autograd.grad(ofa(log_t, log_s, LABEL, gamma=gamma).sum(), z_s, retain_graph=True)
    torch.testing.assert_close(ofa.grad(log_t, log_s.detach(), LABEL, gamma=gamma), grad)
    target = ofa_target(log_t, LABEL, gamma)
    torch.testing.assert_close(grad, (target.sum(-1, keepdim=True) * log_s.exp() - target).detach())
    assert torch.autograd.gradcheck(lambda z: ofa(log_t, z.log_softmax(-1), LABEL, gamma=gamma), (z_s,))
    total = OFA(gamma)(Outputs(DenseRows(z_s)), Outputs(DenseRows(Z_T)), BATCH)["total"]
    torch.testing.assert_close(torch.autograd.grad(total, z_s)[0], grad)


def test_top_k_rows_and_excluded_events():
    log_t = Z_T.log_softmax(-1)
    ids = torch.tensor([[1, 3], [1, 3]])  # the label of row 0 is in the tail
    top = TopKRows(ids, log_t.gather(-1, ids), 4)
    pair = top.align(slice(0, 2), Z_S.log_softmax(-1), 1.0)
    loss = OFA()(Outputs(DenseRows(Z_S)), Outputs(top), BATCH)
    torch.testing.assert_close(loss["total"], ofa(*pair, torch.tensor([2, 0]), gamma=1.5).sum())
    z_t, z_s = Z_T.clone(), Z_S.clone()
    z_t[:, 2:], z_s[:, 3] = -torch.inf, -torch.inf
    z_s.requires_grad_()
    loss = OFA()(Outputs(DenseRows(z_s)), Outputs(DenseRows(z_t)), BATCH)["total"]
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z_s)[0].isfinite().all()


def test_gamma_is_at_least_one():
    with pytest.raises(ConfigError, match=r"gamma: got 0\.9"):
        OFA(0.9)
