"""The table of stages: offline steps over a corpus, one after another. `runner.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmkd.stages.base import Stage

STAGES: dict[str, Callable[..., Stage]] = {}

TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {"stage": STAGES}

__all__ = ["STAGES", "TABLES", "Stage"]
