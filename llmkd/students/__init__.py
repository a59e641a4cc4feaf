"""The table of students: how the model that learns is made."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from llmkd.students.depth import depth
from llmkd.students.pretrained import pretrained
from llmkd.students.scratch import scratch

STUDENTS: dict[str, Callable[..., PreTrainedModel]] = {
    "pretrained": pretrained,
    "depth": depth,
    "scratch": scratch,
}


def as_student(model: str | nn.Module) -> nn.Module:
    """The model of a name or a path; a model as it is."""
    return pretrained(path=model) if isinstance(model, str) else model


__all__ = ["STUDENTS", "as_student", "depth", "pretrained", "scratch"]
