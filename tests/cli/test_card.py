"""`llmkd card`: what stands in it is what the run left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llmkd import config

EVALUATION = {
    "models": {"student": {"path": "student"}, "start": {"path": "start"}, "teacher": {"path": "teacher"}},
    "tasks": {
        "cola": {
            "source": "lm-eval", "version": 1.0, "hash": "3f9c", "n": 1043, "limit": None, "repeats": 1, "seed": 0,
            "dataset": {"path": "nyu-mll/glue", "name": "cola", "split": "validation", "local": False}, "main": ["mcc"],
            "models": {
                "student": {"mcc": {"value": 0.4125, "stderr": 0.027, "interval": [0.3604, 0.4626]}},
                "teacher": {"mcc": {"value": 0.6, "stderr": None, "interval": None}},
            },
        },
    },
}  # fmt: skip


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def read(llmkd, run):
    """Runs `llmkd card` and gives the card back, as the Hub's client reads it."""

    def call() -> ModelCard:
        done = llmkd("card", run)
        assert done.code == 0, done.err
        assert done.out.splitlines()[-1] == f"card: {run / 'README.md'}"
        return ModelCard.load(run / "README.md")

    return call


def change(file: Path, **values) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **values}, sort_keys=False))


def test_the_model_index_holds_the_runs_metrics(read, run):
    after = json.loads((run / "metrics.json").read_text())["after"]
    found = {result.metric_type: result.metric_value for result in read().data.eval_results}
    assert found == {name: after[name] for name in ("kl", "top1_agreement", "perplexity", "bits_per_byte")}


def test_the_model_index_holds_every_task_with_its_version(read, run):
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    card = read()
    found = next(result for result in card.data.eval_results if result.metric_type == "mcc")
    assert found.metric_value == 0.4125
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == ("nyu-mll/glue", "cola", "validation")
    assert found.metric_args["task_version"] == 1.0
    assert found.metric_args["hash"] == "3f9c"
    assert found.metric_args["interval"] == [0.3604, 0.4626]
    assert "| task | version | metric | student | start | teacher |" in card.text
    assert "| cola (n = 1,043) | 1.0 | mcc | 0.412 [0.360, 0.463] | - | 0.600 |" in card.text


def test_the_recipe_in_it_runs(read, run):
    text = re.search(r"```yaml\n(.*?)```", read().text, re.DOTALL)
    (run / "again.yaml").write_text(text[1])
    assert config.load(run / "again.yaml") == config.load(run / "config.yaml")


def test_what_the_student_was_made_of(read, run):
    metrics = json.loads((run / "metrics.json").read_text())
    text = read().text
    for words in (
        "KL(p \\|\\| q) = sum_v p(v) (log p(v) - log q(v))",
        "loss = (1 x `token` + 0.1 x `cross_entropy`) / number of supervised items",
        '`divergence="forward_kl"`, `temperature=1.0`',
        f"| tokens trained on | {metrics['train']['tokens']:,} |",
        f"| samples | {metrics['train']['data']['samples']} | {metrics['train']['data']['eval_samples']} |",
        f"| hardware | {metrics['device']}, 1 process(es) |",
        f"| wall time | {metrics['train']['seconds']:,.0f} s |",
        f"torch {metrics['versions']['torch']}",
        "eprint = {1503.02531}",
    ):
        assert words in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert re.fullmatch(r"[|:-]+", table.splitlines()[1]), "no table is torn"
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


def test_names_on_the_hub_reach_the_metadata(read, run):
    commit = "a" * 40
    metrics = json.loads((run / "metrics.json").read_text()) | {"revisions": {"teacher": commit, "data": "b" * 40}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    change(run / "config.yaml", model="org/small", teacher={"path": "org/large", "revision": "v1"},
           data={**data, "path": "org/texts", "name": "en"})  # fmt: skip
    card = read()
    assert card.data.base_model == ["org/small", "org/large"]
    assert card.data.datasets == ["org/texts"]
    assert {"llmkd", "knowledge-distillation", "forward_kl"} <= set(card.data.tags)
    assert f"[org/large](https://huggingface.co/org/large) | v1 = {commit} |" in card.text
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_revision) == ("org/texts", "en", "b" * 40)


def test_a_student_of_several_teachers_names_each(read, run):
    teachers = ["org/large", {"path": "org/larger", "revision": "v2"}]
    change(run / "config.yaml", teacher={"name": "ensemble", "teachers": teachers})
    card = read()
    assert "distilled from [org/large](https://huggingface.co/org/large) and [org/larger]" in card.text
    assert [line.count("org/large") > 0 for line in card.text.splitlines() if line.startswith("| teacher |")] == [
        True,
        True,
    ]
    assert {"org/large", "org/larger"} <= set(card.data.base_model)


def test_the_licence_is_inherited_and_its_limits_are_said(llmkd, read, run, models, tmp_path):
    teacher = Path(shutil.copytree(models / "teacher", tmp_path / "large"))
    change(run / "config.yaml", model={"name": "depth", "layers": 1}, teacher=str(teacher))
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read().data.license == "mit"
    (teacher / "README.md").write_text("---\nlicense: gemma\n---\n")
    card = read()
    assert card.data.license == "gemma"
    assert "> **Licence.** The licence of the teacher" in card.text
    assert "warning: The licence of the teacher" in llmkd("card", run).out


def test_the_manifest_of_the_stage_that_made_the_data(read, run, tmp_path):
    folder = tmp_path / "selected"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"stage": "select", "rows": 12345}))
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    change(run / "config.yaml", data={**data, "path": str(folder)})
    text = read().text
    assert '"stage": "select"' in text
    assert "12345" in text


def test_code_of_the_users_own_is_named_not_imported(read, run):
    change(run / "config.yaml", objective={"name": "token", "divergence": "my_losses:squared"})
    text = read().text
    assert "divergence `my_losses:squared`" in text
    assert "code of its author's own" in text


def test_a_broken_file_is_named(llmkd, run):
    (run / "evaluation.json").write_text("{")
    assert "evaluation.json" in llmkd("card", run).error
