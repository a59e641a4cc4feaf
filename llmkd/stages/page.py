"""A page about a selection: how the scores are spread, and what the best and the worst kept and dropped rows are."""

from __future__ import annotations

import html
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkd.data.manifest import EXAMPLE_ID
from llmkd.errors import need
from llmkd.stages.select import Select
from llmkd.stages.source import BLOCK, Source

BINS = 60
SAMPLED = 100_000  # scores that set the histogram's range
SHOWN = 8  # rows of each table
EXCERPT = 400  # characters of a row
LISTS = (("kept", "best"), ("kept", "worst"), ("dropped", "best"), ("dropped", "worst"))
NUMBERS = ("tokens", "teacher_nll_mean", "reference_nll_mean", "reference_el2n", "disagreement")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; vertical-align: top }
td:last-child, th:last-child { text-align: left; white-space: pre-wrap; word-break: break-word }
svg { width: 100%; height: auto }
"""


@dataclass
class Survey:
    """What the page shows: rows in each bin of the score, kept and dropped; the rows at both ends of each."""

    edges: np.ndarray
    bins: dict[str, np.ndarray] = field(
        default_factory=lambda: {n: np.zeros(BINS, np.int64) for n in ("kept", "dropped")}
    )
    ends: dict[tuple[str, str], np.ndarray] = field(default_factory=lambda: {name: np.empty((0, 2)) for name in LISTS})
    negative: int = 0
    not_finite: int = 0

    def add(self, first: int, scores: np.ndarray, kept: np.ndarray) -> None:
        """Count a block of rows that begins at row number `first`."""
        finite = np.isfinite(scores)
        self.not_finite += int((~finite).sum())
        self.negative += int((scores[finite] < 0).sum())
        for name, mine in (("kept", finite & kept), ("dropped", finite & ~kept)):
            inside = np.clip(scores[mine], self.edges[0], self.edges[-1])
            self.bins[name] += np.histogram(inside, self.edges)[0]
            rows = np.stack([scores[mine], first + np.flatnonzero(mine)], axis=1)
            for end, sign in (("best", -1), ("worst", 1)):
                both = np.concatenate([self.ends[name, end], rows])
                self.ends[name, end] = both[np.argsort(sign * both[:, 0], kind="stable")[:SHOWN]]

    @property
    def rows(self) -> dict[str, int]:
        """How many rows were kept and dropped."""
        return {name: int(bins.sum()) for name, bins in self.bins.items()}


def survey(stage: Select, source: Source) -> Survey:
    """Look at all scores of a selection in two passes, a block at a time; `stage.begin(source)` was called."""
    step = -(-len(source) // SAMPLED)
    parts = [stage.look(source, start, BLOCK)[0][::step] for start in range(0, len(source), BLOCK)]
    sample = np.concatenate(parts)
    low, high = np.quantile(sample[np.isfinite(sample)], [0.001, 0.999])
    found = Survey(np.linspace(low, high if high > low else low + 1, BINS + 1))
    for start in range(0, len(source), BLOCK):
        found.add(start, *stage.look(source, start, BLOCK))
    return found


def selection_page(stage: Select, source: Source, title: str) -> str:
    """One self-contained HTML page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    found = survey(stage, source)
    rows = found.rows
    total = sum(rows.values())
    least = found.ends["kept", "worst"][:1, 0]
    facts = (
        f"{rows['kept']:,} of {total:,} rows kept ({rows['kept'] / max(1, total):.1%})"
        + (f", the least score kept is {least[0]:.4g}" if len(least) else "")
        + f"; {found.negative / max(1, total):.1%} of the scores are negative; {found.not_finite:,} are not finite."
    )
    tables = "".join(_table(name, source, found) for name in LISTS)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{facts}</p>{_histogram(found)}{tables}</body></html>\n"
    )


def _histogram(found: Survey) -> str:
    """Kept and dropped rows a bin, as SVG; scores beyond the 0.1% at either end count in the last bin."""
    need("matplotlib", "pip install 'llmkd[report]'")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmkd"}):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        axes = figure.add_subplot()
        bottom = np.zeros(BINS)
        for name, color in (("kept", "#2a7f62"), ("dropped", "#c9c9c9")):
            axes.bar(
                found.edges[:-1], found.bins[name], np.diff(found.edges), bottom, align="edge", color=color, label=name
            )
            bottom = bottom + found.bins[name]
        axes.set(xlabel="score", ylabel="rows")
        axes.legend()
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]


def _table(name: tuple[str, str], source: Source, found: Survey) -> str:
    """The rows at one end."""
    ends = found.ends[name]
    read = [source.read(int(row), int(row) + 1) for row in ends[:, 1]]
    shown = [number for number in NUMBERS if number in source.features]
    head = "".join(f"<th>{label}</th>" for label in ("id", "score", *(s.replace("_", " ") for s in shown), "row"))
    lines = []
    for (score, _), row in zip(ends, read, strict=True):
        numbers = [f"{row[EXAMPLE_ID][0]}", f"{score:.4g}", *(_number(row[number][0]) for number in shown)]
        cells = "".join(f"<td>{cell}</td>" for cell in numbers)
        lines.append(f"<tr>{cells}<td>{html.escape(_excerpt(row))}</td></tr>")
    kind, end = name
    return f"<h2>The {end} of what was {kind}</h2><table><tr>{head}</tr>{''.join(lines)}</table>"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _excerpt(row: dict[str, list]) -> str:
    """The beginning of a row's text; documents of one chunk are told apart by a pilcrow."""
    names = [name for name in ("text", "prompt", "completion", "messages") if name in row]
    values = [row[name][0] for name in names]
    texts = [" ¶ ".join(v) if names == ["text"] and isinstance(v, list) else v for v in values]
    whole = "\n".join(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts)
    return whole if len(whole) <= EXCERPT else whole[:EXCERPT] + " ..."
