"""USKD: the label's own weight, Zipf's law over the others' ranks, a weak head on the middle layer."""

from __future__ import annotations

import math

import pytest
import torch
from classes import CLASSES, classifier, data
from test_trainer import arguments, rows
from torch import Tensor, nn

from llmkd import CrossEntropy, DistillTrainer, Mix
from llmkd.errors import ConfigError
from llmkd.objectives import USKD
from llmkd.objectives.uskd import smoothed_nll, zipf_cross_entropy, zipf_labels
from llmkd.rows import DenseRows, HeadRows
from llmkd.types import Outputs

N, V, H = 6, 9, 4


@pytest.fixture
def z() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the weak head and of the student, and labels."""
    torch.manual_seed(3)
    weak, student = 2 * torch.randn(2, N, V, dtype=torch.float64)
    return weak, student, torch.randint(V, (N,))


def ranks(w: list[float], q: list[float], y: int) -> list[int]:
    """Classes but y, the best first, as the paper ranks them."""
    score = {c: w[c] / (1 - w[y]) + q[c] / (1 - q[y]) for c in range(len(q)) if c != y}
    return sorted(score, key=lambda c: -score[c])


def others_by_hand(w: list[float], q: list[float], y: int) -> float:
    order = ranks(w, q, y)
    norm = sum(1 / r for r in range(1, len(order) + 1))
    return -sum(1 / r / norm * math.log(q[c] / (1 - q[y])) for r, c in enumerate(order, start=1))


def by_hand(weak: Tensor, student: Tensor, label: Tensor, alpha: float, beta: float, mu: float) -> float:
    w, q, total = weak.softmax(-1).tolist(), student.softmax(-1).tolist(), 0.0
    mean = sum(q[i][y] ** 2 for i, y in enumerate(label.tolist())) / len(q)
    for i, y in enumerate(label.tolist()):
        total -= alpha * (q[i][y] ** 2 + 1 - mean) * math.log(q[i][y])
        total += beta * others_by_hand(w[i], q[i], y)
        total -= mu * sum((0.9 * (c == y) + 0.1 / V) * math.log(w[i][c]) for c in range(V))
    return total


class Fixed(nn.Module):
    """A weak head whose logits are its input's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(V, dtype=torch.float64)), None


def setting(weak: Tensor, student: Tensor, label: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
    """Rows of a text whose middle states are the weak head's logits."""
    labels = torch.cat([torch.tensor([-100]), label])[None]
    states = torch.cat([weak, torch.zeros_like(weak[:1])])[None]
    return Outputs(DenseRows(student), hidden_states=(states,) * 3), {"labels": labels}


def test_value_against_loops(z):
    outputs, batch = setting(*z)
    for knobs in ((1.0, 0.1, 0.005), (0.1, 0.7, 0.3)):
        loss = USKD(*knobs, weak_head=Fixed())(outputs, None, batch)
        assert loss["total"].item() == pytest.approx(by_hand(*z, *knobs), rel=1e-12)
    each = zip(z[0].softmax(-1).tolist(), z[1].softmax(-1).tolist(), z[2].tolist(), strict=True)
    assert loss["uskd_others"].item() == pytest.approx(sum(others_by_hand(*row) for row in each), rel=1e-12)


def test_the_label_s_weights_have_mean_one_and_grow_with_its_probability(z):
    """With alpha alone, the gradient of a row is P (q - y)."""
    weak, student, label = z
    student = student.clone().requires_grad_()
    outputs, batch = setting(weak, student, label)
    total = USKD(1.0, 0.0, 0.0, weak_head=Fixed())(outputs, None, batch)["total"]
    (grad,) = torch.autograd.grad(total, student)
    q = student.detach().softmax(-1)
    weights = grad[torch.arange(N), label] / (q[torch.arange(N), label] - 1)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64))
    mine = q[torch.arange(N), label]
    torch.testing.assert_close(weights, mine**2 + 1 - (mine**2).mean())


def test_zipf_s_law(z):
    weak, student, label = (z[0].log_softmax(-1), z[1].log_softmax(-1), z[2])
    labels = zipf_labels(weak, student, label, V)
    torch.testing.assert_close(labels.sum(-1), torch.ones(N, dtype=torch.float64))
    assert (labels[torch.arange(N), label] == 0).all()
    norm = sum(1 / r for r in range(1, V))
    for i in range(N):
        order = ranks(weak[i].exp().tolist(), student[i].exp().tolist(), int(label[i]))
        expected = torch.tensor([1 / r / norm for r in range(1, V)], dtype=torch.float64)
        torch.testing.assert_close(labels[i, order], expected)


def test_beyond_top_k_all_share_what_the_law_gives_them(z):
    weak, student, label = (z[0].log_softmax(-1), z[1].log_softmax(-1), z[2])
    whole, cut = (zipf_labels(weak, student, label, k) for k in (V, 3))
    head = whole.topk(3).indices
    torch.testing.assert_close(cut.gather(-1, head), whole.gather(-1, head))
    torch.testing.assert_close(cut.sum(-1), whole.sum(-1))
    rest = cut.scatter(-1, head, 0.0).scatter(-1, label[:, None], 0.0)
    assert ((rest > 0).sum(-1) == V - 4).all()
    assert rest.amax() == pytest.approx(rest[rest > 0].min().item())


