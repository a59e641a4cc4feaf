"""Stored top-k rows: the right events, label and tail exactly, every other log-probability within its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_rows import head_rows, labels_of, log_p_of, stored

from llmkd.divergences import DIVERGENCES, divergence, reads_label
from llmkd.errors import ConfigError
from llmkd.events import TopKRows
from llmkd.rows import DenseRows, Term, reduce, weighted_sum
from llmkd.store import TopK
from llmkd.store.topk import decode, step_of
from llmkd.support import pair

N, V = 30, 97
LABELS = labels_of(N, V)


def named(rows: TopKRows, row: int) -> dict[int, float]:
    """Token -> log-probability of one row."""
    pairs = zip(rows.ids[row].tolist(), rows.log_probs[row].tolist(), strict=True)
    return {token: value for token, value in pairs if token >= 0}


def wanted(log_p: torch.Tensor, label: int, k: int, mass: float) -> set[int]:
    """The smallest number of best tokens that reaches the mass, at most k, and the label."""
    kept, reached = [], 0.0
    for token in log_p.argsort(descending=True).tolist()[:k]:
        if mass < 1.0 and reached >= mass:  # 1 is no cut, whatever the rounding
            break
        kept.append(token)
        reached += log_p[token].double().exp().item()
    return {*kept, label}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("k", "mass"), [(1, 1.0), (5, 1.0), (V, 1.0), (20, 0.9), (V, 0.5)])
@pytest.mark.parametrize("bits", [2, 5, 16, 32])
def test_events_and_bounds(k, mass, bits, temperature):
    rows = head_rows(N, V)
    kind = TopK(k, bits, mass, temperature)
    found, log_p = stored(kind, rows, LABELS), log_p_of(rows, temperature)
    ends = decode(np.frombuffer(kind.encode(rows, LABELS, 0), np.uint8), N, V, bits)
    for row in range(N):
        events, label = named(found, row), LABELS[row].item()
        assert set(events) == wanted(log_p[row], label, k, mass)
        assert events[label] == pytest.approx(log_p[row, label].item(), abs=1e-6)
        others = [log_p[row, token].item() for token in events if token != label]
        step = (max(others) - min(others) + 0.02) / (2**bits - 1) if others and bits < 32 else 0.0
        errors = [abs(value - log_p[row, token].item()) for token, value in events.items()]
        assert max(errors) <= step + 1e-6
        rest = [token for token in range(V) if token not in events]
        if rest:
            assert ends.tail[row] == pytest.approx(log_p[row, rest].logsumexp(0).item(), abs=1e-5)
    assert torch.equal(found.ids[found.ids >= 0], torch.cat([row[row >= 0].sort().values for row in found.ids]))
    assert found.temperature == temperature


def test_the_bound_is_nearly_reached_and_never_passed():
    rows = head_rows(400, V, sharp=2.0)
    labels, log_p = labels_of(400, V), log_p_of(rows)
    found = stored(TopK(40, bits=3), rows, labels)
    error = (found.log_probs - log_p.gather(1, found.ids.clamp_min(0))).abs()
    kept = log_p.gather(1, found.ids.clamp_min(0)).masked_fill(
        (found.ids < 0) | (found.ids == labels[:, None]), torch.nan
    )
    low, high = (torch.from_numpy(end(kept.numpy(), axis=1)) for end in (np.nanmin, np.nanmax))
    share = error.masked_fill(found.ids < 0, 0) / step_of(low.numpy() - 0.01, high.numpy() + 0.01, 3)[:, None]
    assert 0.55 < share.max() <= 1.0


def test_the_masses_add_up_to_one():
    rows = head_rows(N, V)
    for bits in (2, 4, 8):
        found = stored(TopK(12, bits), rows, LABELS)
        log_p = log_p_of(rows)
        outside = log_p.scatter(1, found.ids.clamp_min(0).where(found.ids >= 0, LABELS[:, None]), -torch.inf)
        total = found.log_probs.double().exp().sum(-1) + outside.double().logsumexp(-1).exp()
        torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-6)


def test_all_tokens_in_32_bits_are_the_rows_themselves():
    rows = head_rows(N, V)
    found = stored(TopK(V, bits=32), rows, LABELS)
    assert torch.equal(found.ids, torch.arange(V).expand(N, V))
    assert torch.equal(found.log_probs, log_p_of(rows))


def test_fifty_tokens_of_a_real_vocabulary_take_at_most_122_bytes():
    rows = head_rows(128, 49152, sharp=0.5)
    labels = labels_of(128, 49152)
    sizes = [len(TopK(50, bits=5, draws=draws).encode(rows, labels, 0)) / 128 for draws in (0, 8)]
    assert sizes[0] <= 121
    assert sizes[1] - sizes[0] <= 2 * 8, "all of the mass is in these tails: 8 draws a row, two bytes each"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_row_of_fewer_events_is_the_same_alone(name):
    """Rows of 3, 1 and V events in one tensor: each has the loss and the gradient that it has by itself."""
    torch.manual_seed(0)
    fn = divergence(name).double() if isinstance(divergence(name), torch.nn.Module) else divergence(name)
    label = torch.tensor([2, 0, 5])
    z_t, z_s = torch.randn(3, 7).double(), torch.randn(3, 7).double().requires_grad_()
    log_t = z_t.log_softmax(-1)
    ids = [torch.tensor([1, 2, 4]), torch.tensor([0]), torch.arange(7)]
    width = 8  # K = V would say that every row has all tokens
    both = TopKRows(
        torch.stack([torch.cat([row, row.new_full((width - len(row),), -1)]) for row in ids]),
        torch.stack(
            [torch.cat([log_t[i, row], log_t.new_full((width - len(row),), -torch.inf)]) for i, row in enumerate(ids)]
        ),
        7,
    )
    together = _loss(fn, z_s, both, label)
    term = Term(fn, label=label if reads_label(fn) else None)
    total, _ = reduce([term], DenseRows(z_s), both, chunk_rows=2)
    torch.testing.assert_close(total.detach(), together[0].sum(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(total, z_s)[0], together[1], rtol=1e-6, atol=1e-9)
    for i, row in enumerate(ids):
        single = TopKRows(row[None], log_t[i, row][None], 7)
        leaf = z_s[i : i + 1].detach().requires_grad_()
        alone = _loss(fn, leaf, single, label[i : i + 1])
        torch.testing.assert_close(together[0][i : i + 1], alone[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together[1][i : i + 1], alone[1], rtol=1e-6, atol=1e-9)


def _loss(fn, z_s, teacher, label):
    log_t, log_s = pair(z_s, teacher, slice(None))
    event = (teacher.find(slice(None), label),) if reads_label(fn) else ()
    values = fn(log_t, log_s, *event)
    return values.detach(), torch.autograd.grad(values.sum(), z_s)[0]


def test_the_driver_reads_rows_of_different_length():
    rows = head_rows(N, V)
    teacher = stored(TopK(20, bits=32, mass=0.8), rows, LABELS)
    assert len({int((row >= 0).sum()) for row in teacher.ids}) > 3
    z_s = torch.randn(N, V).requires_grad_()
    total = weighted_sum(divergence("forward_kl"), DenseRows(z_s), teacher, torch.ones(N), chunk_rows=7)
    expected = 0.0
    log_p, log_q = log_p_of(rows).double(), z_s.detach().double().log_softmax(-1)
    for row in range(N):
        ids = teacher.ids[row][teacher.ids[row] >= 0]
        rest = torch.tensor([token for token in range(V) if token not in ids.tolist()])
        groups = [*ids[:, None], rest]
        p = torch.stack([log_p[row, group].exp().sum() for group in groups])
        q = torch.stack([log_q[row, group].exp().sum() for group in groups])
        expected += (p * (p / q).log()).sum().item()
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"k": 0}, "k: got 0"), ({"bits": 1}, "bits: got 1"), ({"bits": 17}, "bits: got 17"),
     ({"mass": 0.0}, "mass: got 0"), ({"temperature": -1.0}, "temperature: got -1")],
)  # fmt: skip
def test_what_cannot_be_stored(options, said):
    with pytest.raises(ConfigError, match=said):
        TopK(**options)


def test_cut_bytes_are_an_error():
    data = TopK(5).encode(head_rows(N, V), LABELS, 0)
    with pytest.raises(ValueError, match="bytes; expected"):
        decode(np.frombuffer(data[:-1], np.uint8), N, V, 5)
