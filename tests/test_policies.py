"""Policies: what each weighs, on whole and on top-k rows, and that any divergence can be weighed by them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from oracles import instance
from torch import Tensor, nn

from llmkd import build
from llmkd.divergences import DIVERGENCES, TAID, forward_kl, reads_label, reverse_kl
from llmkd.errors import ConfigError
from llmkd.objectives import Mix, TokenDistill
from llmkd.policies import POLICIES, confidence_gate, entropy_balance, reciprocal_rank
from llmkd.rows import DenseRows, HeadRows, TopKRows
from llmkd.types import Outputs

N, V = 12, 9
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
BATCH = {"labels": torch.cat([torch.tensor([-100]), LABELS])[None]}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(2, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return z[0], z[1].requires_grad_()


def entropy(row: list[float]) -> float:
    return -math.fsum(math.exp(x) * x for x in row)


def by_hand(name: str, t: list[float], s: list[float], label: int, **knobs) -> float:
    """One token's weight, from the formula."""
    if name == "entropy_balance":
        excess, nu, kappa = entropy(s) - entropy(t), knobs.get("nu", 2.0), knobs.get("kappa", 0.0)
        share = 1 / (1 + math.exp(-excess / kappa)) if kappa else float(excess > 0)
        return 1 + (nu - 1) * (share if knobs.get("when", "flatter") == "flatter" else 1 - share)
    if name == "reciprocal_rank":
        rank = 1 + sum(x > t[label] for x in t)
        return 1 / rank if rank <= knobs.get("k", 10) else 0.0
    if knobs.get("by") == "top":
        return float(max(t) > max(s))
    return float(t[label] > s[label])


CASES = [
    ("entropy_balance", {}),
    ("entropy_balance", {"when": "sharper", "nu": 3.0}),
    ("entropy_balance", {"kappa": 0.5}),
    ("entropy_balance", {"kappa": 0.5, "when": "sharper"}),
    ("reciprocal_rank", {}),
    ("reciprocal_rank", {"k": 3}),
    ("confidence_gate", {}),
    ("confidence_gate", {"by": "top"}),
]


def test_every_policy_is_tested():
    assert {name for name, _ in CASES} == set(POLICIES)


def loss_of(objective, z_t, z_s) -> dict[str, Tensor]:
    teacher = z_t if isinstance(z_t, TopKRows) else DenseRows(z_t)
    return objective(Outputs(DenseRows(z_s)), Outputs(teacher), BATCH)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_the_weighted_loss_and_its_gradient(logits, name, knobs, temperature):
    """The total is weighted, without a gradient through the weights; the metric is not; the weights are reported."""
    z_t, z_s = logits
    log_t, log_s = ((z / temperature).log_softmax(-1) for z in (z_t, z_s))
    rows = zip(log_t.tolist(), log_s.tolist(), LABELS.tolist(), strict=True)
    weights = torch.tensor([by_hand(name, t, s, y, **knobs) for t, s, y in rows], dtype=torch.float64)
    assert weights.unique().numel() > 1
    for divergence in ("forward_kl", "topk_mix", lambda log_t, log_s: (log_t.exp() - log_s.exp()).square().sum(-1)):
        fn = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
        loss = loss_of(TokenDistill(divergence, temperature, policy=partial(POLICIES[name], **knobs)), z_t, z_s)
        expected = (weights * fn(log_t, log_s)).sum()
        torch.testing.assert_close(loss["total"], expected)
        grads = [torch.autograd.grad(total, z_s, retain_graph=True)[0] for total in (loss["total"], expected)]
        torch.testing.assert_close(*grads)
        metrics = [value for key, value in loss.items() if key not in ("total", name)]
        torch.testing.assert_close(metrics, [fn(log_t, log_s).sum().detach()])
        torch.testing.assert_close(loss[name], weights.sum())
        assert (grads[0][weights == 0] == 0).all()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_any_divergence_with_any_policy(logits, name, divergence):
    z_t, z_s = logits
    fn = instance(DIVERGENCES, divergence)
    log_t, log_s = z_t.log_softmax(-1), z_s.log_softmax(-1)
    loss = loss_of(TokenDistill(fn, policy=name), z_t, z_s)
    weights = POLICIES[name](log_t, log_s.detach(), LABELS, False)
    expected = (weights * fn(log_t, log_s, *([LABELS] if reads_label(fn) else []))).sum()
    torch.testing.assert_close(loss["total"], expected)
    torch.testing.assert_close(torch.autograd.grad(loss["total"], z_s)[0], torch.autograd.grad(expected, z_s)[0])


def top_k(z_t: Tensor, k: int) -> TopKRows:
    ids = z_t.topk(k).indices
    ids = ids[:, torch.randperm(k, generator=torch.Generator().manual_seed(1))]  # in no particular order
    return TopKRows(ids, z_t.log_softmax(-1).gather(-1, ids), V)


@pytest.mark.parametrize("k", [3, V - 1, V])
@pytest.mark.parametrize(("name", "knobs"), [("reciprocal_rank", {"k": 3}), ("confidence_gate", {})])
def test_top_k_rows_rank_and_gate_as_whole_ones_do(logits, name, knobs, k):
    """The tail is no token: it takes no rank, even where it has more mass than any, and a label in it has none."""
    z_t, z_s = 0.1 * logits[0], logits[1]  # a flat teacher, whose tail outweighs its best token
    policy, named = partial(POLICIES[name], **knobs), top_k(z_t, k)
    assert k > 3 or (named.log_probs.exp().sum(-1) < 0.6).all()
    inside = (named.ids == LABELS[:, None]).any(-1)
    whole = POLICIES[name](z_t.log_softmax(-1), z_s.log_softmax(-1), LABELS, False, **knobs)
    whole = whole if k >= V - 1 else whole * inside
    torch.testing.assert_close(loss_of(TokenDistill(policy=policy), named, z_s)[name], whole.sum().detach())
    assert 0 < whole.sum() < N


