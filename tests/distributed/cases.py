"""What is trained under every framework, and with which losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkd import Mix, TokenDistill
from llmkd.divergences import DACKL, Standardised
from llmkd.objectives import OFA, USKD, CrossEntropy, Objective, SinKD, SpanLoss
from llmkd.schedules import Linear
from llmkd.types import Batch, Loss, Outputs, Signal, supervised_rows

STUDENT_SIZE, TEACHER_SIZE = 32, 48


@dataclass(frozen=True)
class Case:
    """What a run trains; `accumulation` micro-batches a step on each of two processes."""

    name: str
    objective: str = "tokens"
    tied: bool = False
    lora: bool = False
    ema: bool = False
    empty: bool = False
    adamw: bool = False
    max_grad_norm: float = 0.0
    accumulation: int = 1
    evaluate: bool = False
    resume: bool = False
    domains: bool = False
    cached: bool = False


CASES = (
    Case("projector", "projected", accumulation=2, evaluate=True),
    Case("tied_clipped", "projected", tied=True, max_grad_norm=0.5),
    Case("adamw", "projected", adamw=True, max_grad_norm=0.5, accumulation=2, resume=True),
    Case("empty_rank", "projected", empty=True),
    Case("empty_rank_tied", empty=True, tied=True, accumulation=2),
    Case("learned", "learned", accumulation=2),
    Case("modules", "modules", empty=True),
    Case("coupled", "coupled", tied=True, empty=True),
    Case("lora", lora=True, tied=True, adamw=True, accumulation=2, resume=True),
    Case("ema", "with_labels", ema=True, adamw=True, accumulation=2, resume=True),
    Case("uskd", "uskd", empty=True),
    Case("domains", domains=True, adamw=True, accumulation=2, resume=True),
    Case("cached", tied=True, adamw=True, accumulation=2, evaluate=True, cached=True),
    Case("ema_lora", "with_labels", ema=True, lora=True, tied=True, adamw=True, resume=True),
)


def plain_reverse_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(q || p), nats, without a closed-form gradient: the driver has to use autograd."""
    return (log_s.exp() * (log_s - log_t)).sum(-1)


class Temper(nn.Module):
    """A divergence with a parameter of its own: KL(p || q) with the teacher's log-probabilities scaled by it."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([0.5]))  # FSDP2 and ZeRO-3 cannot shard a scalar

    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """[n, k], [n, k] -> [n] nats."""
        log_p = (log_t * self.power).log_softmax(-1)
        return (log_p.exp() * (log_p - log_s)).sum(-1)


class Projected(Objective):
    """Token distillation and the squared error of projected last hidden states, on the supervised rows."""

    needs = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES})

    def __init__(self) -> None:
        super().__init__()
        self.tokens = tokens()
        self.projector = nn.Linear(STUDENT_SIZE, TEACHER_SIZE)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """Sums over the batch's supervised rows."""
        loss = self.tokens(student, teacher, batch)
        mine, theirs = (_last(outputs, batch) for outputs in (student, teacher))
        error = (self.projector(mine) - theirs).square().mean(-1).sum()
        return {**loss, "total": loss["total"] + 0.3 * error, "hidden": error.detach()}


def tokens() -> Mix:
    """A divergence with a closed-form gradient, and one without."""
    return Mix([TokenDistill("forward_kl"), TokenDistill(plain_reverse_kl, temperature=2.0)], weights=[1.0, 0.5])


def modules() -> Mix:
    """Divergences that are modules, with parameters and without, under policies; a loss that reads the label."""
    parts = [TokenDistill(Standardised(), policy="entropy_balance"), TokenDistill(Temper(), policy="reciprocal_rank")]
    return Mix([*parts, OFA()], weights=[Linear(1.0, 0.5), 1.0, 0.5])


def coupled() -> Mix:
    """Losses that look at several rows at once, within a sequence, and DAC-KL, whose network learns."""
    sinkd = SinKD(granularity="sequence", top_k=512)
    return Mix([sinkd, SpanLoss(top_k=8), TokenDistill(DACKL(top_k=8))], weights=[0.1, 1.0, 1.0])


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "tokens": tokens,
    "projected": Projected,
    "learned": lambda: TokenDistill(Temper()),
    "modules": modules,
    "coupled": coupled,
    "uskd": lambda: Mix([USKD(alpha=0.0, mu=0.5, top_k=8), CrossEntropy()]),
    "with_labels": lambda: Mix([TokenDistill("forward_kl"), CrossEntropy()]),
}


def _last(outputs: Outputs | None, batch: Batch) -> Tensor:
    assert outputs is not None
    assert outputs.hidden_states is not None
    return outputs.hidden_states[-1].flatten(0, 1).index_select(0, supervised_rows(batch))
