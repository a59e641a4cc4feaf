"""The teacher store: a teacher's rows on the disk, by what an example says. STORES is the table of what may be kept."""

from __future__ import annotations

from collections.abc import Callable

from llmkd.store.base import Codec
from llmkd.store.hidden import Hidden
from llmkd.store.sampled import Sampled
from llmkd.store.topk import TopK

STORES: dict[str, Callable[..., Codec]] = {
    "topk": TopK,
    "sampled": Sampled,
    "hidden": Hidden,
}

__all__ = ["STORES", "Codec", "Hidden", "Sampled", "TopK"]
