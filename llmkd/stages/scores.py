"""The table of scores: a number for each row, of the columns that `score` wrote. `select` keeps by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from llmkd.data.manifest import EXAMPLE_ID


class RowScore(Protocol):
    """`reads` are the columns that it needs; calling it with them, each [n], gives [n] float64."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True)
class Difference:
    """score(x) = nll_reference(x) - nll_teacher(x) = log p(x) - log p_ref(x): what the teacher knows and a small model not.

    Args:
        of: `mean`, nats a token, which does not favour long chunks, or `sum`.

    Reference: Gu et al. 2025 (MiniPLM), arXiv 2410.17215, eq. 4.
    Fidelity: checked against the official code of MiniPLM (by reading: mean a token; its README's fraction is a misprint)
    """

    of: Literal["mean", "sum"] = "mean"

    @property
    def reads(self) -> tuple[str, ...]:
        """Both models' NLL."""
        return (f"reference_nll_{self.of}", f"teacher_nll_{self.of}")

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        reference, teacher = (columns[name] for name in self.reads)
        return reference - teacher


@dataclass(frozen=True)
class El2n:
    """score(x) = mean_i |p_ref(. | y_<i) - onehot(y_i)|_2, in [0, sqrt 2]: how wrong an early model is.

    Reference: Paul et al. 2021 (EL2N), arXiv 2107.07075.
    Fidelity: derived (the mean over a text's tokens)
    """

    reads = ("reference_el2n",)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return columns["reference_el2n"]


@dataclass(frozen=True)
class Disagreement:
    """score(x) = mean_i KL(p_teacher || p_reference) at token i, nats: how far the models are apart.

    Reference: Hinton et al. 2015, arXiv 1503.02531, as a score of Ben-Baruch et al. 2024, arXiv 2403.07854.
    Fidelity: derived (the mean over a text's tokens)
    """

    reads = ("disagreement",)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return columns["disagreement"]


@dataclass(frozen=True)
class Perplexity:
    """score(x) = exp(nll_M(x) / tokens): select a band of it, as the easiest and the hardest texts teach least.

    Args:
        of: whose, `teacher` or `reference`.

    Reference: Marion et al. 2023 (When Less is More), arXiv 2309.04564.
    Fidelity: derived (from the definition)
    """

    of: Literal["teacher", "reference"] = "reference"

    @property
    def reads(self) -> tuple[str, ...]:
        """The model's mean NLL."""
        return (f"{self.of}_nll_mean",)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.exp(columns[self.reads[0]])


@dataclass(frozen=True)
class Random:
    """score(x) = u, uniform on [0, 1), a hash of seed and id: the baseline that pruning has to beat.

    Args:
        seed: another seed, another selection.

    Reference: Ben-Baruch et al. 2024 (Distilling the Knowledge in Data Pruning), arXiv 2403.07854.
    Fidelity: derived (the hash is SplitMix64)
    """

    seed: int = 0
    reads = ()

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        with np.errstate(over="ignore"):
            seed = np.uint64(_mix(np.array([self.seed], dtype=np.uint64))[0])
            bits = _mix(columns[EXAMPLE_ID].astype(np.uint64) + seed)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): 64 bits, all of which depend on all bits of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Column:
    """score(x) = the value of a column: your own score, or one number of `score` alone.

    Args:
        column: its name.

    Reference: no paper, the identity.
    Fidelity: derived (the identity)
    """

    column: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The column."""
        return (self.column,)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return columns[self.column]


SCORES: dict[str, Callable[..., RowScore]] = {
    "difference": Difference,
    "el2n": El2n,
    "disagreement": Disagreement,
    "perplexity": Perplexity,
    "random": Random,
    "column": Column,
}
