"""The table of policies: a weight for each token from both models' rows and the label, under any divergence.

A policy is `(log_t [n, k], log_s [n, k], label [n], tail, **knobs) -> [n]`. No gradient flows through it. `label` indexes
the events; with `tail` the last event is all tokens that a teacher's top-k rows do not name. It sees the rows at the
temperature of the divergence that it weighs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from llmkd.divergences.closed_form import closed_form
from llmkd.divergences.numerics import expectation, finite_log
from llmkd.errors import ConfigError, unknown_name

Policy = Callable[..., Tensor]


def entropy_balance(
    log_t: Tensor,
    log_s: Tensor,
    label: Tensor,
    tail: bool,
    *,
    when: Literal["flatter", "sharper"] = "flatter",
    nu: float = 2.0,
    kappa: float = 0.0,
) -> Tensor:
    """w = nu where the student's row is flatter than the teacher's (H_s > H_t), else 1; `sharper`: where it is not flatter.

    BD-KD is a mix of two: forward_kl weighed where the student is sharper (it must cover more) and reverse_kl where it
    is flatter (it must concentrate). With nu = 1 the two add up to Jeffreys' divergence.

    Args:
        when: which rows weigh more. nu: by how much, > 0.
        kappa: above 0, a soft step instead: w = 1 + (nu - 1) sigmoid((H_s - H_t) / kappa), in nats.

    Returns:
        [n] weights, between 1 and nu. With a tail, the entropies are those of the K events and the tail.

    Reference: Amara et al. 2022 (BD-KD), arXiv 2212.12965.
    Fidelity: derived (the idea is the paper's, the size and the direction of the weights are ours).
    """
    if when not in ("flatter", "sharper"):
        raise unknown_name("entropy_balance.when", when, ["flatter", "sharper"])
    if nu <= 0 or kappa < 0:
        raise ConfigError(f"entropy_balance: got nu={nu}, kappa={kappa}; expected nu > 0 and kappa >= 0.")
    excess = expectation(log_t.exp(), finite_log(log_t)) - expectation(log_s.exp(), finite_log(log_s))  # H_s - H_t
    flatter = (excess / kappa).sigmoid() if kappa else (excess > 0).to(log_s.dtype)
    return 1 + (nu - 1) * (flatter if when == "flatter" else 1 - flatter)


def reciprocal_rank(log_t: Tensor, log_s: Tensor, label: Tensor, tail: bool, *, k: int = 10) -> Tensor:
    """w = 1 / rank_t(y) if the teacher ranks the label among its k best tokens, else 0: trust a teacher that is right.

    Args:
        k: lowest rank that counts, at least 1.

    Returns:
        [n] weights in {0} and [1 / k, 1]. A label that ties with others has the best of their ranks; one in a teacher's
        tail has none.

    Reference: Carrino et al. 2023 (mAP@k self-distillation), arXiv 2309.17134.
    Fidelity: derived (the official code's coefficient is one a batch, of answer spans; this one is a token's).
    """
    if k < 1:
        raise ConfigError(f"reciprocal_rank.k: got {k}; expected at least 1, such as 10.")
    mine = log_t.gather(-1, label.unsqueeze(-1))
    rank = 1 + (_tokens(log_t, tail) > mine).sum(-1)
    return (1.0 / rank).to(log_s.dtype) * ((rank <= k) & _named(log_t, label, tail))


def confidence_gate(
    log_t: Tensor, log_s: Tensor, label: Tensor, tail: bool, *, by: Literal["label", "top"] = "label"
) -> Tensor:
    """w = 1 where the teacher is surer than the student, p_y > q_y (or max p > max q), else 0: learn where it is better.

    The paper's gate compares with the student's frozen start, and has the tokens where the teacher is no better keep
    close to that start. This is its form with two rows: the student as it is now, and nothing kept where w = 0.

    Args:
        by: "label" compares the label's probabilities, "top" the largest ones, which needs no label.

    Returns:
        [n] weights, 0 or 1. A label in a teacher's tail gives 0; "top" looks at the K events alone.

    Reference: Roth et al. 2024 (Fantastic Gains), arXiv 2310.17653.
    Fidelity: derived (the data partition of the paper without the frozen student).
    """
    if by == "top":
        return (_tokens(log_t, tail).amax(-1) > _tokens(log_s, tail).amax(-1)).to(log_s.dtype)
    if by != "label":
        raise unknown_name("confidence_gate.by", by, ["label", "top"])
    mine, students = (x.gather(-1, label.unsqueeze(-1)).squeeze(-1) for x in (log_t, log_s))
    return ((mine > students) & _named(log_t, label, tail)).to(log_s.dtype)


POLICIES: dict[str, Policy] = {
    "entropy_balance": entropy_balance,
    "reciprocal_rank": reciprocal_rank,
    "confidence_gate": confidence_gate,
}


def policy_named(name: str) -> Policy:
    """The entry `name` with its defaults."""
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    return POLICIES[name]


def for_events(chosen: Policy, vocab_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The policy as `Term.policy` calls it: rows of fewer events than tokens have a tail."""

    def weigh(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
        return chosen(log_t, log_s, label, log_t.shape[-1] != vocab_size)

    return weigh


def without_label(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A divergence of two rows for a term whose policy reads the label; its parameters and closed form stay."""
    if isinstance(fn, nn.Module):
        return _WithoutLabel(fn)

    def call(log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
        return fn(log_t, log_s)

    form: Any = closed_form(fn)
    if form is not None:
        call.value_and_grad = lambda log_t, log_s, label: form(log_t, log_s)  # type: ignore[attr-defined]
    return call


class _WithoutLabel(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, log_t: Tensor, log_s: Tensor, label: Tensor) -> Tensor:
        return self.fn(log_t, log_s)


def _tokens(log_p: Tensor, tail: bool) -> Tensor:
    """The events that are one token each."""
    return log_p[:, :-1] if tail else log_p


def _named(log_t: Tensor, label: Tensor, tail: bool) -> Tensor:
    """Whether the label's event is one token."""
    return label < log_t.shape[-1] - tail