def test_the_top_of_top_k_rows_is_a_token():
    log = torch.tensor([[0.15, 0.05, 0.8]]).log()
    students = torch.tensor([[0.1, 0.2, 0.7]]).log()
    assert confidence_gate(log, students, torch.tensor([0]), True, by="top") == 0.0
    assert confidence_gate(log, students, torch.tensor([0]), False, by="top") == 1.0


def test_gates_at_their_ends():
    sure = torch.tensor([[30.0, 0.0, 0.0]]).log_softmax(-1)
    flat = torch.zeros(1, 3).log_softmax(-1)
    first, second = torch.tensor([0]), torch.tensor([1])
    assert reciprocal_rank(sure, flat, first, False) == 1.0
    assert reciprocal_rank(sure, flat, second, False, k=1) == 0.0
    assert reciprocal_rank(flat, flat, second, False) == 1.0, "a tie has the best rank"
    assert confidence_gate(sure, flat, first, False) == 1.0
    assert confidence_gate(sure, flat, second, False) == 0.0
    assert confidence_gate(sure, sure, first, False) == 0.0, "the teacher is no better than an equal"


def test_exactly_one_side_of_the_balance_weighs_more(logits):
    log_t, log_s = logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
    log_s[0] = log_t[0]
    flatter, sharper = (entropy_balance(log_t, log_s, LABELS, False, when=when) for when in ("flatter", "sharper"))
    torch.testing.assert_close(flatter + sharper, torch.full_like(flatter, 3.0))
    assert set(flatter.tolist()) == {1.0, 2.0}
    assert sharper[0] == 2.0


def balanced(nu: float) -> Mix:
    """BD-KD: the forward KL weighs more where the student is sharper, the reverse KL where it is flatter."""
    return build.objective(
        [
            {"name": "token", "divergence": d, "policy": {"name": "entropy_balance", "when": when, "nu": nu}}
            for d, when in (("forward_kl", "sharper"), ("reverse_kl", "flatter"))
        ]
    )


def test_bd_kd(logits):
    z_t, z_s = logits
    log_t, log_s = z_t.log_softmax(-1), z_s.log_softmax(-1)
    jeffreys = ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum()
    torch.testing.assert_close(loss_of(balanced(1.0), z_t, z_s)["total"], jeffreys)
    flat = torch.tensor([entropy(s) > entropy(t) for s, t in zip(log_s.tolist(), log_t.tolist(), strict=True)])
    assert 0 < flat.sum() < N
    reverse = torch.where(flat, 2.0, 1.0)
    expected = ((3 - reverse) * forward_kl(log_t, log_s) + reverse * reverse_kl(log_t, log_s)).sum()
    torch.testing.assert_close(loss_of(balanced(2.0), z_t, z_s)["total"], expected)


def test_half_precision_and_excluded_events(logits):
    z_t, z_s = (z.detach().bfloat16() for z in logits)
    z_t[:, 3] = -torch.inf
    for name, knobs in CASES:
        loss = loss_of(TokenDistill(policy=partial(POLICIES[name], **knobs)), z_t, z_s)
        assert loss["total"].dtype == torch.float32
        assert all(value.isfinite() for value in loss.values())


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1).double())

    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        return self.gain * forward_kl(log_t, log_s)


def test_a_divergence_with_parameters_or_a_state_under_a_policy(logits):
    z_t, z_s = logits
    fn = Learned()
    loss = loss_of(TokenDistill(fn, policy="confidence_gate"), z_t, z_s)
    torch.testing.assert_close(torch.autograd.grad(loss["total"], fn.gain)[0].item(), loss["total"].item())
    loss = loss_of(TokenDistill(TAID(), policy="confidence_gate"), z_t, z_s)
    assert set(loss) == {"total", "taid", "confidence_gate", "taid_ce"}
    assert loss["taid_ce"] > loss["taid"] > loss["total"] > 0


def test_a_head_s_closed_form_is_weighted_too(logits):
    z_t, _ = logits
    torch.manual_seed(2)
    head, hidden = nn.Linear(4, V).double(), torch.randn(N, 4).double().requires_grad_()
    student = Outputs(HeadRows(hidden, head))
    loss = TokenDistill("reverse_kl", policy="reciprocal_rank")(student, Outputs(DenseRows(z_t)), BATCH)["total"]
    log_t, log_s = z_t.log_softmax(-1), head(hidden).log_softmax(-1)
    expected = (reciprocal_rank(log_t, log_s, LABELS, False) * reverse_kl(log_t, log_s)).sum()
    for grads in zip(
        *(torch.autograd.grad(x, [hidden, head.weight, head.bias]) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("confidense_gate", "did you mean 'confidence_gate'"),
        ({"name": "reciprocal_rank", "k": 0}, "k: got 0"),
        ({"name": "entropy_balance", "when": "flat"}, "when"),
        ({"name": "entropy_balance", "nu": 0.0}, "nu=0.0"),
        ({"name": "confidence_gate", "by": "tops"}, "by"),
        ({"name": "reciprocal_rank", "tail": True}, "known: k"),
    ],
)
def test_errors_of_a_recipe(logits, spec, words):
    with pytest.raises(ConfigError, match=words):
        loss_of(build.objective({"name": "token", "policy": spec}), *logits)


def test_a_name_outside_of_a_recipe():
    assert TokenDistill(policy="reciprocal_rank").policy is reciprocal_rank
    with pytest.raises(ConfigError, match="reciprocal_rank"):
        TokenDistill(policy="reciprocal_ranks")
