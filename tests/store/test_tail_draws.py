"""Draws from the tail of top-k rows: on average they give the forward KL the gradient of the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_rows import head_rows, labels_of, log_p_of, stored

from llmkd import TokenDistill
from llmkd.divergences import divergence
from llmkd.errors import ConfigError
from llmkd.events import TopKRows
from llmkd.mixture import route
from llmkd.objectives import CrossEntropy, Mix
from llmkd.rows import DenseRows, Term, reduce, weighted_sum
from llmkd.store import TopK
from llmkd.store.draws import comb, offsets
from llmkd.teachers.partition import _of_top_k
from llmkd.types import Outputs

V, K, D, MANY = 23, 4, 3, 20_000
SIGMAS = 5.0  # of the mean of MANY rows


def many(draws: int = D, temperature: float = 1.0) -> TopKRows:
    """One row of the teacher, stored many times, each with its own draws."""
    one = head_rows(1, V, sharp=0.4)
    rows = one.using([one.hidden.expand(MANY, -1).contiguous(), *one.tensors()[1:]])
    return stored(TopK(K, bits=32, temperature=temperature, draws=draws), rows, torch.zeros(MANY, dtype=torch.long))


def gradients(teacher, z_s: torch.Tensor, linear: bool = True, temperature: float = 1.0) -> torch.Tensor:
    """d forward KL / d student logits of every row, [n, V]."""
    leaf = z_s.expand(len(teacher), -1).clone().requires_grad_()
    term = Term(divergence("forward_kl"), temperature=temperature, linear=linear)
    return torch.autograd.grad(reduce([term], DenseRows(leaf), teacher)[0], leaf)[0].double()


def whole(z_s: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The exact one, (q - p) / T."""
    q = (z_s.double() / temperature).softmax(-1)[0]
    return (q - log_p_of(head_rows(1, V, sharp=0.4), temperature)[0].double().exp()) / temperature


