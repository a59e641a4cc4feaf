"""Regression: the squared distance of one value an example from its label or from the teacher's value."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.heads import DenseRows
from llmkd.objectives.base import Objective
from llmkd.support import wide
from llmkd.types import Batch, Kind, Loss, Outputs, Signal, row_labels


class Regression(Objective):
    """sum_i (s_i - y_i)^2 over the labelled examples, s = student's value, y = the label; with `target: teacher` the teacher's.

    It is for models with one value an example (`num_labels: 1`), such as STS-B's similarity from 0 to 5.

    Args:
        target: `label`, which needs no teacher, or `teacher`.

    Returns:
        `total` and `mse` or `teacher_mse`: squared units of the label.

    Raises:
        ConfigError: another target, or no teacher where one is read.

    Reference: Hinton et al. 2015, arXiv 1503.02531, section 2.1 (matching logits); least squares for the label.
    Fidelity: checked against torch's mse_loss.
    """

    takes = frozenset({Kind.VALUE})

    def __init__(self, target: Literal["label", "teacher"] = "label") -> None:
        super().__init__()
        if target not in ("label", "teacher"):
            raise ConfigError(f"regression.target: got '{target}'; expected label or teacher. Use one of them.")
        self.target = target
        self.needs = frozenset({Signal.LOGITS}) if target == "teacher" else frozenset()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """The sum of squares."""
        ours = values(student.rows)  # type: ignore[arg-type]
        if self.target == "label":
            goal = row_labels(batch)
        elif teacher is not None and teacher.rows is not None:
            goal = values(teacher.rows).detach()  # type: ignore[arg-type]
        else:
            raise ConfigError("regression: it needs a teacher's values, got none; give a teacher or use target: label.")
        total = (ours - goal.to(ours.dtype)).square().sum()
        return {"total": total, "mse" if self.target == "label" else "teacher_mse": total.detach()}


def values(rows: DenseRows) -> Tensor:
    """The one column of a regression's rows, [n]."""
    return wide(rows.values).squeeze(-1)
