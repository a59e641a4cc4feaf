"""What holds for every objective: sums, not means; metrics without a graph; one teacher, if it needs one."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_rows, head_logits, instance
from torch import Tensor, nn

from llmkd.data.collate import paired_rows
from llmkd.divergences import DIVERGENCES, reads_label
from llmkd.divergences.taid import TAID
from llmkd.errors import ConfigError
from llmkd.objectives import OBJECTIVES, CrossEntropy, Mix, TokenDistill
from llmkd.rows import HeadRows, TopKRows
from llmkd.types import Kind, Outputs, Signal, supervised_rows

# what reads logits of tokens; tests/test_regression.py and tests/test_hidden_mse.py have the laws of the others
NAMES = sorted(
    name
    for name, entry in OBJECTIVES.items()
    if Kind.DISTRIBUTION in entry.takes and Signal.HIDDEN_STATES not in entry.needs
)
NEED_A_TEACHER = ["token", "sinkd", "dkd", "nkd", "ofa", "ps_kd", "span"]
COUPLED = {
    "sinkd",
    "uskd",
}  # the rows of one batch are coupled: parts do not add up; tests/golden says what does
ADDITIVE = [name for name in NAMES if name not in COUPLED]
B, T, V, HS, HT = 4, 7, 11, 5, 3


def batch_of(examples: slice = slice(0, B)) -> dict[str, Tensor]:
    """Labels with a prompt, padding and one example without any supervised token."""
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
    for row, (start, stop) in enumerate([(3, 7), (1, 5), (7, 7), (2, 4)]):
        labels[row, :start], labels[row, stop:] = -100, -100
    spans = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 0, 0], [1] * T, [0] * T])[examples]
    batch = {"input_ids": labels.clamp_min(0)[examples], "labels": labels[examples]}
    return {**batch, "spans": paired_rows(spans, supervised_rows(batch))}


def model(batch: dict[str, Tensor], size: int, seed: int, examples: slice = slice(0, B)) -> Outputs:
    """One row a supervised label of the examples; the same rows for the same examples."""
    torch.manual_seed(seed)
    head, hidden = nn.Linear(size, V, bias=False).double(), 2 * torch.randn(B, T, size).double()
    kept = hidden[examples][batch["labels"] != -100]
    return Outputs(rows=HeadRows(kept.requires_grad_(), head), hidden_states=(hidden[examples],) * 3)


def setting(examples: slice = slice(0, B)) -> tuple[Outputs, Outputs, dict[str, Tensor]]:
    batch = batch_of(examples)
    return model(batch, HS, 1, examples), model(batch, HT, 2, examples), batch


def logits(outputs: Outputs) -> Tensor:
    return head_logits(outputs.rows.hidden, outputs.rows.head)


def targets(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"][batch["labels"] != -100]


def grads(loss: Tensor, student: Outputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [student.rows.hidden, student.rows.head.weight], retain_graph=True)


def assert_same(loss: Tensor, expected: Tensor, student: Outputs) -> None:
    torch.testing.assert_close(loss, expected)
    for grad, reference in zip(grads(loss, student), grads(expected, student), strict=True):
        torch.testing.assert_close(grad, reference)


def half_l2(log_t: Tensor, log_s: Tensor) -> Tensor:
    """A divergence that is in no table and has no closed form."""
    return 0.5 * (log_t.exp() - log_s.exp()).pow(2).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_dict_with_a_total_and_detached_metrics(name):
    loss = OBJECTIVES[name]()(*setting())
    assert loss["total"].shape == ()
    assert loss["total"].requires_grad
    metrics = {key: value for key, value in loss.items() if key != "total"}
    assert metrics
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ADDITIVE)
def test_the_parts_of_a_batch_add_up(name):
    whole = OBJECTIVES[name]()(*setting())
    parts = [OBJECTIVES[name]()(*setting(examples)) for examples in (slice(0, 1), slice(1, 3), slice(3, B))]
    for key, value in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts), value)


@pytest.mark.parametrize("name", ADDITIVE)
def test_gradients_of_the_parts_add_up(name):
    (student, teacher, batch), objective = setting(), OBJECTIVES[name]()
    hidden, weight = grads(objective(student, teacher, batch)["total"], student)
    parts = []
    for examples in (slice(0, 2), slice(2, B)):
        part = setting(examples)
        parts.append(grads(objective(*part)["total"], part[0]))
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), hidden)
    torch.testing.assert_close(sum(part[1] for part in parts), weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_supervised_tokens_is_zero_with_a_graph(name):
    student, teacher, batch = setting(slice(2, 3))
    loss = OBJECTIVES[name]()(student, teacher, batch)
    assert len(student.rows) == 0
    assert all(value == 0 for value in loss.values())
    assert all((grad == 0).all() for grad in grads(loss["total"], student))


@pytest.mark.parametrize("name", NEED_A_TEACHER)
def test_a_missing_teacher_is_an_error(name):
    student, _, batch = setting()
    with pytest.raises(ConfigError, match="teacher"):
        OBJECTIVES[name]()(student, None, batch)


def test_the_teacher_gets_no_gradient():
    student, teacher, batch = setting()
    TokenDistill()(student, teacher, batch)["total"].backward()
    assert teacher.rows.hidden.grad is None
    assert teacher.rows.head.weight.grad is None


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_token_distillation_is_the_sum_over_rows(name):
    student, teacher, batch = setting()
    loss, fn = TokenDistill(name)(student, teacher, batch), instance(DIVERGENCES, name)
    label = (targets(batch),) if reads_label(fn) else ()
    assert_same(loss["total"], dense_rows(fn, logits(student), logits(teacher), *label).sum(), student)
    torch.testing.assert_close(loss[name], loss["total"].detach())


def test_forward_kl_is_the_default():
    default, named = (objective(*setting())["total"] for objective in (TokenDistill(), TokenDistill("forward_kl")))
    assert torch.equal(default, named)


@pytest.mark.parametrize("scale_by_t2", [False, True])
def test_temperature(scale_by_t2):
    student, teacher, batch = setting()
    loss = TokenDistill("forward_kl", temperature=2.5, scale_by_t2=scale_by_t2)(student, teacher, batch)
    dense = dense_rows(DIVERGENCES["forward_kl"], logits(student), logits(teacher), temperature=2.5).sum()
    assert_same(loss["total"], dense * (2.5**2 if scale_by_t2 else 1.0), student)


def test_a_divergence_of_the_user():
    student, teacher, batch = setting()
    loss = TokenDistill(half_l2)(student, teacher, batch)
    assert_same(loss["total"], dense_rows(half_l2, logits(student), logits(teacher)).sum(), student)


class Weighted(nn.Module):
    """A divergence with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        return self.gain**2 * DIVERGENCES["forward_kl"](log_t, log_s)


