"""The table of teachers: `provides` and `(batch, needs) -> Outputs`."""

from __future__ import annotations

from collections.abc import Callable

from llmkd.teachers.base import Teacher
from llmkd.teachers.local import LocalTeacher, local

TEACHERS: dict[str, Callable[..., Teacher]] = {
    "local": local,
}

__all__ = ["TEACHERS", "LocalTeacher", "Teacher", "local"]
