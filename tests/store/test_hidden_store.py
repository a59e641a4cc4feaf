"""Stored hidden states: the teacher's rows to the bit in their own dtype, within a bound in a narrower one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_rows import WIDTH, head_rows, labels_of, stored

from llmkd.divergences import DIVERGENCES, divergence
from llmkd.errors import ConfigError
from llmkd.rows import DenseRows, weighted_sum
from llmkd.store import Hidden

N, V = 30, 41


def as_dtype(dtype: torch.dtype):
    rows = head_rows(N, V)
    return rows.using([tensor.to(dtype) for tensor in rows.tensors()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_their_own_dtype_keeps_every_bit(dtype):
    rows = as_dtype(dtype)
    found = stored(Hidden(), rows, labels_of(N, V))
    assert found.hidden.dtype == dtype
    assert torch.equal(found.hidden, rows.hidden)
    assert torch.equal(found.logits(slice(None)), rows.logits(slice(None)))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_at_any_temperature_is_that_of_the_live_rows(name, temperature):
    rows = as_dtype(torch.bfloat16)
    losses = []
    for teacher in (rows, stored(Hidden(), rows, labels_of(N, V))):
        torch.manual_seed(0)
        fn = divergence(name)
        label = (labels_of(N, V),) if getattr(fn, "reads_label", False) else ()
        z_s = torch.randn(N, V, generator=torch.Generator().manual_seed(5)).requires_grad_()
        weights = torch.ones(N)
        loss = weighted_sum(fn, DenseRows(z_s), teacher, weights, *label, temperature=temperature)
        losses.append((loss.detach(), torch.autograd.grad(loss, z_s)[0]))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize(("dtype", "relative"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_a_narrower_dtype_is_within_its_bound(dtype, relative):
    rows = head_rows(400, V)
    found = stored(Hidden(dtype), rows, labels_of(400, V))
    error = (found.hidden.float() - rows.hidden).abs()
    assert (error <= relative * rows.hidden.abs() + 6e-8).all()
    assert error.max() > 0


def test_fp8_is_within_its_bound_and_the_bound_is_nearly_reached():
    rows = head_rows(4000, V)
    found = stored(Hidden("float8"), rows, labels_of(4000, V))
    largest = rows.hidden.abs().amax(-1, keepdim=True)
    bound = 2.0**-4 * rows.hidden.abs() + 2.0**-10 * largest / 448
    share = (found.hidden - rows.hidden).abs() / bound
    assert 0.9 < share.max() <= 1.0 + 1e-5
    assert len(Hidden("float8").encode(rows, labels_of(4000, V), 0)) == 1 + 4000 * (4 + WIDTH)


def test_a_row_of_zeros_stays_zero():
    rows = head_rows(3, V)
    rows = rows.using([torch.zeros_like(rows.hidden), *rows.tensors()[1:]])
    for dtype in ("auto", "bfloat16", "float8"):
        assert torch.equal(stored(Hidden(dtype), rows, labels_of(3, V)).hidden.float(), rows.hidden)


def test_no_rows_are_the_head_alone():
    rows = head_rows(3, V)
    none = Hidden().join([], "cpu", rows.using([rows.hidden[:0], *rows.tensors()[1:]]), V)
    assert len(none) == 0
    assert none.logits(slice(None)).shape == (0, V)


def test_errors():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        Hidden("bfloat")  # pyright: ignore[reportArgumentType]
    data = Hidden().encode(head_rows(4, V), labels_of(4, V), 0)
    with pytest.raises(ValueError, match="rows of"):
        Hidden().decode(np.frombuffer(data[:-1], np.uint8), 4, WIDTH)