def test_a_divergence_with_parameters_is_trained_and_saved_with_the_objective():
    (student, teacher, batch), fn = setting(), Weighted()
    objective = TokenDistill(fn)
    assert [id(p) for p in objective.parameters()] == [id(fn.gain)]
    assert len(objective.state_dict()) == 1
    total = objective(student, teacher, batch)["total"]
    dense = dense_rows(fn, logits(student), logits(teacher)).sum()
    assert_same(total, dense, student)
    torch.testing.assert_close(torch.autograd.grad(total, fn.gain), torch.autograd.grad(dense, fn.gain))


def test_a_top_k_teacher():
    student, teacher, batch = setting()
    log_t = torch.log_softmax(logits(teacher).detach(), -1)
    kept, ids = log_t.topk(4)
    top = TokenDistill()(student, Outputs(rows=TopKRows(ids, kept, V)), batch)["total"]
    assert top <= TokenDistill()(student, teacher, batch)["total"]
    assert top > 0


def test_cross_entropy_is_torch_s_sum():
    student, _, batch = setting()
    loss = CrossEntropy()(student, None, batch)
    expected = nn.functional.cross_entropy(logits(student), targets(batch), reduction="sum")
    assert_same(loss["total"], expected, student)
    torch.testing.assert_close(loss["cross_entropy"], expected.detach())


def test_mix_weighs_the_totals_and_not_the_metrics():
    student, teacher, batch = setting()
    parts = [TokenDistill("reverse_kl", temperature=2.0), CrossEntropy()]
    first, second = (part(student, teacher, batch) for part in parts)
    loss = Mix(parts, weights=[0.25, 3.0])(student, teacher, batch)
    assert_same(loss["total"], 0.25 * first["total"] + 3.0 * second["total"], student)
    assert set(loss) == {"total", "reverse_kl", "cross_entropy"}
    torch.testing.assert_close(loss["reverse_kl"], first["reverse_kl"])
    torch.testing.assert_close(loss["cross_entropy"], second["cross_entropy"])
    assert not loss["reverse_kl"].requires_grad
    assert not loss["cross_entropy"].requires_grad


def test_mix_of_two_divergences_with_different_gradients():
    """One with a closed form, one of the user, one at another temperature: they share a pass over the head."""
    student, teacher, batch = setting()
    parts = [TokenDistill("reverse_kl"), TokenDistill(half_l2, temperature=0.7), TokenDistill("forward_kl", 3.0, True)]
    z_s, z_t = logits(student), logits(teacher)
    first = dense_rows(DIVERGENCES["reverse_kl"], z_s, z_t).sum()
    second = dense_rows(half_l2, z_s, z_t, temperature=0.7).sum()
    third = dense_rows(DIVERGENCES["forward_kl"], z_s, z_t, temperature=3.0).sum()
    loss = Mix(parts, weights=[2.0, 0.5, 0.1])(student, teacher, batch)
    assert_same(loss["total"], 2 * first + 0.5 * second + 0.1 * 9 * third, student)
    assert len(loss) == 4


