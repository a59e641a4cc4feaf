"""TAID against the numbers of its official code, its identities, and the traps of that code."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from llmkd.divergences import TAID, forward_kl
from llmkd.errors import ConfigError
from llmkd.objectives import TokenDistill
from llmkd.rows import DenseRows, TopKRows, weighted_sum
from llmkd.trainer import DistillTrainer

# Fixture A of the method notes: two positions that count
Z_S = torch.tensor([[1.0, 0.5, -0.5, 0.0], [0.2, -0.1, 0.4, 0.3]], dtype=torch.float64)
Z_T = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, -0.5, 0.25]], dtype=torch.float64)
LOSS = {0.0: 1.30773171, 0.4: 1.28884157, 1.0: 1.27536953}  # cross-entropy form, mean of the two
TARGET = {0.4: [0.56930694, 0.18950582, 0.06971529, 0.17147195], 1.0: [0.71009992, 0.09610157, 0.03535379, 0.15844471]}
LOSSES = [2.0, 1.9, 1.95, 1.8, 1.8, 1.7]


def at(t: float) -> TAID:
    taid = TAID(t_start=0.0)
    taid.t = t
    return taid


def logs(*logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(z.log_softmax(-1) for z in logits)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_value_target_and_gradient(t):
    taid, z_s = at(t), Z_S.clone().requires_grad_()
    log_t, log_s = logs(Z_T, z_s)
    target = taid.target(log_t, log_s)
    assert taid.cross_entropy(log_t, log_s).mean().item() == pytest.approx(LOSS[t], abs=1e-8)
    if t in TARGET:
        torch.testing.assert_close(target.exp()[0], torch.tensor(TARGET[t], dtype=torch.float64), rtol=0, atol=1e-8)
    entropy = -(target.exp() * target).sum(-1)
    torch.testing.assert_close(taid(log_t, log_s) + entropy, taid.cross_entropy(log_t, log_s))
    (grad,) = torch.autograd.grad(taid(log_t, log_s).sum(), z_s)
    torch.testing.assert_close(grad, (log_s.exp() - target.exp()).detach(), rtol=0, atol=1e-12)


def test_the_ends():
    """At t = 0 the target is the student itself, without a gradient; at t = 1 it is the teacher."""
    z_s = Z_S.clone().requires_grad_()
    log_t, log_s = logs(Z_T, z_s)
    still = at(0.0)(log_t, log_s)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-12)
    assert (torch.autograd.grad(still.sum(), z_s, retain_graph=True)[0].abs() < 1e-12).all()
    torch.testing.assert_close(at(1.0)(log_t, log_s), forward_kl(log_t, log_s))


def test_the_target_is_a_geometric_mean_not_a_mixture():
    log_t, log_s = logs(Z_T, Z_S)
    mean = log_s.exp() ** 0.6 * log_t.exp() ** 0.4
    target = at(0.4).target(log_t, log_s).exp()
    torch.testing.assert_close(target, mean / mean.sum(-1, keepdim=True))
    assert not torch.allclose(target, 0.6 * log_s.exp() + 0.4 * log_t.exp(), atol=1e-3)


def run(taid: TAID, losses: list[float], steps: float) -> list[float]:
    values = []
    for step, loss in enumerate(losses):
        taid.after_step(step / steps, {"taid_ce": loss})
        values.append(taid.t)
    return values


def test_schedule_where_the_floor_leads():
    taid = TAID()
    assert run(taid, LOSSES, 10) == pytest.approx([0.4, 0.46, 0.52, 0.58, 0.64, 0.70], abs=1e-12)
    assert taid.momentum == pytest.approx(0.00153443, abs=1e-8)


def test_schedule_where_the_adaptive_step_leads():
    taid, seen = TAID(), []
    for step, loss in enumerate(LOSSES):
        taid.after_step(step / 1e6, {"taid_ce": loss})
        seen.append((taid.t, taid.delta))
    assert [t for t, _ in seen] == pytest.approx(
        [0.4, 0.40015004, 0.40030002, 0.40045002, 0.40059998, 0.40074994], abs=1e-8
    )
    assert [d for _, d in seen[1:]] == pytest.approx([1.5004e-4, 1.4998e-4, 1.5000e-4, 1.4996e-4, 1.4996e-4], abs=1e-8)


def test_schedule_of_large_steps():
    taid = TAID(alpha=1.0)
    assert run(taid, [2.0, 1.0, 0.5], 1e6) == pytest.approx([0.4, 0.70075, 0.85111938], abs=1e-8)
    assert taid.momentum == pytest.approx(0.00995, abs=1e-12)


def test_a_loss_that_leaps_from_almost_nothing_is_no_overflow():
    taid = TAID(alpha=1.0, beta=0.0)
    once = 0.4 + 0.6 / (1 + math.exp(-1))
    assert run(taid, [1e-12, 1e3, 0.0, 1.0], 1e9) == pytest.approx([0.4, 0.4, once, once], abs=1e-9)
    assert taid.momentum == pytest.approx(-1e15)


def test_schedule_laws():
    losses = [2.0, 3.0, 0.1, 5.0, 0.01] * 20
    values = run(TAID(t_start=0.2, t_end=0.9, alpha=0.5), losses, 100)
    assert values == sorted(values)
    assert max(values) <= 0.9
    floors = [0.2 + 0.7 * step / 100 for step in range(100)]
    assert all(value >= floor - 1e-12 for value, floor in zip(values[1:], floors[1:], strict=True))
    constant = TAID()
    run(constant, [1.0, 1.0], 1e9)
    assert constant.delta == pytest.approx(5e-4 / 2 * 0.6)


def test_without_adaptation_t_is_linear_and_blind_to_the_loss():
    wild = run(TAID(adaptive=False), [9.0, 0.1, 5.0, 7.0], 4)
    assert wild == pytest.approx([0.4, 0.55, 0.7, 0.85])
    assert wild == run(TAID(adaptive=False), [1.0, 1.0, 1.0, 1.0], 4)


@pytest.mark.parametrize(
    "knobs", [{"t_start": 1.0}, {"t_start": 0.5, "t_end": 0.4}, {"t_end": 1.1}, {"alpha": 2.0}, {"beta": 1.0}]
)
def test_knobs_out_of_range(knobs):
    with pytest.raises(ConfigError, match="taid"):
        TAID(**knobs)


def test_top_k_and_tail_equal_the_coarse_events():
    ids = Z_T.topk(2, -1).indices
    log_t = Z_T.log_softmax(-1)
    teacher = TopKRows(ids, log_t.gather(-1, ids), 4)
    z_s = Z_S.clone().requires_grad_()
    loss = weighted_sum(at(0.4), DenseRows(z_s), teacher, torch.ones(2), chunk_rows=1)
    full = weighted_sum(at(0.4), DenseRows(z_s), DenseRows(Z_T), torch.ones(2))
    assert 0 < loss.item() < full.item()
    every = torch.arange(4).expand(2, 4)
    same = weighted_sum(at(0.4), DenseRows(z_s), TopKRows(every, log_t, 4), torch.ones(2))
    torch.testing.assert_close(same, full)


@pytest.fixture
def make_trainer(split_trainer):
    return partial(
        split_trainer, lambda: TokenDistill(TAID(alpha=0.5)), max_steps=6, save_steps=3, optim="sgd", learning_rate=1.0
    )


def history(trainer: DistillTrainer) -> list[tuple[float, float]]:
    logs = trainer.state.log_history
    return [(entry["taid_t"], entry["taid_t_next"]) for entry in logs if "taid_t" in entry]


def test_t_moves_once_an_optimizer_step_from_the_whole_window(make_trainer):
    """The official code moves it in every forward: once a micro-batch, from that micro-batch's loss, in evaluation too."""
    whole, halves, split = (
        make_trainer(8, 1, eval_strategy="steps", eval_steps=1),
        make_trainer(4, 2),
        make_trainer(1, 8),
    )
    for trainer in (whole, halves, split):
        trainer.train()
    assert len(history(whole)) == 6
    for other in (halves, split):
        for one, two in zip(history(whole), history(other), strict=True):
            assert one == pytest.approx(two, abs=1e-6)
    used, after = zip(*history(whole), strict=True)
    assert used[0] == used[1] == 0.4
    assert used[1:] == after[:-1]
    assert after[-1] > 0.7
    logged = [entry for entry in whole.state.log_history if "taid_ce" in entry and "loss" in entry]
    assert all(entry["taid_ce"] > entry["taid"] >= 0 for entry in logged)


def test_a_run_counts_its_steps_as_the_golden_sequence_does(make_trainer):
    """After step n of N, from 0, t is at least t_start + (t_end - t_start) n / N; the first step leaves it."""
    trainer = make_trainer(max_steps=10, save_strategy="no")
    trainer.distiller.objective.fn.alpha = 5e-4
    trainer.train()
    floors = [0.4, 0.46, 0.52, 0.58, 0.64, 0.70, 0.76, 0.82, 0.88, 0.94]
    assert [after for _, after in history(trainer)] == pytest.approx(floors, abs=1e-12)
    assert [used for used, _ in history(trainer)] == pytest.approx([0.4, *floors[:-1]], abs=1e-12)


def test_resume_keeps_every_bit_of_the_schedule(make_trainer):
    whole = make_trainer()
    whole.train()
    again = make_trainer()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-3")
    first, second = (trainer.distiller.objective.step_state() for trainer in (whole, again))
    assert first == second
    assert math.isfinite(first["previous"])
    for ours, theirs in zip(whole.distiller.parameters(), again.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs)
