"""`select`: keep the rows of a scored corpus that have the best scores."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import Features, Value

from llmkd.data.manifest import EXAMPLE_ID
from llmkd.errors import ConfigError, DataError, did_you_mean
from llmkd.stages.base import REJECTED, Stage
from llmkd.stages.order import Block, Cut, counts, cuts
from llmkd.stages.scores import RowScore
from llmkd.stages.source import Source, blocks

SCORE = "score"
ALL = ""  # the one group of a corpus that is not balanced


class Select(Stage):
    """D' = the floor(ratio n) rows of D with the largest score, in the order of the corpus; of equals the first.

    Exact for any number of rows: five passes over the scores alone, and histograms. Rows whose score is not finite are
    rejected as `not_finite` and do not count in n; those below the cut as `not_selected`. The column `score` is added.

    Args:
        score: an entry of the table of scores, or a callable with `reads`.
        ratio: share of the rows to keep, in [0, 1]. top_k: how many. threshold: the least score to keep.
        band: shares (from, to) of the order, such as [0.3, 0.6], largest score first. One of these four.
        largest: False keeps the smallest scores instead, at most `threshold`.
        balanced: a column; ratio or band hold within each of its values.

    Raises:
        ConfigError: not one of the four, or out of range. DataError: a column is not there, or top_k is too many.

    Reference: Gu et al. 2025 (MiniPLM), arXiv 2410.17215, section 2.3; Ben-Baruch et al. 2024, arXiv 2403.07854.
    Fidelity: checked against the official code of MiniPLM (by reading; it sorts all scores in memory)
    """

    def __init__(
        self,
        *,
        score: RowScore,
        ratio: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        band: tuple[float, float] | None = None,
        largest: bool = True,
        balanced: str | None = None,
    ) -> None:
        _check(ratio=ratio, top_k=top_k, threshold=threshold, band=band)
        if balanced is not None and ratio is None and band is None:
            raise ConfigError(
                f"stage.balanced: got '{balanced}' without ratio or band; expected one of them. Set ratio."
            )
        self.score, self.threshold, self.balanced = score, threshold, balanced
        self.top_k, self.band = top_k, (0.0, ratio) if ratio is not None else band
        self.sign = 1.0 if largest else -1.0
        self._cuts: dict[tuple[Hashable, int], Cut] = {}

    def features(self, given: Features) -> Features:
        """The rows' columns, and `score`."""
        for column in (*self.score.reads, *([self.balanced] if self.balanced else [])):
            if column not in given:
                have, hint = ", ".join(given), did_you_mean(column, given)
                raise DataError(
                    f"data: got columns {have}; expected '{column}'{hint or '. Score the corpus for it first.'}"
                )
        return Features({**{name: kind for name, kind in given.items() if name != EXAMPLE_ID}, SCORE: Value("float64")})

    def begin(self, source: Source) -> None:
        """Find the cuts."""
        if self.threshold is not None:
            return
        sizes = counts(self._blocks(source))
        total = sum(sizes.values())
        if self.top_k is not None and self.top_k > total:
            raise DataError(f"stage.top_k: got {self.top_k} of {total} rows with a score; expected at most as many.")
        ends: dict[tuple[Hashable, int], int] = {}
        for group, size in sizes.items():
            shares = (
                (0, self.top_k or 0) if self.band is None else (int(Decimal(repr(end)) * size) for end in self.band)
            )
            ends |= {(group, number): rank for number, rank in enumerate(shares)}
        self._cuts = cuts(lambda: self._blocks(source), {name: rank for name, rank in ends.items() if rank})

    def look(self, source: Source, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The scores of some rows, and which are kept: ([n] float64, [n] bool)."""
        scored = self._scored(source.read(start, min(start + size, len(source)), self._reads()))
        return scored[0] * self.sign, self._kept(*scored)

    def process(self, columns: dict[str, list]) -> dict[str, list]:
        """Mark the rows beyond the cuts."""
        scores, ids, groups = self._scored(columns)
        kept = self._kept(scores, ids, groups)
        finite = np.isfinite(scores)
        reasons = [
            "" if keep else "not_selected" if fine else "not_finite" for keep, fine in zip(kept, finite, strict=True)
        ]
        return {**columns, SCORE: (scores * self.sign).tolist(), REJECTED: reasons}

    def _kept(self, scores: np.ndarray, ids: np.ndarray, groups: np.ndarray) -> np.ndarray:
        if self.threshold is not None:
            return np.isfinite(scores) & (scores >= self.threshold * self.sign)
        kept = np.zeros(len(scores), dtype=bool)
        for group in dict.fromkeys(groups.tolist()):
            inside = self._before(group, 1, scores, ids) & ~self._before(group, 0, scores, ids)
            kept |= inside & (groups == group)
        return kept & np.isfinite(scores)

    def _before(self, group: Hashable, number: int, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        cut = self._cuts.get((group, number))
        return cut.covers(scores, ids) if cut else np.zeros(len(scores), dtype=bool)

    def _scored(self, columns: dict[str, list]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores as they are sorted, ids, and groups of some rows."""
        ids = np.array(columns[EXAMPLE_ID], dtype=np.int64)
        arrays = {name: np.array(columns[name], dtype=np.float64) for name in self.score.reads}
        groups = np.array([str(value) for value in columns[self.balanced]]) if self.balanced else np.full(len(ids), ALL)
        return self.score({**arrays, EXAMPLE_ID: ids}) * self.sign, ids, groups

    def _reads(self) -> list[str]:
        return list(dict.fromkeys([EXAMPLE_ID, *self.score.reads, *([self.balanced] if self.balanced else [])]))

    def _blocks(self, source: Source) -> Iterator[Block]:
        """The rows with a finite score, in order."""
        for columns in blocks(source, self._reads()):
            scores, ids, groups = self._scored(columns)
            finite = np.isfinite(scores)
            yield Block(scores[finite], ids[finite], groups[finite])

    def made_up(self, count: int) -> dict[str, list]:
        """Texts with whatever the score reads."""
        texts = [[f"Row {row}. A small model learns what a large one knows.", ""] for row in range(count)]
        extra: dict[str, list[Any]] = {self.balanced: ["a", "b"] * (count // 2)} if self.balanced else {}
        drawn = np.random.default_rng(0).random((len(self.score.reads), count)).tolist()
        return {"text": texts, **extra, **dict(zip(self.score.reads, drawn, strict=True))}


def _check(ratio: Any, top_k: Any, threshold: Any, band: Any) -> None:
    given = [value for value in (ratio, top_k, threshold, band) if value is not None]
    if len(given) != 1:
        raise ConfigError(f"stage: got {len(given)} of ratio, top_k, threshold, band; expected one of them.")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"stage.ratio: got {ratio}; expected a share from 0 to 1, such as 0.5.")
    if top_k is not None and top_k < 0:
        raise ConfigError(f"stage.top_k: got {top_k}; expected a number of rows.")
    if band is not None and not 0 <= band[0] < band[1] <= 1:
        raise ConfigError(f"stage.band: got {list(band)}; expected two rising shares from 0 to 1, such as [0.3, 0.6].")