def too_far(values: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest distance of their mean from the truth, in standard errors."""
    error = values.std(0) / len(values) ** 0.5
    return ((values.mean(0) - truth).abs() / error.clamp_min(1e-7)).max().item()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expected_gradient_is_that_of_the_whole_vocabulary(temperature):
    z_s = torch.randn(1, V)
    found = gradients(many(temperature=temperature), z_s, temperature=temperature)
    assert too_far(found, whole(z_s, temperature)) < SIGMAS
    coarse = gradients(many(temperature=temperature), z_s, linear=False, temperature=temperature)
    assert too_far(coarse + 1e-3 * torch.randn(MANY, V), whole(z_s, temperature)) > SIGMAS, "a tail alone is not enough"


def test_draws_leave_the_mass_of_each_event_alone():
    """What the draws add moves tokens of the tail against each other: it sums to 0 and spares the events."""
    rows, z_s = many(), torch.randn(1, V)
    more = gradients(rows, z_s) - gradients(rows, z_s, linear=False)
    torch.testing.assert_close(more.sum(-1), torch.zeros(MANY, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(more.gather(1, rows.ids.clamp_min(0)), torch.zeros(MANY, K + 1).double(), atol=0, rtol=0)
    assert more.abs().max() > 0.1


def test_the_gradient_is_the_derivative_of_the_value():
    rows = stored(TopK(K, bits=32, draws=40), head_rows(6, V, sharp=0.4), labels_of(6, V))
    z_s = torch.randn(6, V, dtype=torch.float64, requires_grad=True)

    def total(z):
        return reduce([Term(divergence("forward_kl"), linear=True)], DenseRows(z), rows, chunk_rows=4)[0]

    assert torch.autograd.gradcheck(total, [z_s], atol=1e-6)


def test_the_value_is_that_of_the_drawn_distribution():
    """Written out: KL on the events plus the KL of what was drawn within the tail, weighted by its draws."""
    rows = stored(TopK(K, bits=32, draws=40), head_rows(5, V, sharp=0.4), labels_of(5, V))
    assert rows.drawn is not None
    z_s = torch.randn(5, V)
    found = reduce([Term(divergence("forward_kl"), linear=True)], DenseRows(z_s), rows)[0].item()
    expected = weighted_sum(divergence("forward_kl"), DenseRows(z_s), rows, torch.ones(5)).item()
    q = z_s.double().softmax(-1)
    for i in range(5):
        named = set(rows.ids[i].tolist())
        q_tail = sum(q[i, v].item() for v in range(V) if v not in named)
        pairs = zip(rows.drawn.ids[i].tolist(), rows.drawn.log_probs[i].double().exp().tolist(), strict=True)
        drawn = {v: w for v, w in pairs if w > 0}
        assert not named & set(drawn)
        mass = sum(drawn.values())
        expected += sum(w * np.log(w / mass / (q[i, v].item() / q_tail)) for v, w in drawn.items())
    assert found == pytest.approx(expected, rel=1e-5)


def counts(expected: torch.Tensor, most: int, seed: int = 5) -> torch.Tensor:
    """How often `comb` draws each token, [n, V]."""
    drawn, vocab_size = comb(expected, offsets(len(expected), seed), most), expected.shape[-1]
    assert torch.equal(drawn, drawn.sort(-1).values)
    return torch.zeros(len(drawn), vocab_size + 1).scatter_add(1, drawn, torch.ones(drawn.shape))[:, :vocab_size]


def test_a_token_is_drawn_as_often_as_its_mass_says():
    """Between rounding down and up, the right number on average, and a row's sum likewise."""
    p = torch.rand(1, 50, dtype=torch.float64).softmax(-1) * 7.3
    p[0, 9] += 1.5
    times = counts(p.expand(MANY, -1), 9)
    assert ((times - p).abs() < 1).all()
    assert set(times.sum(-1).tolist()) == {8, 9}
    assert too_far(times.double(), p[0]) < SIGMAS


def test_whole_sums_are_always_reached():
    p = torch.softmax(4 * torch.randn(3000, 97), -1, dtype=torch.float64)
    assert set(counts(12 * p, 12).sum(-1).tolist()) == {12}
    assert counts(12 * p, 13).sum() == 12 * 3000


def test_what_has_no_mass_is_not_drawn():
    p = torch.tensor([[0.0, 0.6, 0.0, 1.4, 0.0]]).expand(500, -1)
    assert counts(p, 2).sum(0).tolist()[::2] == [0, 0, 0]


def test_no_draws_are_no_rows_of_them():
    rows = stored(TopK(K, bits=32, draws=0), head_rows(6, V), labels_of(6, V))
    assert rows.drawn is None
    z_s = torch.randn(1, V)
    torch.testing.assert_close(gradients(rows, z_s), gradients(rows, z_s, linear=False), atol=0, rtol=0)


def test_only_what_is_linear_learns_from_them():
    rows = Outputs(rows=stored(TopK(K, draws=9), head_rows(6, V, sharp=0.4), labels_of(6, V)))
    bare = Outputs(rows=stored(TopK(K, draws=0), head_rows(6, V, sharp=0.4), labels_of(6, V)))
    student = Outputs(rows=DenseRows(torch.randn(6, V)))
    batch = {"labels": torch.cat([torch.tensor([[-100]]), labels_of(6, V)[None]], 1)}
    for goal, more in (
        (TokenDistill(), True),
        (Mix([TokenDistill("forward_kl"), CrossEntropy()]), True),
        (TokenDistill("reverse_kl"), False),
        (TokenDistill("jsd"), False),
        (TokenDistill("forward_kl", policy="confidence_gate"), False),
    ):
        gap = goal(student, rows, batch)["total"] - goal(student, bare, batch)["total"]
        assert (gap.item() > 1e-3) == more


def test_draws_follow_their_rows():
    """Into blocks, choices and routes."""
    rows = stored(TopK(K, draws=30), head_rows(6, V, sharp=0.4), labels_of(6, V))
    other = stored(TopK(K, draws=30), head_rows(4, V, seed=3, sharp=0.4), labels_of(4, V), seed=9)
    z_s = torch.randn(10, V)
    expected = torch.cat([gradients(part, z_s[:1]) for part in (rows, other)])
    order = torch.tensor([3, 1, 1, 5])
    torch.testing.assert_close(gradients(rows.pick(order), z_s[:1]), expected[order])
    torch.testing.assert_close(gradients(rows.block(slice(2, 4)), z_s[:1]), expected[2:4])
    owner = np.array([0, 1, 0, 0, 1, 1, 0, 0, 1, 0])
    routed = gradients(route([rows, other], owner), z_s[:1])
    assert isinstance(route([rows, other], owner), TopKRows)
    torch.testing.assert_close(routed[owner == 0], expected[:6])
    torch.testing.assert_close(routed[owner == 1], expected[6:])


def test_a_partition_keeps_the_draws_of_the_teachers_own_rows():
    rows = stored(TopK(K, bits=32, draws=30), head_rows(40, V, sharp=0.4), labels_of(40, V))
    own = DenseRows(torch.randn(40, V))
    mixed = _of_top_k(rows, own, labels_of(40, V))
    theirs = (mixed.log_probs == rows.log_probs).all(-1)
    assert 0 < theirs.sum() < 40
    assert rows.drawn is not None
    assert mixed.drawn is not None
    assert torch.equal(mixed.drawn.log_probs[theirs], rows.drawn.log_probs[theirs])
    assert mixed.drawn.log_probs[~theirs].isneginf().all()


def test_draws_depend_on_the_example_alone():
    rows, labels = head_rows(40, V, sharp=0.4), labels_of(40, V)
    assert TopK(K).encode(rows, labels, 7) == TopK(K).encode(rows, labels, 7)
    assert TopK(K).encode(rows, labels, 7) != TopK(K).encode(rows, labels, 8)


def test_draws_below_none_are_refused():
    with pytest.raises(ConfigError, match=r"topk.draws: got -1; expected 0 or more"):
        TopK(draws=-1)
