"""The table of students: how the model that learns is made."""

from __future__ import annotations

from collections.abc import Callable

from transformers.modeling_utils import PreTrainedModel

from llmkd.students.depth import depth
from llmkd.students.pretrained import pretrained

STUDENTS: dict[str, Callable[..., PreTrainedModel]] = {
    "pretrained": pretrained,
    "depth": depth,
}

__all__ = ["STUDENTS", "depth", "pretrained"]
