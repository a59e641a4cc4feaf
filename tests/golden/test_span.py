"""The span loss against the hand-computed pair, its identities, and its bounded columns; no official code is known."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from test_rows_cost import Watch
from torch import Tensor, nn
from transformers import TrainingArguments

from llmkd.data.collate import Collator, paired_rows
from llmkd.errors import ConfigError
from llmkd.objectives import CrossEntropy, Mix, SpanLoss
from llmkd.objectives.span import products
from llmkd.rows import DenseRows, HeadRows, TopKRows
from llmkd.trainer import DistillTrainer
from llmkd.types import Outputs

F64 = torch.float64
STUDENT = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=F64)
TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], dtype=F64)
V = 12


def loss(student: Tensor, teacher: Tensor | TopKRows, first: list[int], top_k: int = 64) -> dict[str, Tensor]:
    """The loss between rows of logits, with pairs that begin at these rows."""
    rows = teacher if isinstance(teacher, TopKRows) else DenseRows(teacher)
    batch = {"spans": torch.tensor(first, dtype=torch.long)}
    return SpanLoss(top_k)(Outputs(rows=DenseRows(student)), Outputs(rows=rows), batch)


def rows(n: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(2, n, V, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return z[0], z[1]


def on_cells(q: Tensor, p: Tensor, first: list[int], cells) -> Tensor:
    """The loss in a loop: the ids that `cells(i)` names, and all others together."""
    total = q.new_zeros(())
    for i in first:
        ids, cs = sorted(cells(i)), []
        for x in (q, p):
            rest = 1 - x[:, ids].sum(-1)
            cs.append(torch.cat([x[i, ids] * x[i + 1, ids], (rest[i] * rest[i + 1])[None]]))
        total = total + (cs[0] - cs[1]).pow(2).sum()
    return total


def test_golden():
    c_s, c_t = (products(torch.stack([x[:2], x[1:]]))[:, :3] for x in (STUDENT, TEACHER))
    torch.testing.assert_close(c_s, torch.tensor([[0.30, 0.09, 0.02], [0.12, 0.06, 0.06]], dtype=F64))
    torch.testing.assert_close(c_t, torch.tensor([[0.56, 0.02, 0.01], [0.08, 0.01, 0.08]], dtype=F64))
    assert (c_s - c_t).abs().sum(-1).mean().item() == pytest.approx(0.225)
    z_s, z_t = STUDENT.log(), TEACHER.log()
    assert loss(z_s, z_t, [0])["total"].item() == pytest.approx(0.0726)
    assert loss(z_s, z_t, [1])["total"].item() == pytest.approx(0.0045)
    out = loss(z_s, z_t, [0, 1])
    assert out["total"].item() / out["span_pairs"].item() == pytest.approx(0.03855)


@pytest.mark.parametrize("top_k", [1, 3, V])
def test_equal_models_have_no_loss_and_no_gradient(top_k):
    z, _ = rows()
    z = z.requires_grad_()
    kept, ids = z.detach().log_softmax(-1).topk(top_k)
    for teacher in (z.detach(), TopKRows(ids, kept, V)):
        total = loss(z, teacher, [0, 1, 5], top_k)["total"]
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-15)
        (grad,) = torch.autograd.grad(total, z)
        assert (grad.abs() < 1e-12).all()


@pytest.mark.parametrize("top_k", [1, 3, 8, V, 64])
def test_columns_are_the_best_of_either_row_and_the_rest(top_k):
    z_s, z_t = rows()
    z_s, first = z_s.requires_grad_(), [0, 1, 2, 5]
    best = z_t.topk(min(top_k, V)).indices.tolist()
    expected = on_cells(z_s.softmax(-1), z_t.softmax(-1), first, lambda i: {*best[i], *best[i + 1]})
    total = loss(z_s, z_t, first, top_k)["total"]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, z_s), torch.autograd.grad(expected, z_s))
    if top_k >= V:
        c_s, c_t = ((z.softmax(-1)[:-1] * z.softmax(-1)[1:])[first] for z in (z_s, z_t))
        torch.testing.assert_close(total, (c_s - c_t).pow(2).sum())


@pytest.mark.parametrize("k", [1, 4, 9, V])
def test_a_teacher_of_k_events_and_a_tail_knows_the_ids_of_both_rows(k):
    z_s, z_t = rows()
    z_s, first = z_s.requires_grad_(), [0, 1, 2, 5]
    kept, ids = z_t.log_softmax(-1).topk(k)
    order = torch.argsort(torch.rand(ids.shape), dim=-1)  # the order of the events does not matter
    top = TopKRows(ids.gather(1, order), kept.gather(1, order), V)
    best = ids.tolist()
    expected = on_cells(z_s.softmax(-1), z_t.softmax(-1), first, lambda i: {*best[i]} & {*best[i + 1]})
    total = loss(z_s, top, first)["total"]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, z_s), torch.autograd.grad(expected, z_s))
    if k == V:
        torch.testing.assert_close(total, loss(z_s, z_t, first)["total"])


def test_order_of_spans_events_and_shifts_do_not_matter():
    z_s, z_t = rows()
    total = loss(z_s, z_t, [0, 1, 4], 3)["total"]
    torch.testing.assert_close(loss(z_s, z_t, [4, 0, 1], 3)["total"], total)
    order = torch.randperm(V)
    torch.testing.assert_close(loss(z_s[:, order], z_t[:, order], [0, 1, 4], 3)["total"], total)
    torch.testing.assert_close(loss(z_s + 3, z_t - torch.arange(8.0)[:, None], [0, 1, 4], 3)["total"], total)
    swapped = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])  # two spans of three rows in another order
    torch.testing.assert_close(
        loss(z_s[swapped], z_t[swapped], [0, 1, 4, 5])["total"], loss(z_s, z_t, [0, 1, 4, 5])["total"]
    )


def test_gradcheck():
    z_s, z_t = rows(5)
    z_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, [0, 1, 3], 3)["total"], z_s)


def test_no_pairs():
    z_s, z_t = rows()
    z_s.requires_grad_()
    out = loss(z_s, z_t, [])
    assert out["total"] == out["span_pairs"] == 0
    assert (torch.autograd.grad(out["total"], z_s)[0] == 0).all()


def test_heads_in_half_precision_and_no_gradient_to_the_teacher():
    torch.manual_seed(0)
    first = torch.tensor([0, 2, 3])
    heads = [nn.Linear(6, V, bias=False) for _ in range(2)]
    hidden = [torch.randn(7, 6) for _ in range(2)]
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        pair = [
            HeadRows(h.to(dtype, copy=True).requires_grad_(), nn.Linear(6, V, bias=False, dtype=dtype), softcap=5.0)
            for h in hidden
        ]
        for mine, head in zip(pair, heads, strict=True):
            mine.head.weight.data.copy_(head.weight)
        total = SpanLoss(3)(*(Outputs(rows=x) for x in pair), {"spans": first})["total"]
        total.backward()
        assert total.dtype == torch.float32
        exact = total.detach() if exact is None else exact
        torch.testing.assert_close(total.detach(), exact, rtol=0.1, atol=1e-3)
        assert pair[0].hidden.grad.dtype == dtype
        assert pair[0].head.weight.grad.abs().sum() > 0
        assert pair[1].hidden.grad is None
        assert pair[1].head.weight.grad is None


def test_memory_is_that_of_a_chunk():
    """2000 rows of 20000 tokens: nothing of that size is made, and what is kept is small."""
    torch.manual_seed(0)
    student, teacher = (HeadRows(torch.randn(1001, 4), nn.Linear(4, 20000, bias=False)) for _ in range(2))
    student.hidden.requires_grad_()
    with Watch() as watch:
        total = SpanLoss()(Outputs(rows=student), Outputs(rows=teacher), {"spans": torch.arange(1000)})["total"]
        kept = watch.living()
        total.backward()
    assert watch.largest <= 1000 * 20000
    assert kept < 50 * 20000
    assert student.hidden.grad.abs().sum() > 0


def test_in_a_mix_the_sum_over_pairs_is_weighted():
    z_s, z_t = rows()
    batch = {"labels": torch.arange(9)[None].clone(), "spans": torch.tensor([0, 1])}
    batch["labels"][0, 0] = -100
    outs = Outputs(rows=DenseRows(z_s.requires_grad_())), Outputs(rows=DenseRows(z_t))
    mix = Mix([CrossEntropy(), SpanLoss()], [1.0, 5.0])
    assert mix.reads == {"spans"}
    total = mix(*outs, batch)
    torch.testing.assert_close(total["total"].detach(), total["cross_entropy"] + 5 * total["span"])
    assert total["span_pairs"] == 2


def test_errors():
    z_s, z_t = rows()
    with pytest.raises(ConfigError, match="top_k"):
        SpanLoss(0)
    with pytest.raises(ConfigError, match=r"data\.spans"):
        SpanLoss()(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), {})
    with pytest.raises(ConfigError, match="temperature"):
        loss(z_s, TopKRows(torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, 1), V, temperature=2.0), [0])


def test_a_trained_step_is_the_same_for_every_split_of_the_batch(make_model, tokenizer, tmp_path):
    """1x8 = 2x4 = 8x1; the mean over pairs is `span` / `span_pairs`."""
    examples = []
    for i in range(8):
        ids, number = list(range(3 + i, 15 + i)), [(t // (2 + i % 3)) + 1 for t in range(12)]
        labels = [-100, *ids[1:]] if i % 2 else [-100] * 7 + ids[7:]
        examples.append({"input_ids": ids, "labels": labels, "spans": number})
    trained, logged = [], []
    for micro, accumulation in ((8, 1), (4, 2), (1, 8)):
        args = TrainingArguments(
            output_dir=str(tmp_path / str(micro)), per_device_train_batch_size=micro, optim="sgd", learning_rate=1.0,
            gradient_accumulation_steps=accumulation, max_steps=2, logging_steps=1, use_cpu=True, save_strategy="no",
            train_sampling_strategy="sequential", report_to=[],
        )  # fmt: skip
        trainer = DistillTrainer(
            make_model(), make_model(seed=1), SpanLoss(8), args, Dataset.from_list(examples), processing_class=tokenizer
        )
        trainer.train()
        trained.append([p.detach() for p in trainer.distiller.parameters()])
        logged.append(next(entry for entry in trainer.state.log_history if "span" in entry))
    for other in trained[1:]:
        for one, two in zip(trained[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    batch = Collator(0)([{**example, "length": 12} for example in examples])
    assert logged[0]["span_pairs"] == pytest.approx(len(batch["spans"]) / len(batch["rows"]))
    assert logged[0]["loss"] == pytest.approx(logged[0]["span"])


def test_pairs_are_adjacent_supervised_tokens_of_one_span():
    spans = torch.tensor([[1, 1, 1, 0, 0, 2, 2, 3], [1, 1, 2, 2, 2, 2, 0, 0]])
    labels = torch.tensor([[-100, 5, 5, 5, 5, 5, 5, 5], [-100, -100, 5, 5, -100, 5, 5, -100]])
    rows = (labels.flatten() != -100).nonzero().squeeze(-1) - 1
    first = paired_rows(spans, rows)
    tokens = [(int(rows[i]) + 1, int(rows[i + 1]) + 1) for i in first]
    assert tokens == [(1, 2), (5, 6), (10, 11)]
