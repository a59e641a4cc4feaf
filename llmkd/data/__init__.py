"""Data: rows from the Hub, files or Python objects; tokenised samples with labels; batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkd.data.collate import Collator, pad_with_unsupervised
    from llmkd.data.domains import prepare
    from llmkd.data.ids import DocumentCollator
    from llmkd.data.load import DataSpec, EvalSpec, load_rows
    from llmkd.data.samples import Prepared

__all__ = [
    "Collator",
    "DataSpec",
    "DocumentCollator",
    "EvalSpec",
    "Prepared",
    "load_rows",
    "pad_with_unsupervised",
    "prepare",
]

_HOME = {
    "Collator": "collate",
    "DocumentCollator": "ids",
    "pad_with_unsupervised": "collate",
    "DataSpec": "load",
    "EvalSpec": "load",
    "load_rows": "load",
    "Prepared": "samples",
    "prepare": "domains",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that checking a recipe does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
