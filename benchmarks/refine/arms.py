"""What is compared: DDK's `reweighting:` with fixed mixtures, MiniPLM's `stage:` of selection with a random one."""

from __future__ import annotations

from typing import Any

SAMPLINGS: dict[str, dict[str, Any]] = {
    "ddk": {"name": "ddk"},
    "uniform": {"name": "fixed", "weights": "uniform"},
    "proportional": {"name": "fixed", "weights": "proportional"},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "difference": {"score": "difference"},
    "difference, balanced": {"score": "difference", "balanced": "domain"},
    "random": {"score": "random"},
}
