"""What evaluation always reports: KL, top-1 agreement, perplexity and bits per byte, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmkd.agreement import measure, summary
from llmkd.rows import DenseRows, HeadRows, TopKRows

N, V = 23, 17


def setting():
    student, teacher = nn.Linear(5, V, bias=False), nn.Linear(3, V, bias=True)
    rows = HeadRows(torch.randn(N, 5), student), HeadRows(torch.randn(N, 3), teacher, scale=0.5, softcap=2.0)
    return *rows, torch.randint(V, (N,))


def by_loops(student, teacher, labels) -> dict[str, float]:
    log_s, log_t = (x.logits(slice(None)).double().log_softmax(-1).tolist() for x in (student, teacher))
    out = dict.fromkeys(("nll", "kl", "top1_agreement", "teacher_nll"), 0.0)
    for s, t, y in zip(log_s, log_t, labels.tolist(), strict=True):
        out["nll"] -= s[y]
        out["teacher_nll"] -= t[y]
        out["kl"] += sum(math.exp(b) * (b - a) for a, b in zip(s, t, strict=True))
        out["top1_agreement"] += s.index(max(s)) == t.index(max(t))
    return out


@pytest.mark.parametrize("dense", [True, False])
def test_sums_are_those_of_the_definitions(dense):
    student, teacher, labels = setting()
    expected = by_loops(student, teacher, labels)
    if dense:
        student, teacher = (DenseRows(x.logits(slice(None))) for x in (student, teacher))
    found = measure(student, teacher, labels)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name


def test_without_a_teacher_only_the_text_is_measured():
    student, teacher, labels = setting()
    found = measure(student, None, labels)
    assert set(found) == {"nll"}
    assert found["nll"].item() == pytest.approx(by_loops(student, teacher, labels)["nll"], rel=1e-5)


def test_a_teacher_of_few_events_is_compared_on_those():
    student, teacher, labels = setting()
    log_t = teacher.logits(slice(None)).log_softmax(-1).detach()
    best = log_t.topk(V)
    found = measure(student, TopKRows(best.indices, best.values, V), labels)
    assert set(found) == {"nll", "kl", "top1_agreement"}
    assert found["kl"].item() == pytest.approx(by_loops(student, teacher, labels)["kl"], rel=1e-4)
    few = log_t.topk(4)
    assert measure(student, TopKRows(few.indices, few.values, V), labels)["kl"] < found["kl"]


def test_a_student_that_is_its_teacher_agrees_in_everything():
    student, _, labels = setting()
    found = measure(student, student, labels)
    assert found["kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert found["top1_agreement"].item() == N
    assert found["nll"] == found["teacher_nll"]


def test_no_rows_measure_nothing():
    student, teacher, labels = setting()
    found = measure(HeadRows(student.hidden[:0], student.head), HeadRows(teacher.hidden[:0], teacher.head), labels[:0])
    assert {value.item() for value in found.values()} == {0.0}


def test_perplexity_and_bits_per_byte():
    """Of a text of 4 tokens and 10 bytes, each token with probability 1/8: perplexity 8, 12 bits in 10 bytes."""
    report = summary({"nll": math.log(8), "kl": 0.5, "teacher_nll": math.log(2)}, {"nll": 4 * math.log(8) / 10})
    assert report == {
        "kl": 0.5,
        "perplexity": pytest.approx(8),
        "bits_per_byte": pytest.approx(1.2),
        "teacher_perplexity": pytest.approx(2),
    }
    assert math.isfinite(summary({"nll": 1e6}, {})["perplexity"])
