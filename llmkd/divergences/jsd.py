"""Generalised Jensen-Shannon divergence."""

from __future__ import annotations

from torch import Tensor

from llmkd.divergences.closed_form import with_grad
from llmkd.divergences.numerics import expectation, finite_log, log_mixture, log_ratio, open_unit, probabilities


def _jsd(log_t: Tensor, log_s: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    open_unit("beta", beta, "use forward_kl", "use reverse_kl")
    p, q = probabilities(log_t), probabilities(log_s)
    log_m = log_mixture(p, q, beta)
    ratio = finite_log(log_s).sub_(log_m)
    to_student = expectation(q, ratio)
    value = beta * expectation(p, finite_log(log_t).sub_(log_m)) + (1 - beta) * to_student
    return value, ratio.sub_(to_student.unsqueeze(-1)).mul_(q).mul_(1 - beta)


@with_grad(_jsd)
def jsd(log_t: Tensor, log_s: Tensor, *, beta: float = 0.5) -> Tensor:
    """JSD_b(p, q) = b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, p = teacher, q = student.

    `beta` weights the teacher in the mixture. JSD_b / b -> forward KL as b -> 0 and JSD_b / (1 - b) -> reverse KL as
    b -> 1: the value itself goes to 0 at both ends, so the ends are errors here, not silent switches to another loss.

    Args:
        log_t, log_s: [n, k] log-probabilities, nats.
        beta: in (0, 1).

    Returns:
        [n] nats, in [0, H(beta)] with H the binary entropy; log 2 at most for beta = 0.5.

    Raises:
        ConfigError: beta is not in (0, 1).

    Reference: Agarwal et al. 2024 (GKD), arXiv 2306.13649, eq. 1.
    Fidelity: checked against TRL's GKD and the official codes of TAID and DistiLLM.
    """
    open_unit("beta", beta, "use forward_kl", "use reverse_kl")
    p, q = log_t.exp(), log_s.exp()
    log_m = log_mixture(p, q, beta)
    return beta * expectation(p, log_ratio(log_t, log_m)) + (1 - beta) * expectation(q, log_ratio(log_s, log_m))