def test_the_label_takes_no_rank_and_no_logarithm_ranks():
    """The official code counts the label's own place, and ranks by log q (a variable used twice): both change the order."""
    w = torch.tensor([[0.2, 0.4, 0.24, 0.16]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.075, 0.15, 0.275]], dtype=torch.float64)
    label = torch.tensor([0])
    labels = zipf_labels(w.log(), q.log(), label, 4)[0]
    norm = 1 + 1 / 2 + 1 / 3
    score = w / (1 - w[:, :1]) + q / (1 - q[:, :1])
    official = w / (1 - w[:, :1]) + q.log() / (1 - q.log()[:, :1])
    assert score[0, 1:].argsort(descending=True).tolist() == [2, 0, 1]
    assert official[0, 1:].argsort(descending=True).tolist() != [2, 0, 1]
    torch.testing.assert_close(labels, torch.tensor([0, 1 / 2, 1 / 3, 1], dtype=torch.float64) / norm)


def test_the_others_do_not_feel_the_label_s_logit(z):
    weak, student, label = z
    plain = zipf_cross_entropy(weak.log_softmax(-1), student.log_softmax(-1), label, top_k=5)
    moved = [x.clone() for x in (weak, student)]
    for x, by in zip(moved, (3.0, -2.0), strict=True):
        x[torch.arange(N), label] += by
    torch.testing.assert_close(zipf_cross_entropy(*(x.log_softmax(-1) for x in moved), label, top_k=5), plain)


def test_gradients(z):
    weak, student, label = z
    log_w, student = weak.log_softmax(-1), student.clone().requires_grad_()
    log_s = student.log_softmax(-1)
    (grad,) = torch.autograd.grad(zipf_cross_entropy(log_w, log_s, label, top_k=5).sum(), student, retain_graph=True)
    torch.testing.assert_close(zipf_cross_entropy.grad(log_w, log_s.detach(), label, top_k=5), grad)
    assert (grad[torch.arange(N), label].abs() < 1e-15).all()
    (grad,) = torch.autograd.grad(smoothed_nll(None, log_s, label).sum(), student)
    torch.testing.assert_close(smoothed_nll.grad(None, log_s.detach(), label), grad)
    expected = nn.functional.cross_entropy(student, label, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(smoothed_nll(None, log_s, label).sum(), expected)


def test_excluded_events_are_finite(z):
    weak, student, label = (x.clone() for x in z)
    label[:] = 0
    weak[:, 3:5], student[:, 4:6] = -torch.inf, -torch.inf
    student.requires_grad_()
    outputs, batch = setting(weak.nan_to_num(neginf=-1e9), student, label)
    total = USKD(weak_head=Fixed())(outputs, None, batch)["total"]
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


def test_a_causal_lm_reads_its_middle_layer_with_its_own_frozen_head(make_model):
    """Without the other terms only the layers up to the middle learn; the states are brought to the last ones' size."""
    from llmkd.distiller import Distiller

    model = make_model(num_hidden_layers=4)
    ids = torch.randint(3, 259, (2, 7))
    labels = ids.clone()
    labels[:, 0] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    distiller = Distiller(model, Mix([USKD(alpha=0.0, beta=0.0, mu=1.0)]), 259)
    total = distiller(**batch)["total"]
    total.backward()
    moved = [layer.mlp.up_proj.weight.grad.abs().max() > 0 for layer in model.model.layers[:2]]
    assert all(moved)
    for module in (*model.model.layers[2:], model.lm_head):
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        middle, last = out.hidden_states[2][:, :-1].flatten(0, 1), out.hidden_states[-1][:, :-1].flatten(0, 1)
        scale = last.square().mean(-1, keepdim=True).sqrt() / middle.square().mean(-1, keepdim=True).sqrt()
        logits = (middle * scale) @ model.lm_head.weight.t()[:, :259]
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_rows_and_chunks_of_a_head(z):
    """A head in chunks gives what dense rows do, and its weights learn."""
    weak, _, label = z
    torch.manual_seed(1)
    head, hidden = nn.Linear(H, V).double(), torch.randn(N, H, dtype=torch.float64)
    outputs, batch = setting(weak, head(hidden), label)
    dense = USKD(weak_head=Fixed())(outputs, None, batch)["total"]
    outputs.rows = HeadRows(hidden, head)
    total = USKD(weak_head=Fixed())(outputs, None, batch)["total"]
    torch.testing.assert_close(total, dense)
    ours, plain = (torch.autograd.grad(x, head.weight)[0] for x in (total, dense))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("half", [False, True])
def test_training_a_causal_lm(make_model, tokenizer, tmp_path, half):
    objective = Mix([CrossEntropy(), USKD()])
    trainer = DistillTrainer(
        make_model(), None, objective, arguments(tmp_path, max_steps=20, learning_rate=1e-2, bf16=half),
        train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert {"uskd_others", "uskd_weak", "cross_entropy"} <= trainer.state.log_history[1].keys()


def test_training_a_classifier_and_going_on(tokenizer, tmp_path):
    def make(folder: str) -> DistillTrainer:
        torch.manual_seed(2)
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return DistillTrainer(
            classifier(), None, Mix([CrossEntropy(), USKD(mu=0.5, weak_head=nn.Linear(32, CLASSES))]),
            arguments(tmp_path / folder, **steps), train_dataset=data(), eval_dataset=data(4), processing_class=tokenizer,
        )  # fmt: skip

    whole, again = make("a"), make("b")
    start = whole.distiller.objective.parts[1].weak_head.weight.detach().clone()
    whole.train()
    nn.init.zeros_(again.distiller.objective.parts[1].weak_head.weight)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, ours), theirs in zip(again.distiller.named_parameters(), whole.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(whole.distiller.objective.parts[1].weak_head.weight, start)


def test_errors(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="top_k: got 0"):
        USKD(top_k=0)
    trainer = DistillTrainer(
        classifier(), None, USKD(), arguments(tmp_path), train_dataset=data(), processing_class=tokenizer
    )
    with pytest.raises(ConfigError, match=r"weak_head=nn\.Linear\(32, 3\)"):
        trainer.train()
