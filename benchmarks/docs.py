"""The generated parts of the documentation: README's method table and numbers, and the list of recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import benchmarks.quality.report as quality_report
import benchmarks.refine.report as refine_report
import benchmarks.speed_report as speed_report
from benchmarks.glue import table as glue_table
from benchmarks.quality import results as quality_results
from benchmarks.quality.entries import methods
from benchmarks.refine import results as refine_results
from benchmarks.store_report import table as store_table
from llmkd import catalog

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def docs() -> None:
    """Write README.md's generated blocks and recipes/README.md again from the code, the recipes and the results."""
    for file, text in pages().items():
        file.write_text(text)


def pages() -> dict[Path, str]:
    """Every generated page as it should be; a test compares it with what stands."""
    readme = ROOT / "README.md"
    measured = quality_results.read(RESULTS / "quality.json")
    text = readme.read_text()
    blocks = {
        "methods": method_table(measured),
        "quickstart": quickstart_numbers(),
        "quality": quality_report.section(measured),
        "refine": refine_report.section(refine_results.read(RESULTS / "refine.json")),
        "glue": glue_numbers(),
        "store": store_numbers(),
        "speed": speed_report.section(RESULTS),
    }
    for name, content in blocks.items():
        text = block(text, name, content)
    return {readme: text, ROOT / "recipes" / "README.md": recipe_list()}


def block(page: str, name: str, content: str) -> str:
    """The page with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    before, start, rest = page.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise ValueError(f"the page has no block '{name}'; expected <!-- {name} --> and <!-- /{name} -->")
    return f"{before}{start}\n{content}\n{end}{after}"


def method_table(quality: Mapping[str, Any]) -> str:
    """What `llmkd list --markdown` prints, and for each method its recipe and what it reached in quality.json."""
    losses = quality_results.spreads(quality)
    own = {
        "recipe": lambda entry: recipe_of(entry.name),
        "held-out KL": lambda entry: quality_report.cell(quality, losses, entry.name),
    }
    return catalog.markdown(columns={**catalog.COLUMNS, **own})


def recipe_of(method: str) -> str:
    """A link to the recipe that shows a method: the one of its name, else the one with the fewest methods beside it, the
    quickstart before others."""
    used = {file.stem: methods(yaml.safe_load(file.read_text())) for file in (ROOT / "recipes").glob("*.yaml")}
    found = [stem for stem in used if method in used[stem]]
    best = min(found, key=lambda stem: (stem != method, len(used[stem]), stem != "quickstart", stem), default=None)
    return f"[{best}](recipes/{best}.yaml)" if best else ""


def quickstart_numbers() -> str:
    """Student and control of quickstart.json as a Markdown table."""
    result = json.loads((RESULTS / "quickstart.json").read_text())
    distilled, control = result["distilled"], result["control"]
    columns = {
        "start": distilled["before"],
        "forward KL + 0.1 CE": distilled["after"],
        "control: CE alone": control["after"],
        "teacher": distilled["teacher"],
    }
    rows = (
        ("KL to teacher, nats", "kl", "{:.3f}"),
        ("top-1 agreement", "top1_agreement", "{:.1%}"),
        ("perplexity", "perplexity", "{:,.1f}"),
        ("bits per byte", "bits_per_byte", "{:.3f}"),
    )
    lines = [f"| held-out text | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for label, key, form in rows:
        cells = " | ".join(form.format(column[key]) for column in columns.values())
        lines.append(f"| {label} | {cells} |")
    wall = distilled["process"]
    lines += [
        "",
        f"The control (`recipes/quickstart_ce.yaml`) has the same start, data, order and steps, and no teacher in its loss. "
        f"The whole command took {wall['wall_seconds'] / 60:.1f} minutes and {wall['peak_memory_mb'] / 1000:.1f} GB on "
        f"{result['device']}, one seed; every number is in [quickstart.json](benchmarks/results/quickstart.json) and comes "
        "again from `python -m benchmarks quickstart`.",
    ]
    return "\n".join(lines)


def glue_numbers() -> str:
    """The table of glue.json, once there is one."""
    file = RESULTS / "glue.json"
    if not file.is_file():
        return "`python -m benchmarks glue --data FOLDER` measures it."
    return glue_table(json.loads(file.read_text()))


def store_numbers() -> str:
    """The table of store.json, once it was measured."""
    file = RESULTS / "store.json"
    return (
        store_table(json.loads(file.read_text()))
        if file.exists()
        else "Not measured yet: `python -m benchmarks store`."
    )


def recipe_list() -> str:
    """recipes/README.md: a line a recipe, from the comment that it begins with."""
    lines = [
        "# Recipes",
        "",
        "Run one with `llmkd train recipes/NAME.yaml`, or `llmkd stage` if it begins with `stage:`; try it with `--dry-run` or "
        "`--smoke` first.",
        "",
        "| recipe | what it does | extends |",
        "|---|---|---|",
    ]
    folder = ROOT / "recipes"
    for file in sorted(file for file in folder.rglob("*.yaml") if file.parent.name != "accelerate"):
        text = file.read_text()
        about = text.splitlines()[0].removeprefix("# ")
        parent = yaml.safe_load(text).get("extends", "")
        lines.append(f"| `{file.relative_to(folder)}` | {about} | {f'`{parent}`' if parent else ''} |")
    lines += ["", "`accelerate/` has launch configurations: DDP, FSDP2, ZeRO-2 and ZeRO-3.", ""]
    return "\n".join(lines)
