"""metrics.json, the printed table, the card, the page and the tracker agree on every number of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from place import recipe_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import Page

from llmkd import table


@pytest.fixture(scope="module")
def told(server, models, tmp_path_factory):
    """A run with a tracker, and all that was said about it: (folder, printed table, card, page, the tracker's scalars)."""
    place = tmp_path_factory.mktemp("told")
    config = recipe_of(models)
    config["train"] |= {"output_dir": str(place / "run"), "num_train_epochs": 1, "report_to": "tensorboard"}
    (place / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    printed = server("train", place / "recipe.yaml")
    assert printed.code == 0, printed.err
    for words in (("card", place / "run"), ("report", place / "run", "-o", place / "report.html")):
        done = server(*words)
        assert done.code == 0, done.err
    (folder,) = {file.parent for file in (place / "run").rglob("events.out.tfevents.*")}
    tracker = EventAccumulator(str(folder))
    tracker.Reload()
    scalars = {tag: tracker.Scalars(tag) for tag in tracker.Tags()["scalars"]}
    card = ModelCard.load(place / "run" / "README.md")
    return place / "run", printed.out, card, Page((place / "report.html").read_text()), scalars


def test_every_table_shows_the_same_cells(told):
    run, printed, card, page, _ = told
    lines = [list(line) for line in table.lines(json.loads((run / "metrics.json").read_text()))]
    assert len(lines) == 7  # of a causal LM
    in_terminal = [[cell.strip() for cell in row.split("│")[1:-1]] for row in printed.splitlines() if "│" in row]
    assert in_terminal == lines
    in_card = [[cell.strip() for cell in row.split("|")[1:-1]] for row in card.text.splitlines() if row.startswith("|")]
    assert [row for row in in_card if row[0] in {line[0] for line in lines}] == lines
    assert page.tables["metrics", "run"][1:] == lines


def test_every_full_number_is_the_one_of_metrics_json(told):
    run, _, card, page, scalars = told
    metrics = json.loads((run / "metrics.json").read_text())
    index = {result.metric_type: result.metric_value for result in card.data.eval_results}
    shown = json.loads(page.json)["run"]["metrics"]
    history = json.loads((run / "history.json").read_text())
    final = [entry for entry in history if "eval_kl" in entry][-1]
    assert set(index) == set(table.QUALITY) & {key for key, value in metrics["after"].items() if value is not None}
    for name, value in index.items():
        assert value == metrics["after"][name] == shown["after"][name] == final[f"eval_{name}"]
        assert scalars[f"eval/{name}"][-1].value == pytest.approx(value, rel=1e-6), "TensorBoard keeps float32"
        assert scalars[f"eval/{name}"][0].value == pytest.approx(metrics["before"][name], rel=1e-6)


def test_training_is_told_alike(told):
    run, printed, card, page, scalars = told
    train = json.loads((run / "metrics.json").read_text())["train"]
    assert f"{train['steps']} steps in {train['seconds']:.0f} s" in printed
    assert f"| steps | {train['steps']:,} |" in card.text
    assert f"| tokens trained on | {train['tokens']:,} |" in card.text
    assert scalars["train/loss"][-1].value == pytest.approx(train["loss"], rel=1e-6)
    assert scalars["train/tokens_seen"][-1].value == train["tokens"]
    assert json.loads(page.json)["run"]["metrics"]["train"] == train
    assert re.search(rf"{train['steps']:,} steps, ", Path(run.parent / "report.html").read_text())
