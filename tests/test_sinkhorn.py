"""SinKD on language models: reduced columns, a bounded number of rows, heads, top-k teachers, half precision, options."""

from __future__ import annotations

import pytest
import torch
from test_rows_cost import Watch
from torch import nn
from transport import examples, language_rows, official

from llmkd.errors import ConfigError
from llmkd.objectives import CrossEntropy, Mix, SinKD, TokenDistill
from llmkd.objectives.sinkhorn import evenly_spaced, kept_columns, sinkhorn
from llmkd.rows import DenseRows, HeadRows, TopKRows
from llmkd.types import Outputs

# A vocabulary


def test_columns_are_the_teachers_best_the_labels_and_the_rest():
    z_s, z_t, batch = language_rows(vocab=50)
    labels = batch["labels"][batch["labels"] != -100]
    ids = sorted({*z_t.topk(3).indices.flatten().tolist(), *labels.tolist()})
    others = [v for v in range(50) if v not in ids]
    q, p = ((z / 2).softmax(-1) for z in (z_s, z_t))
    q, p = (torch.cat([x[:, ids], x[:, others].sum(-1, keepdim=True)], -1) for x in (q, p))
    expected = official(2 * q.log(), 2 * p.log())
    objective = SinKD(normalize="sum", top_k=3)
    total = objective(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    torch.testing.assert_close(total / len(z_s), expected)


def test_the_rest_is_lost_information_only():
    z_s, z_t, batch = language_rows(vocab=50)
    costs = []
    for k in (1, 5, 20, 50, 100):
        objective = SinKD(top_k=k, epsilon=1e-2, iterations=500)
        costs.append(objective(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"].item())
    assert costs[-1] == costs[-2], "as many as there are"
    assert all(cost <= costs[-1] + 1e-6 for cost in costs)


def test_kept_columns_are_a_distribution():
    log_p = torch.randn(4, 9).log_softmax(-1)
    assert torch.equal(kept_columns(log_p, None), log_p.exp())
    torch.testing.assert_close(kept_columns(log_p, torch.arange(9)), log_p.exp())
    some = kept_columns(log_p, torch.tensor([2, 7]))
    assert some.shape == (4, 3)
    torch.testing.assert_close(some.sum(-1), torch.ones(4))


@pytest.mark.parametrize("k", [4, 50])
@pytest.mark.parametrize("granularity", ["batch", "sequence"])
def test_a_teacher_of_k_events_and_a_tail(k, granularity):
    z_s, z_t, batch = language_rows(vocab=50)
    log_t, ids = (z_t / 2).log_softmax(-1).topk(k)
    leaf = z_s.clone().requires_grad_()
    objective = SinKD(granularity=granularity, top_k=50)
    dense = objective(Outputs(rows=DenseRows(leaf)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    top = objective(Outputs(rows=DenseRows(leaf)), Outputs(rows=TopKRows(ids, log_t, 50, temperature=2.0)), batch)[
        "total"
    ]
    q, p = ((z / 2).softmax(-1) for z in (leaf, z_t))
    cost = torch.stack(
        [
            torch.stack(
                [(q[i, ids[j]] - p[j, ids[j]]).abs().sum() + (q[i, ids[j]] - p[j, ids[j]]).sum().abs() for j in range(len(p))]
            )
            for i in range(len(q))
        ]
    )  # fmt: skip
    if k == 50:
        torch.testing.assert_close(top, dense)
        return
    sequence = (batch["labels"] != -100).nonzero()[:, 0]
    apart = sequence[:, None] != sequence if granularity == "sequence" else None
    expected = (sinkhorn(cost, 0.1, 20, apart) * cost).sum()
    torch.testing.assert_close(top, expected)
    torch.testing.assert_close(torch.autograd.grad(top, leaf), torch.autograd.grad(expected, leaf))
    full = torch.cdist(q, p, p=1)
    assert (cost <= full + 1e-12).all(), "merging events never increases a cost"


def test_rows_recorded_at_another_temperature_are_an_error():
    z_s, z_t, batch = language_rows()
    log_t, ids = z_t.log_softmax(-1).topk(4)
    with pytest.raises(ConfigError, match=r"temperature: got 2.0, but .* recorded at 1.0; .*Set temperature=1.0"):
        SinKD()(Outputs(rows=DenseRows(z_s)), Outputs(rows=TopKRows(ids, log_t, 13)), batch)


# Rows


def test_the_same_rows_of_both_models_take_part():
    assert evenly_spaced(10, 4, torch.device("cpu")).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4, torch.device("cpu")).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 4, torch.device("cpu")).tolist() == []
    z_s, z_t, batch = language_rows(sequences=4)
    chosen = evenly_spaced(len(z_s), 5, z_s.device)
    leaf = z_s.clone().requires_grad_()
    total = SinKD(max_rows=5)(Outputs(rows=DenseRows(leaf)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    torch.testing.assert_close(total / len(z_s), official(z_s[chosen], z_t[chosen]) / 5)
    torch.manual_seed(7)
    again = SinKD(max_rows=5)(Outputs(rows=DenseRows(leaf)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    assert torch.equal(total, again), "no random number is drawn"
    (grad,) = torch.autograd.grad(total, leaf)
    left_out = [i for i in range(len(z_s)) if i not in chosen.tolist()]
    assert (grad[left_out] == 0).all()
    assert (grad[chosen] != 0).any(-1).all()


def heads(n: int = 37, vocab: int = 211, dtype: torch.dtype = torch.float64):
    torch.manual_seed(3)
    student, teacher = nn.Linear(8, vocab).to(dtype), nn.Linear(5, vocab, bias=False).to(dtype)
    hidden = torch.randn(n, 8, dtype=dtype, requires_grad=True)
    rows = HeadRows(hidden, student, softcap=5.0), HeadRows(torch.randn(n, 5, dtype=dtype), teacher)
    return *rows, {"labels": torch.cat([torch.full((1,), -100), torch.randint(vocab, (n,))]).unsqueeze(0)}


@pytest.mark.parametrize("chunk_mb", [None, 0])
def test_heads_give_the_gradients_of_dense_logits(chunk_mb, monkeypatch):
    if chunk_mb == 0:  # chunks of one row
        monkeypatch.setattr(
            "llmkd.rows.chunk_slices", lambda rows, *_, **__: [slice(i, i + 1) for i in range(len(rows))]
        )
    student, teacher, batch = heads()
    z_s, z_t = student.logits(slice(None)), teacher.logits(slice(None)).detach()
    live = SinKD(top_k=3)(Outputs(rows=student), Outputs(rows=teacher), batch)["total"]
    dense = SinKD(top_k=3)(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    torch.testing.assert_close(live, dense)
    leaves = [student.hidden, student.head.weight, student.head.bias]
    found, expected = (torch.autograd.grad(2.5 * loss, leaves) for loss in (live, dense))
    torch.testing.assert_close(found, expected)


def test_no_tensor_of_all_rows_times_the_vocabulary(monkeypatch):
    student, teacher, batch = heads(n=60, vocab=2000)
    monkeypatch.setattr("llmkd.rows.chunk_slices", lambda *_, **__: [slice(i, i + 5) for i in range(0, 60, 5)])
    with Watch() as watch:
        SinKD(top_k=2)(Outputs(rows=student), Outputs(rows=teacher), batch)["total"].backward()
    assert watch.largest < 60 * 2000 / 4


@pytest.mark.parametrize("options", [{}, {"granularity": "sequence"}, {"granularity": "sample"}])
def test_half_precision_is_computed_in_single(options):
    student, teacher, batch = heads(dtype=torch.bfloat16)
    loss = SinKD(**options)(Outputs(rows=student), Outputs(rows=teacher), batch)["total"]
    z_s, z_t = (rows.logits(slice(None)).detach().double() for rows in (student, teacher))
    exact = SinKD(**options)(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)["total"]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    loss.backward()
    assert student.hidden.grad.dtype == torch.bfloat16
    assert student.hidden.grad.isfinite().all()


def test_autocast_reaches_the_student_alone():
    student, teacher, batch = heads(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SinKD(top_k=3)(Outputs(rows=student), Outputs(rows=teacher), batch)["total"]
    parts = [tensor.detach().bfloat16() for tensor in student.tensors()]
    halved = Outputs(rows=DenseRows(student.using(parts).logits(slice(None))))
    whole = Outputs(rows=DenseRows(teacher.logits(slice(None)).detach()))
    torch.testing.assert_close(loss, SinKD(top_k=3)(halved, whole, batch)["total"], rtol=1e-5, atol=0)
    loss.backward()
    assert student.hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["dense", "top_k"])
@pytest.mark.parametrize("granularity", ["batch", "sequence", "sample"])
def test_no_rows_are_zero_with_a_graph(kind, granularity):
    z_s = torch.zeros(0, 13, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, 4, dtype=torch.int64)
    teacher = DenseRows(z_s.detach()) if kind == "dense" else TopKRows(empty, empty.double(), 13, temperature=2.0)
    batch = {"labels": torch.full((2, 5), -100)}
    objective = SinKD(granularity=granularity, **({} if granularity == "sample" else {"top_k": 3}))
    loss = objective(Outputs(rows=DenseRows(z_s)), Outputs(rows=teacher), batch)["total"]
    loss.backward()
    assert loss == 0


def test_it_stands_beside_other_losses_in_a_mix():
    z_s, z_t, batch = language_rows()
    student, teacher = Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t))
    parts = [TokenDistill("forward_kl"), CrossEntropy(), SinKD()]
    loss = Mix(parts, weights=[1.0, 0.1, 0.2])(student, teacher, batch)
    alone = [part(student, teacher, batch)["total"] for part in parts]
    torch.testing.assert_close(loss["total"], alone[0] + 0.1 * alone[1] + 0.2 * alone[2])
    assert set(loss) == {"total", "forward_kl", "cross_entropy", "sinkd"}


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "sequnce"}, "did you mean 'sequence'"),
        ({"gradient": "none"}, "unknown sinkd.gradient"),
        ({"normalize": "max"}, "unknown sinkd.normalize"),
        ({"temperature": 0.0}, r"sinkd.temperature: got 0.0; expected a number above 0"),
        ({"epsilon": -1.0}, "sinkd.epsilon"),
        ({"iterations": 0}, "sinkd.iterations"),
        ({"granularity": "sample", "epsilon": 0.2}, r"sinkd.epsilon: got 0.2, which has no effect"),
        ({"granularity": "sample", "gradient": "envelope"}, "no effect"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SinKD(**options)


def test_heads_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="teacher vocabulary is 4"):
        examples(torch.randn(3, 5), torch.randn(3, 4))
