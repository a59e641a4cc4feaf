"""llmkd: distil large language models into small ones. Public names, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkd.distiller import Distiller
    from llmkd.divergences import DIVERGENCES
    from llmkd.objectives import OBJECTIVES, CrossEntropy, Mix, Objective, TokenDistill
    from llmkd.policies import POLICIES
    from llmkd.schedules import SCHEDULES
    from llmkd.students import STUDENTS
    from llmkd.teachers import TEACHERS, LocalTeacher, Teacher
    from llmkd.trainer import DistillTrainer

__version__ = "0.1.0"

_HOME = {
    "DistillTrainer": "trainer",
    "Distiller": "distiller",
    "DIVERGENCES": "divergences",
    "OBJECTIVES": "objectives",
    "Objective": "objectives",
    "TokenDistill": "objectives",
    "CrossEntropy": "objectives",
    "Mix": "objectives",
    "POLICIES": "policies",
    "SCHEDULES": "schedules",
    "STUDENTS": "students",
    "TEACHERS": "teachers",
    "Teacher": "teachers",
    "LocalTeacher": "teachers",
}

__all__ = ["DIVERGENCES", "OBJECTIVES", "POLICIES", "SCHEDULES", "STUDENTS", "TEACHERS", "CrossEntropy", "DistillTrainer",
           "Distiller", "LocalTeacher", "Mix", "Objective", "Teacher", "TokenDistill"]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import llmkd` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'llmkd' has no attribute '{name}'")
    return getattr(import_module(f"llmkd.{_HOME[name]}"), name)
