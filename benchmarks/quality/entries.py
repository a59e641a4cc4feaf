"""What `quality` compares: a recipe's `objective:` for every method, and its `teacher:` where that is not the quickstart's.

An entry bears the name of its method and uses the defaults of the method table, so that a number is of what the table shows.
A divergence or a policy stands alone under `token`; a loss that is made to stand beside another has that other with it, as
in its recipe: sinkd and span forward KL; nkd, ofa and uskd cross-entropy; by_metric needs a second loss whose weight it moves.
ps_kd, which needs a previous epoch, reads half of the text twice: as many tokens as the others.
A `teacher:` that wraps the quickstart's names it `recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmkd.build import TABLES

CONTROL, REFERENCE = "cross_entropy", "forward_kl"
COMPARED = ("divergence", "objective", "policy", "schedule")

ENTRIES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"objective": {"name": "cross_entropy"}},
    "forward_kl": {"objective": {"name": "token", "divergence": "forward_kl"}},
    "reverse_kl": {"objective": {"name": "token", "divergence": "reverse_kl"}},
    "jsd": {"objective": {"name": "token", "divergence": "jsd"}},
    "skew_kl": {"objective": {"name": "token", "divergence": "skew_kl"}},
    "skew_reverse_kl": {"objective": {"name": "token", "divergence": "skew_reverse_kl"}},
    "tvd": {"objective": {"name": "token", "divergence": "tvd"}},
    "taid": {"objective": {"name": "token", "divergence": "taid"}},
    "dac_kl": {"objective": {"name": "token", "divergence": "dac_kl"}},
    "adaptive_kl": {"objective": {"name": "token", "divergence": "adaptive_kl"}},
    "alpha_beta": {"objective": {"name": "token", "divergence": "alpha_beta"}},
    "topk_mix": {"objective": {"name": "token", "divergence": "topk_mix"}},
    "standardised": {"objective": {"name": "token", "divergence": "standardised"}},
    "dkd": {"objective": {"name": "dkd"}},
    "nkd": {"objective": [{"name": "nkd"}, {"name": "cross_entropy"}]},
    "ofa": {"objective": [{"name": "ofa"}, {"name": "cross_entropy"}]},
    "sinkd": {"objective": [{"name": "token", "divergence": "forward_kl"}, {"name": "sinkd", "weight": 0.2}]},
    "ps_kd": {"objective": {"name": "ps_kd"}, "teacher": "previous_epoch", "epochs": 2},
    "uskd": {"objective": [{"name": "uskd"}, {"name": "cross_entropy"}]},
    "span": {"objective": [{"name": "token", "divergence": "forward_kl"}, {"name": "span"}]},
    "entropy_balance": {
        "objective": [
            {"name": "token", "divergence": "forward_kl", "policy": {"name": "entropy_balance", "when": "sharper"}},
            {"name": "token", "divergence": "reverse_kl", "policy": {"name": "entropy_balance", "when": "flatter"}},
        ]
    },
    "reciprocal_rank": {"objective": {"name": "token", "divergence": "forward_kl", "policy": "reciprocal_rank"}},
    "confidence_gate": {"objective": {"name": "token", "divergence": "forward_kl", "policy": "confidence_gate"}},
    "linear": {
        "objective": {
            "name": "token",
            "divergence": "forward_kl",
            "temperature": {"name": "linear", "start": 4.0, "end": 1.0},
            "scale_by_t2": True,
        }
    },
    "cosine": {
        "objective": {
            "name": "token",
            "divergence": "forward_kl",
            "temperature": {"name": "cosine", "start": 4.0, "end": 1.0},
            "scale_by_t2": True,
        }
    },
    "by_metric": {
        "objective": [
            {"name": "token", "divergence": "forward_kl"},
            {
                "name": "cross_entropy",
                "weight": {
                    "name": "by_metric",
                    "metric": "cross_entropy",
                    "worst": 7.0,
                    "best": 4.0,
                    "start": 0.0,
                    "end": 0.2,
                },
            },
        ]
    },
}

LEFT_OUT: dict[str, str] = {
    "token": "as forward_kl",
    "constant": "as forward_kl",
    "hidden_mse": "needs hidden states, which the recorded teacher does not keep",
    "regression": "one value an example, no text",
    "by_fraction": "of pruned data",
}


def methods(recipe: Mapping[str, Any]) -> set[str]:
    """The names of objectives, divergences, policies, schedules and teachers that a recipe itself, not its parent, uses."""
    return set(_named({key: recipe[key] for key in ("objective", "teacher") if key in recipe}, ""))


def _named(block: Any, key: str) -> Iterator[str]:
    if isinstance(block, str) and key in TABLES:
        yield block
    elif isinstance(block, list):
        for item in block:
            yield from _named(item, key)
    elif isinstance(block, Mapping):
        if "name" in block:
            yield block["name"]
        for inner, value in block.items():
            yield from _named(value, inner)


def uncovered() -> list[str]:
    """Methods of the tables that neither have an entry which uses them nor are left out with a reason."""
    names = [name for kind in COMPARED for name in TABLES[kind]]
    return [name for name in names if name not in LEFT_OUT and name not in methods(ENTRIES.get(name, {}))]
