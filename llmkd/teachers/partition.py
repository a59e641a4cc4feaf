"""A teacher for the tokens that it knows better than the student did at its start; that start for all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkd.combined import SurerRows
from llmkd.errors import ConfigError, unknown_name
from llmkd.rows import TopKRows, look
from llmkd.support import name_all
from llmkd.teachers.base import SelfTeacher, Teacher
from llmkd.teachers.self import FrozenStart
from llmkd.types import Batch, Outputs, Signal, row_labels


class Partition:
    """p = softmax(teacher(x)) on tokens where it gives the label more than r = softmax(student_0(x)) does, else p = r.

    Where the teacher is no better, the student keeps close to its frozen start: it learns without forgetting, from weaker
    teachers, too. The choice is the teacher's and not an objective's: any divergence, policy and mix takes its rows as they
    are, and the frozen start runs once a batch. A student at its start gets a gradient from the teacher's tokens alone.

    Args:
        teacher: any teacher with logits, in a recipe a mapping with its name.
        by: "label" compares the label's probabilities, "top" the largest ones, which needs no label.

    Raises:
        ConfigError: an unknown `by`, a teacher without logits or one that is made of the student.

    Reference: Roth et al. 2024 (Fantastic Gains), arXiv 2310.17653, the data partition.
    Fidelity: checked against the authors' own description (the partition and both its terms; a token in an image's place).
    """

    provides = frozenset({Signal.LOGITS})
    snapshots = 1

    def __init__(self, teacher: Teacher, by: Literal["label", "top"] = "label") -> None:
        if by not in ("label", "top"):
            raise unknown_name("partition.by", by, ["label", "top"])
        if isinstance(teacher, SelfTeacher) or Signal.LOGITS not in teacher.provides:
            raise ConfigError(
                f"partition.teacher: got {type(teacher).__name__}; expected another model's logits. Use a local teacher."
            )
        self.teacher, self.by, self.start = teacher, by, FrozenStart()
        self.members, self.temperature = [teacher], getattr(teacher, "temperature", None)
        self.tokenizer, self.vocab_size = teacher.tokenizer, teacher.vocab_size

    @property
    def model(self) -> nn.Module | None:
        """The model of a local teacher."""
        return getattr(self.teacher, "model", None)

    def prepare(self, accelerator: Any) -> None:
        """Prepare both."""
        self.start.prepare(accelerator)
        self.teacher.prepare(accelerator)

    def observe(self, student: nn.Module, step: int, epoch: int) -> None:
        """The frozen start looks once."""
        self.start.observe(student, step, epoch)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """Rows that are the teacher's or the frozen start's, each as a whole."""
        needs = frozenset({Signal.LOGITS})
        theirs, own = self.teacher(batch, needs, vocab_size).rows, self.start(batch, needs, vocab_size).rows
        label = row_labels(batch) if self.by == "label" else None
        if isinstance(theirs, TopKRows):
            return Outputs(_of_top_k(theirs, own, label))
        return Outputs(SurerRows(theirs, own, label))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen start's."""
        return self.start.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back the frozen start."""
        self.start.load_state_dict(state)


def _of_top_k(theirs: TopKRows, own: Any, label: Tensor | None) -> TopKRows:
    """The same choice on the teacher's K events and the tail; a label that is in its tail is better known at the start."""

    def events(log_p: Tensor, ids: Tensor) -> Tensor:
        kept = log_p.gather(-1, name_all(ids)).masked_fill(ids < 0, float("-inf"))
        return torch.cat([kept, log_p.amax(-1, keepdim=True)], dim=-1)

    shown = look(events, own, theirs.ids, temperature=theirs.temperature)  # [n, K + 1]
    kept, best = shown[:, :-1].to(theirs.log_probs.dtype), shown[:, -1].to(theirs.log_probs.dtype)
    if label is None:
        chosen = theirs.log_probs.amax(-1) > best
    else:
        is_label = theirs.ids == label.unsqueeze(-1)
        chosen = (is_label & (theirs.log_probs > kept)).any(-1)
    log_probs = torch.where(chosen.unsqueeze(-1), theirs.log_probs, kept)
    return TopKRows(theirs.ids, log_probs, theirs.vocab_size, theirs.temperature, drawn=_of(theirs.drawn, chosen))


def _of(drawn: TopKRows | None, chosen: Tensor) -> TopKRows | None:
    """The teacher's draws in its own rows, none in others."""
    if drawn is None:
        return None
    log_probs = drawn.log_probs.masked_fill(~chosen.unsqueeze(-1), float("-inf"))
    return TopKRows(drawn.ids, log_probs, drawn.vocab_size, drawn.temperature, sampled=True)
