"""The table of objectives: (student, teacher, batch) -> Loss."""

from __future__ import annotations

from llmkd.objectives.base import Mix, Objective, RowObjective
from llmkd.objectives.cross_entropy import CrossEntropy
from llmkd.objectives.token import TokenDistill

OBJECTIVES: dict[str, type[Objective]] = {
    "token": TokenDistill,
    "cross_entropy": CrossEntropy,
}

__all__ = ["OBJECTIVES", "CrossEntropy", "Mix", "Objective", "RowObjective", "TokenDistill"]