def test_one_divergence_with_parameters_in_two_parts():
    (student, teacher, batch), fn = setting(), Weighted()
    loss = Mix([TokenDistill(fn), TokenDistill(fn, temperature=2.0)], weights=[1.0, 0.5])(student, teacher, batch)
    z_s, z_t = logits(student), logits(teacher)
    dense = dense_rows(fn, z_s, z_t).sum() + 0.5 * dense_rows(fn, z_s, z_t, temperature=2.0).sum()
    assert_same(loss["total"], dense, student)
    torch.testing.assert_close(torch.autograd.grad(loss["total"], fn.gain), torch.autograd.grad(dense, fn.gain))


def test_each_of_two_parts_that_watch_steps_gets_its_own_metrics():
    """Two TAIDs, one from a harder start: both schedules move as they do alone."""
    student, teacher, batch = setting()

    def parts():
        return [
            TokenDistill(TAID(t_start=start, alpha=0.5), temperature=heat) for start, heat in ((0.1, 1.0), (0.6, 3.0))
        ]

    alone, mixed = parts(), parts()
    mix = Mix(mixed)
    for step in range(3):
        weaker = Outputs(rows=student.rows.using([(1 + step) * t for t in student.rows.tensors()]))
        for part in alone:
            part.after_step(step / 3, {k: v.item() for k, v in part(weaker, teacher, batch).items()})
        found = mix(weaker, teacher, batch)
        assert {"taid", "taid_ce", "taid_2", "taid_ce_2"} < set(found)
        mix.after_step(step / 3, {name: value.item() for name, value in found.items()})
    for one, other in zip(alone, mixed, strict=True):
        assert one.step_state() == pytest.approx(other.step_state(), rel=1e-6)
    assert alone[0].step_state()["previous"] != pytest.approx(alone[1].step_state()["previous"], rel=1e-2)
    assert mix.logs()["taid_t_2"] == alone[1].logs()["taid_t"]


def test_a_frozen_student_still_trains_the_divergence():
    (student, teacher, batch), fn = setting(), Weighted()
    student.rows.hidden = student.rows.hidden.detach()
    student.rows.head.requires_grad_(False)
    total = Mix([TokenDistill(fn), TokenDistill("forward_kl")], weights=[1.0, 0.5])(student, teacher, batch)["total"]
    dense = dense_rows(fn, logits(student), logits(teacher)).sum()
    torch.testing.assert_close(torch.autograd.grad(total, fn.gain), torch.autograd.grad(dense, fn.gain))


def test_factors_are_not_rounded_to_half_precision():
    """A weight of 0.3 and a T^2 of 2.89 keep their digits on bfloat16 hidden states."""
    student, teacher, batch = setting()
    for rows in (student.rows, teacher.rows):
        rows.hidden, rows.head = rows.hidden.detach().bfloat16().requires_grad_(), rows.head.bfloat16()
    exact = {"rtol": 1e-5, "atol": 0}
    plain, scaled = (TokenDistill(temperature=1.7, scale_by_t2=flag)(student, teacher, batch) for flag in (False, True))
    torch.testing.assert_close(scaled["total"], 1.7**2 * plain["total"], **exact)
    mixed = Mix([TokenDistill(temperature=1.7)], weights=[0.3])(student, teacher, batch)
    torch.testing.assert_close(mixed["total"], 0.3 * plain["total"], **exact)
    torch.testing.assert_close(mixed["forward_kl"], plain["forward_kl"], **exact)


def test_mix_needs_what_its_parts_need_and_owns_their_parameters():
    mix = Mix([TokenDistill(Weighted()), CrossEntropy()], weights=[1.0, 1.0])
    assert mix.needs == TokenDistill().needs | CrossEntropy().needs
    assert len(list(mix.parameters())) == 1
    student, _, batch = setting()
    with pytest.raises(ConfigError, match="teacher"):
        mix(student, None, batch)
    CrossEntropy()(student, None, batch)


def test_a_mix_needs_a_weight_for_every_part():
    with pytest.raises(ConfigError):
        Mix([CrossEntropy()], weights=[1.0, 2.0])


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        TokenDistill("forward_kl", temperature=temperature)


def test_an_unknown_divergence_is_an_error_that_names_the_near_one():
    with pytest.raises(ConfigError, match="forward_kl"):
        TokenDistill("foward_kl")
