"""DKD and NKD against their golden numbers, identities and traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fixture_a import LABEL, Z_S, Z_T, exact, logs
from torch import Tensor

from llmkd.divergences import forward_kl
from llmkd.errors import ConfigError
from llmkd.objectives import DKD, NKD
from llmkd.objectives.decoupled import label_cross_entropy, nckd, others_cross_entropy, tckd
from llmkd.rows import DenseRows, Term, TopKRows, reduce
from llmkd.types import Outputs

LABELS = torch.tensor([[-100, 0, 1, -100]])
LOSSES = [tckd, nckd, label_cross_entropy, others_cross_entropy]


def run(objective, z_s: Tensor = Z_S, teacher=None) -> dict[str, Tensor]:
    return objective(Outputs(DenseRows(z_s)), Outputs(teacher or DenseRows(Z_T)), {"labels": LABELS})


def test_dkd_is_what_was_noted():
    log_t, log_s = logs(Z_T, Z_S)
    exact(tckd(log_t, log_s, LABEL), [0.13301629, 0.23628923])
    exact(nckd(log_t, log_s, LABEL), [0.12268845, 0.06024377])
    loss = run(DKD())
    exact(loss["total"] / 2, 0.23038581)
    exact(loss["tckd"], 0.13301629 + 0.23628923, 2e-8)
    exact(loss["nckd"], 0.12268845 + 0.06024377, 2e-8)
    assert abs(loss["total"].item() / 3 - 0.15359054) < 1e-8, "what a mean over all positions would give"


def test_the_identity_with_the_kl():
    z_t, z_s = 3 * torch.randn(2, 50, 7, dtype=torch.float64)
    label = torch.randint(7, (50,))
    log_t, log_s = logs(z_t, z_s)
    p = log_t.exp().gather(-1, label[:, None])[:, 0]
    parts = tckd(log_t, log_s, label) + (1 - p) * nckd(log_t, log_s, label)
    torch.testing.assert_close(parts, forward_kl(log_t, log_s))
    target, others = label_cross_entropy(log_t, log_s, label), others_cross_entropy(log_t, log_s, label)
    q_rest = (1 - log_s.exp().gather(-1, label[:, None])[:, 0]).log()
    torch.testing.assert_close(target + (1 - p) * (others - q_rest), -(log_t.exp() * log_s).sum(-1))


def test_the_others_do_not_see_the_label():
    """A large constant on the label's logit, in place of leaving it out, fails where the others are smaller still."""
    for fn in (nckd, others_cross_entropy):
        value = fn(*logs(Z_T, Z_S), LABEL)
        for shift in (7.0, -7.0, 80.0):
            moved = torch.zeros_like(Z_S).scatter(-1, LABEL[:, None], shift)
            torch.testing.assert_close(fn(*logs(Z_T + moved, Z_S), LABEL), value)
            torch.testing.assert_close(fn(*logs(Z_T, Z_S + moved), LABEL), value)
    sunk = torch.tensor([[0.0, -3000.0, -3001.0]]).double()
    torch.testing.assert_close(
        nckd(*logs(sunk, sunk.roll(1, -1)), torch.tensor([0])),
        forward_kl(*logs(sunk[:, 1:], sunk.roll(1, -1)[:, 1:])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fn", LOSSES)
def test_sure_models_and_excluded_events_stay_finite(fn, dtype):
    z_t = torch.tensor([[60.0, 0.0, 1.0], [0.0, 60.0, 1.0], [0.0, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf]])
    z_s = torch.tensor([[0.0, 60.0, 1.0], [50.0, 0.0, 1.0], [0.0, 1.0, 2.0], [3.0, 2.0, -torch.inf]])
    z_s = z_s.to(dtype).requires_grad_()
    value = fn(*logs(z_t.to(dtype), z_s), torch.tensor([0, 0, 0, 1]))
    (grad,) = torch.autograd.grad(value.sum(), z_s)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert grad.isfinite().all()
    if fn in (tckd, nckd):
        assert (value >= -1e-6).all()
        assert value[0 if fn is tckd else 1] > 1e-3
        same = fn(*logs(z_t.to(dtype), z_t.to(dtype)), torch.tensor([0, 0, 0, 1]))
        torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fn", LOSSES)
def test_one_event_alone_and_gradcheck(fn):
    one = torch.zeros(2, 1, dtype=torch.float64)
    value = fn(one, one, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=0)
    log_t = Z_T.log_softmax(-1)
    z_s = Z_S.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fn(log_t, z.log_softmax(-1), LABEL), (z_s,))


@pytest.mark.parametrize("objective", [DKD(temperature=2.0), NKD()], ids=["dkd", "nkd"])
def test_top_k_rows_with_the_label_among_them_and_in_the_tail(objective):
    """The tail is one event; it stands for a label that the teacher does not name."""
    heat = getattr(objective, "temperature", 1.0)
    z_t = torch.tensor([[0.0, 3.0, 2.0, 0.5], [0.0, 1.0, -0.5, 0.25]], dtype=torch.float64)
    log_t = (z_t / heat).log_softmax(-1)
    ids = log_t.topk(2).indices  # row 0 without its label 0, row 1 with its label 1
    top = TopKRows(ids, log_t.gather(-1, ids), 4, heat)
    z_s = Z_S.clone().requires_grad_()
    loss = run(objective, z_s, top)
    pairs = [top.align(slice(0, 2), (z_s / heat).log_softmax(-1), heat), torch.tensor([2, 0])]
    terms = objective.terms(Outputs(DenseRows(z_s)), {"labels": LABELS})
    expected = torch.stack([term.scale * term.fn(*pairs[0], pairs[1]).sum() for term in terms.values()]).sum()
    torch.testing.assert_close(loss["total"], expected)
    grads = [torch.autograd.grad(value, z_s, retain_graph=True)[0] for value in (loss["total"], expected)]
    torch.testing.assert_close(*grads)
    every = TopKRows(torch.arange(4).expand(2, 4), log_t, 4, heat)
    torch.testing.assert_close(run(objective, z_s, every)["total"], run(objective, z_s, DenseRows(z_t))["total"])


@pytest.mark.parametrize("chunk", [1, 3, 9])
@pytest.mark.parametrize("fn", LOSSES)
def test_chunks_temperature_and_half_precision(fn, chunk):
    z_s, z_t = torch.randn(2, 9, 11)
    label, z_s = torch.randint(11, (9,)), z_s.requires_grad_()
    term = Term(fn, 0.5, temperature=1.7, label=label)
    total, _ = reduce([term], DenseRows(z_s), DenseRows(z_t), chunk_rows=chunk)
    dense = 0.5 * fn(*logs(z_t / 1.7, z_s / 1.7), label).sum()
    torch.testing.assert_close(total, dense)
    torch.testing.assert_close(torch.autograd.grad(total, z_s)[0], torch.autograd.grad(dense, z_s)[0])
    half, _ = reduce([term], DenseRows(z_s.bfloat16()), DenseRows(z_t.bfloat16()), chunk_rows=chunk)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, dense, rtol=2e-2, atol=2e-2)


def test_weights_and_temperature():
    z_s = Z_S.clone().requires_grad_()
    log_t, log_s = logs(Z_T / 3, z_s / 3)
    expected = 9 * (2 * tckd(log_t, log_s, LABEL) + 8 * nckd(log_t, log_s, LABEL)).sum()
    torch.testing.assert_close(run(DKD(2.0, 8.0, 3.0), z_s)["total"], expected)
    others = partial(others_cross_entropy, log_t, log_s, LABEL)().sum()
    nkd = label_cross_entropy(*logs(Z_T, z_s), LABEL).sum() + 1.5 * 9 * others
    torch.testing.assert_close(run(NKD(temperature=3.0), z_s)["total"], nkd)


def test_nkd_s_others_are_nckd_and_an_entropy():
    log_t, log_s = logs(Z_T, Z_S)
    entropy = others_cross_entropy(log_t, log_t, LABEL)
    torch.testing.assert_close(others_cross_entropy(log_t, log_s, LABEL), nckd(log_t, log_s, LABEL) + entropy)


@pytest.mark.parametrize("make", [DKD, NKD])
def test_a_temperature_must_be_positive(make):
    with pytest.raises(ConfigError, match="temperature: got 0"):
        make(temperature=0.0)
