"""`llmkd report`: one page that loads nothing, with the runs' own numbers; what a browser shows is in test_report_browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd import table
from llmkd.finished import read_run
from llmkd.report import figures
from llmkd.report.page import difference, named, page

LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """What a page has: its elements, what they would load, its tables by class and run, its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.loads: list[str] = []
        self.tables: dict[tuple[str, str | None], list[list[str]]] = {}
        self.headings: list[str] = []
        self.json = ""
        self._row: list[str] | None = None
        self._into: Any = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        self.loads += [value for name, value in attrs if name in LOADS and value]
        if tag == "table":
            self._rows = self.tables.setdefault((given.get("class"), given.get("data-run")), [])
        if tag == "tr":
            self._row = []
            self._rows.append(self._row)
        self._into = tag if tag in ("td", "th", "h2", "h3") else "json" if given.get("id") == "data" else None
        if tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag):
        self._into = None

    def handle_data(self, data):
        if self._into in ("td", "th"):
            self._row[-1] += data
        elif self._into in ("h2", "h3"):
            self.headings.append(data)
        elif self._into == "json":
            self.json += data


@pytest.fixture
def runs(trained, tmp_path) -> tuple[Path, Path]:
    """The same run twice, the second at another learning rate by its own account, and with other numbers."""
    first, second = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("first", "second"))
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["train"]["learning_rate"] = 0.5
    (second / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    metrics = json.loads((second / "metrics.json").read_text())
    metrics["after"]["kl"] = 9.75
    metrics["parameters"] = 10**6
    (second / "metrics.json").write_text(json.dumps(metrics))
    return first, second


def put(run: Path, name: str, value: Any) -> None:
    (run / name).write_text(json.dumps(value))


def text_of(*folders: Path) -> str:
    return page(named([read_run(folder) for folder in folders]))


def test_the_page_is_written_and_loads_nothing(llmkd, runs, tmp_path):
    done = llmkd("report", *runs, "-o", tmp_path / "deep" / "compare.html")
    assert done.code == 0, done.err
    assert done.out.strip() == f"report: {tmp_path / 'deep' / 'compare.html'}"
    text = (tmp_path / "deep" / "compare.html").read_text()
    found = Page(text)
    assert found.loads == ["data:,"], "an icon, so that no browser asks for one"
    assert not [tag for tag, _ in found.elements if tag in ("iframe", "object", "embed", "img", "base")]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.elements


def test_its_tables_are_the_printed_ones(runs):
    found = Page(text_of(*runs))
    for run in runs:
        lines = table.lines(json.loads((run / "metrics.json").read_text()))
        assert found.tables["metrics", run.name][1:] == [list(line) for line in lines]
    assert [found.tables["metrics", "second"][1][i] for i in (0, 2)] == ["KL to teacher (nats/token)", "9.750"]


def test_its_data_are_the_runs_files(runs):
    data = json.loads(Page(text_of(*runs)).json)
    assert list(data) == ["first", "second"]
    for run in runs:
        assert data[run.name]["metrics"] == json.loads((run / "metrics.json").read_text())
        assert data[run.name]["tokens"] == json.loads((run / "tokens.json").read_text())


def test_its_curves_are_the_logged_values(runs):
    loaded = named([read_run(folder) for folder in runs])
    history = json.loads((runs[0] / "history.json").read_text())
    made = figures.curves(loaded)
    assert {"loss", "learning_rate", "forward_kl", "cross_entropy", "grad_norm"} <= set(made)
    assert not {name for name in made if name.startswith(("eval_", "train_"))}
    assert next(iter(made)) == "loss"
    for name, figure in made.items():
        logged = [(entry["step"], entry[name]) for entry in history if name in entry]
        assert [line.name for line in figure.data] == ["first", "second"]
        assert list(zip(figure.data[0].x, figure.data[0].y, strict=True)) == logged
    assert len({line.line.color for line in made["loss"].data}) == 2


def test_quality_is_drawn_over_tokens_and_over_wall_time(runs):
    made = figures.quality(named([read_run(folder) for folder in runs]))
    history = [entry for entry in json.loads((runs[0] / "history.json").read_text()) if "eval_kl" in entry]
    for axis, title in (("tokens_seen", "tokens trained on"), ("seconds", "wall time, s")):
        line = made[f"KL to teacher (nats/token) over {title}"].data[0]
        last = {entry[axis]: entry["eval_kl"] for entry in history}
        assert dict(zip(line.x, line.y, strict=True)) == last
        assert list(line.x) == sorted(line.x)
        assert line.x[0] == 0 or axis == "seconds"


def test_size_and_quality_with_start_and_teacher_as_lines(runs):
    scores = {"student": 0.5, "start": 0.25, "teacher": 0.75}
    models = {name: {"acc": {"value": value}} for name, value in scores.items()}
    put(runs[0], "evaluation.json", {"models": {}, "tasks": {"rte": {"main": ["acc"], "models": models}}})
    loaded = named([read_run(folder) for folder in runs])
    made = figures.sizes(loaded)
    metrics = [run.metrics for run in loaded.values()]
    points = made["KL to teacher (nats/token) by size"].data
    assert [(p.name, p.x[0], p.y[0]) for p in points] == [
        (label, one["parameters"], one["after"]["kl"]) for label, one in zip(loaded, metrics, strict=True)
    ]
    lines = made["perplexity by size"].layout.shapes
    assert {line.y0 for line in lines} == {metrics[0]["before"]["perplexity"], metrics[0]["teacher"]["perplexity"]}
    task = made["rte, acc by size"]
    assert [(point.name, point.y[0]) for point in task.data] == [("first", 0.5)]
    assert {(text.text, line.y0) for text, line in zip(task.layout.annotations, task.layout.shapes, strict=True)} == {
        ("start", 0.25), ("teacher", 0.75),
    }  # fmt: skip


def test_domain_weights_where_they_were_logged(runs):
    assert "Domain weights" not in Page(text_of(*runs)).headings
    history = json.loads((runs[0] / "history.json").read_text())
    weights = [{"step": step, "domain/code/r": 0.1 * step, "domain/web/r": 1 - 0.1 * step} for step in (0, 3)]
    put(runs[0], "history.json", [*history, *weights])
    assert "Domain weights" in Page(text_of(*runs)).headings
    made = figures.domains(named([read_run(folder) for folder in runs]))
    assert list(made) == ["domain weights of first"]
    assert {line.name: list(line.y) for line in made["domain weights of first"].data} == {
        "code": pytest.approx([0.0, 0.3]), "web": pytest.approx([1.0, 0.7]),
    }  # fmt: skip


def test_every_token_has_its_place_and_colour(runs):
    samples = [
        [
            {"text": "To"},
            {"text": " be\n", "kl": 0.5, "teacher": [[" be", 0.9]], "student": [[" do", 0.6]]},
            {"text": "\x00", "kl": 4.0, "teacher": [[" or", 0.9]], "student": [[" to", 0.6]]},
        ]
    ]
    put(runs[0], "tokens.json", samples)
    text = text_of(runs[0])
    assert "<span>To</span>" in text
    assert '<span data-i="0,0,1" style="--k: 0.125"> be\u21b5\n</span>' in text
    assert '<span data-i="0,0,2" style="--k: 1.000">\\x00</span>' in text
    assert "4.00 nats and more" in text


def test_a_run_without_tokens_says_so(runs):
    (runs[0] / "tokens.json").unlink()
    assert "This run wrote no tokens" in text_of(runs[0])


def test_what_was_read_cannot_become_markup(runs):
    evil = '</script><img src="http://evil.example/x" onerror="alert(1)">'
    put(runs[0], "tokens.json", [[{"text": evil, "kl": 1.0, "teacher": [[evil, 1.0]], "student": [[evil, 1.0]]}]])
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    config["data"]["columns"] = {"text": evil}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    history = json.loads((runs[0] / "history.json").read_text())
    put(runs[0], "history.json", [*history, {"step": 1, evil: 1.0}])
    found = Page(text_of(*runs))
    assert found.loads == ["data:,"]
    assert not [tag for tag, _ in found.elements if tag == "img"]
    assert json.loads(found.json)["first"]["tokens"][0][0]["text"] == evil


def test_where_the_configurations_differ(runs):
    found = dict(difference(named([read_run(folder) for folder in runs])))
    assert found == {"train.learning_rate": ["0.01", "0.5"]}
    alone = dict(difference(named([read_run(runs[0])])))
    assert alone["objective.0.divergence"] == ["forward_kl"]
    assert alone["(seed)"] == ["42"]


def test_the_same_runs_give_the_same_page(runs):
    assert text_of(*runs) == text_of(*runs)


def test_names_that_are_the_same(runs, tmp_path):
    other = Path(shutil.copytree(runs[0], tmp_path / "elsewhere" / "first"))
    assert list(named([read_run(runs[0]), read_run(other)])) == [str(runs[0]), str(other)]


def test_a_run_twice(llmkd, runs):
    assert "twice" in llmkd("report", runs[0], runs[0]).error


def test_plotly_that_is_not_installed(llmkd, runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    assert "pip install 'llmkd[report]'" in llmkd("report", runs[0]).error


def test_a_run_without_teacher_and_held_out_text(llmkd, recipe, tmp_path):
    file = recipe({"teacher": None, "objective": "cross_entropy", "data.held_out_every": None})
    assert llmkd("train", file, "train.max_steps=3").code == 0
    for command in (("report", tmp_path / "run"), ("card", tmp_path / "run")):
        done = llmkd(*command)
        assert done.code == 0, done.err
    assert "Quality over tokens and wall time" not in Page((tmp_path / "report.html").read_text()).headings
