"""PS-KD: labels in the first epoch, then a growing share of what the student said an epoch ago."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fixture_a import LABEL, Z_S, Z_T, logs
from test_trainer import arguments, rows

from llmkd import CrossEntropy, DistillTrainer
from llmkd.divergences import forward_kl
from llmkd.errors import ConfigError
from llmkd.objectives import PSKD
from llmkd.objectives.ps_kd import softened_cross_entropy, softened_label
from llmkd.rows import DenseRows, TopKRows
from llmkd.teachers import PreviousEpoch
from llmkd.types import Outputs

BATCH = {"labels": torch.tensor([[-100, 0, 1, -100]])}


def loss_of(objective, z_s=Z_S, teacher=None) -> dict[str, torch.Tensor]:
    return objective(Outputs(DenseRows(z_s)), Outputs(teacher or DenseRows(Z_T)), BATCH)


def by_hand(p: list[float], log_q: list[float], label: int, share: float) -> float:
    return -sum(((1 - share) * (c == label) + share * x) * y for c, (x, y) in enumerate(zip(p, log_q, strict=True)))


@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_value_against_a_loop(share):
    log_t, log_s = logs(Z_T, Z_S)
    each = zip(log_t.exp().tolist(), log_s.tolist(), LABEL.tolist(), strict=True)
    expected = torch.tensor([by_hand(p, log_q, y, share) for p, log_q, y in each], dtype=torch.float64)
    torch.testing.assert_close(softened_cross_entropy(log_t, log_s, LABEL, share=share), expected)
    loss = loss_of(PSKD(share))
    torch.testing.assert_close(loss["total"], expected.sum())
    torch.testing.assert_close(loss["ps_kd"], expected.sum())


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_gradient_is_the_student_minus_the_target(share):
    z_s, log_t = Z_S.clone().requires_grad_(), Z_T.log_softmax(-1)
    target = softened_label(log_t, LABEL, share)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target.sum(-1)))
    (grad,) = torch.autograd.grad(loss_of(PSKD(share), z_s)["total"], z_s)
    torch.testing.assert_close(grad, (z_s.softmax(-1) - target).detach())
    (plain,) = torch.autograd.grad(softened_cross_entropy(log_t, z_s.log_softmax(-1), LABEL, share=share).sum(), z_s)
    torch.testing.assert_close(plain, grad)


def test_it_is_a_mix_of_cross_entropy_and_kl_up_to_the_target_s_entropy():
    log_t, log_s = logs(Z_T, Z_S)
    entropy = -(log_t.exp() * log_t).sum(-1)
    label = -log_s.gather(-1, LABEL[:, None]).squeeze(-1)
    expected = 0.4 * label + 0.6 * (forward_kl(log_t, log_s) + entropy)
    torch.testing.assert_close(softened_cross_entropy(log_t, log_s, LABEL, share=0.6), expected)


def test_the_share_grows_with_the_epochs_and_is_0_in_the_first():
    objective, seen = PSKD(0.8), []
    for epoch in range(4):
        objective.begin_epoch(epoch, 4)
        seen.append(objective.share)
        assert objective.logs() == {"ps_kd_share": objective.share}
    assert seen == pytest.approx([0.0, 0.4, 0.6, 0.8])
    objective.begin_epoch(1, 4)
    assert objective.share == pytest.approx(0.4), "a resumed run knows it from the epoch alone"


def test_the_first_epoch_is_cross_entropy_to_the_bit():
    objective = PSKD()
    objective.begin_epoch(0, 3)
    results = []
    for part in (objective, CrossEntropy()):
        z_s = Z_S.clone().requires_grad_()
        total = loss_of(part, z_s)["total"]
        results.append((total, torch.autograd.grad(total, z_s)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_confident_and_right_rows_get_a_smaller_gradient():
    """With the student's own past as target, a row that it had right already is pushed less than by its label alone."""
    z = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([0])
    sizes = [(z.softmax(-1) - softened_label(z.log_softmax(-1), label, share)).norm() for share in (0.0, 0.4, 0.8)]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_top_k_rows_and_excluded_events():
    log_t = Z_T.log_softmax(-1)
    ids = torch.tensor([[1, 3], [1, 3]])  # the label of row 0 is in the tail
    top = TopKRows(ids, log_t.gather(-1, ids), 4)
    pair = top.align(slice(0, 2), Z_S.log_softmax(-1), 1.0)
    expected = softened_cross_entropy(*pair, torch.tensor([2, 0]), share=0.8).sum()
    torch.testing.assert_close(loss_of(PSKD(), teacher=top)["total"], expected)
    z_t, z_s = Z_T.clone(), Z_S.clone()
    z_t[:, 2:], z_s[:, 3] = -torch.inf, -torch.inf
    z_s.requires_grad_()
    total = loss_of(PSKD(), z_s, DenseRows(z_t))["total"]
    assert total.isfinite()
    assert torch.autograd.grad(total, z_s)[0].isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 1.1])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ConfigError, match=r"ps_kd\.alpha"):
        PSKD(alpha)


@pytest.mark.parametrize(("epochs", "what"), [(1, "a run of one epoch"), (sys.maxsize, "data of unknown length")])
def test_a_run_without_a_second_epoch_is_an_error(epochs, what):
    with pytest.raises(ConfigError, match=what):
        PSKD().begin_epoch(0, epochs)


def test_training(make_model, tokenizer, tmp_path):
    """The first epoch's losses are cross-entropy's to the bit; the logged share is that of each epoch."""
    histories = []
    for objective, teacher in ((PSKD(0.9), PreviousEpoch()), (CrossEntropy(), None)):
        args = arguments(tmp_path / type(objective).__name__, max_steps=-1, num_train_epochs=3, learning_rate=1e-2)
        trainer = DistillTrainer(
            make_model(), teacher, objective, args, train_dataset=rows(), eval_dataset=rows(seed=4),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        histories.append([log for log in trainer.state.log_history if "loss" in log])
    ours, plain = histories
    assert [log["loss"] for log in ours[:4]] == [log["loss"] for log in plain[:4]]
    assert all(log["loss"] != other["loss"] for log, other in zip(ours[5:], plain[5:], strict=True))
    assert [log["ps_kd_share"] for log in ours] == pytest.approx([0.0] * 4 + [0.6] * 4 + [0.9] * 4)
    assert all(math.isfinite(log["loss"]) for log in ours)
