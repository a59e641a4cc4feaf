"""The tables of stages, offline steps over a corpus, and of the scores that `select` keeps by. `runner.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmkd.stages.base import Stage
from llmkd.stages.cache_teacher import CacheTeacher
from llmkd.stages.score import Score
from llmkd.stages.scores import SCORES
from llmkd.stages.select import Select
from llmkd.store import STORES

STAGES: dict[str, Callable[..., Stage]] = {
    "score": Score,
    "select": Select,
    "cache_teacher": CacheTeacher,
}

TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {"stage": STAGES, "score": SCORES, "store": STORES}

__all__ = ["SCORES", "STAGES", "TABLES", "CacheTeacher", "Score", "Select", "Stage"]
