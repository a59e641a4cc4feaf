"""Classifiers from recipes: a fine-tuned teacher, a cut student, their evaluation, a regression, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from place import write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from llmkd.evaluation import intervals
from llmkd.students.tiny import byte_tokenizer, tiny_config

COLUMNS = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
TRAIN = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "save_strategy": "no",
         "report_to": "none", "logging_steps": 4, "seed": 3}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An encoder without a head, and a task under its Hub layout: is the first sentence about a cat?"""
    folder = tmp_path_factory.mktemp("glue")
    torch.manual_seed(0)
    BertModel(tiny_config("bert", num_hidden_layers=4)).save_pretrained(folder / "encoder")
    byte_tokenizer().save_pretrained(folder / "encoder")
    draw = random.Random(0)
    words = ("cat", "dog")
    rows = [
        {"sentence1": f"a {words[(n := draw.randint(0, 1))]} sat", "sentence2": "on", "label": 1 - n} for _ in range(80)
    ]
    for task, scale in (("mrpc", None), ("stsb", 2.5)):
        found = rows if scale is None else [{**row, "label": row["label"] * scale + 0.5} for row in rows]
        (folder / "data" / task).mkdir(parents=True)
        write_rows(folder / "data" / task / "train.jsonl", found[:60])
        write_rows(folder / "data" / task / "validation.jsonl", found[60:])
    return folder


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)


@pytest.fixture
def recipe(place, tmp_path):
    """Factory: a recipe as those in recipes/glue; `teacher` fine-tunes, else two layers of the encoder are distilled."""

    def write(name: str, task: str = "mrpc", labels: int = 2, teacher: bool = False, **changes) -> Path:
        data = str(place / "data")
        source = {"path": data, "name": task, "columns": COLUMNS}
        goal = "cross_entropy" if labels > 1 else "regression"
        soft = (
            [{"name": "token"}, {"name": "sinkd", "weight": 0.1}]
            if labels > 1
            else [{"name": "regression", "target": "teacher"}]
        )
        encoder = {"path": str(place / "encoder"), "num_labels": labels}
        config = {
            "model": encoder if teacher else {"name": "depth", "layers": 2, **encoder},
            "teacher": None if teacher else str(tmp_path / f"{task}_teacher" / "student"),
            "objective": goal if teacher else [*soft, {"name": goal}, {"name": "hidden_mse", "weight": 0.1}],
            "data": {**source, "max_length": 64, "eval": {**source, "split": "validation"}},
            "train": {**TRAIN, "output_dir": str(tmp_path / name)},
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**config, **changes}, sort_keys=False))
        return file

    return write


def by_hand(folder: Path, place: Path, task: str = "mrpc") -> list[tuple[float, torch.Tensor]]:
    """(label, logits) of each validation row, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (place / "data" / task / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        return [
            (row["label"], model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits[0])
            for row in rows
        ]


def test_a_teacher_a_student_and_their_evaluation(llmkd, recipe, place, tmp_path):
    result = llmkd("train", recipe("mrpc_teacher", teacher=True))
    assert result.code == 0, result.err
    assert "accuracy" in result.out
    assert f"llmkd evaluate {tmp_path / 'mrpc_teacher'}" in result.out
    result = llmkd("train", recipe("mrpc"))
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "mrpc" / "metrics.json").read_text())
    assert metrics["after"]["kl"] < metrics["before"]["kl"]
    assert "perplexity" not in metrics["after"]
    pairs = by_hand(tmp_path / "mrpc" / "student", place)
    accuracy = sum(logits.argmax().item() == label for label, logits in pairs) / len(pairs)
    assert metrics["after"]["accuracy"] == pytest.approx(accuracy)

    result = llmkd("evaluate", tmp_path / "mrpc")
    assert result.code == 0, result.err
    document = json.loads((tmp_path / "mrpc" / "evaluation.json").read_text())
    task = document["tasks"]["mrpc"]
    assert list(task["models"]) == list(document["models"]) == ["student", "start", "teacher"]
    assert task["models"]["student"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert task["models"]["start"]["accuracy"]["value"] == pytest.approx(metrics["before"]["accuracy"])
    assert task["models"]["teacher"]["accuracy"]["value"] == pytest.approx(metrics["teacher"]["accuracy"])
    assert (task["n"], task["main"], task["source"]) == (20, ["accuracy", "f1"], "llmkd")
    assert document["models"]["start"]["parameters"] == document["models"]["student"]["parameters"]
    assert llmkd("evaluate", tmp_path / "mrpc").out.count("stands already") == 3

    both = llmkd("evaluate", tmp_path / "mrpc", tmp_path / "mrpc_teacher", "--baseline", "")
    score = [sum(task["models"]["student"][name]["value"] for name in task["main"]) / 2]
    alone = json.loads((tmp_path / "mrpc_teacher" / "evaluation.json").read_text())["tasks"]["mrpc"]["models"][
        "student"
    ]
    score.append(sum(number["value"] for number in alone.values()) / 2)
    (line,) = [line for line in both.out.splitlines() if "average" in line]
    assert f"{sum(score) / 2:.3f}" in line


def test_a_regression(llmkd, recipe, place, tmp_path):
    assert llmkd("train", recipe("stsb_teacher", "stsb", 1, teacher=True)).code == 0
    result = llmkd("train", recipe("stsb", "stsb", 1))
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "stsb" / "metrics.json").read_text())
    pairs = by_hand(tmp_path / "stsb" / "student", place, "stsb")
    mse = sum((logits.item() - label) ** 2 for label, logits in pairs) / len(pairs)
    assert metrics["after"]["mse"] == pytest.approx(mse, rel=1e-4)
    assert metrics["after"]["mse_to_teacher"] < metrics["before"]["mse_to_teacher"]
    assert llmkd("evaluate", tmp_path / "stsb", "--baseline", "teacher", "--limit", 10).code == 0
    task = json.loads((tmp_path / "stsb" / "evaluation.json").read_text())["tasks"]["stsb"]
    assert (task["n"], task["limit"], task["main"]) == (10, 10, ["pearson", "spearmanr"])
    known, said = zip(*((label, logits.item()) for label, logits in pairs[:10]), strict=True)
    expected = torch.corrcoef(torch.tensor([known, said]))[0, 1].item()
    assert task["models"]["student"]["pearson"]["value"] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_student(llmkd, recipe, tmp_path):
    peft = {"r": 2, "target_modules": ["query", "value"]}
    assert llmkd("train", recipe("mrpc", teacher=True, peft=peft)).code == 0
    assert (tmp_path / "mrpc" / "student" / "adapter_config.json").is_file()
    assert llmkd("evaluate", tmp_path / "mrpc").code == 0
    metrics = json.loads((tmp_path / "mrpc" / "metrics.json").read_text())
    found = json.loads((tmp_path / "mrpc" / "evaluation.json").read_text())["tasks"]["mrpc"]["models"]
    assert found["student"]["accuracy"]["value"] == pytest.approx(metrics["after"]["accuracy"])


def test_local_data_of_another_place(llmkd, recipe, place, tmp_path):
    assert llmkd("train", recipe("mrpc", teacher=True)).code == 0
    (tmp_path / "copy" / "data").mkdir(parents=True)
    (tmp_path / "copy" / "data" / "mrpc").symlink_to(place / "data" / "mrpc")
    assert llmkd("evaluate", tmp_path / "mrpc", "--data", tmp_path / "copy").code == 0
    error = llmkd("evaluate", tmp_path / "mrpc", "--data", tmp_path / "mrpc").error
    assert "task mrpc: its data are not in" in error
    for option, said in (
        (("--repeats", 3), "a classifier, which has no prompt"),
        (("--tasks", "rte"), "expected mrpc"),
    ):
        assert said in llmkd("evaluate", tmp_path / "mrpc", *option).error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": 1, "objective": "cross_entropy"}, "the model gives one value an example"),
        ({"objective": "regression"}, "the model gives a distribution"),
        ({"task": "stsb"}, "got the label 0.5; expected a class from 0 to 1, as an integer"),
        ({"teacher": False}, "run its recipe first"),
    ],
)
def test_what_does_not_fit_is_said_before_training(llmkd, recipe, tmp_path, changes, said):
    file = recipe("mrpc", **{"teacher": True, **changes})
    assert said in llmkd("train", file).error
    assert not (tmp_path / "mrpc").exists()


def test_labels_and_models_that_take_none(llmkd, recipe, models, place):
    causal = recipe("mrpc", teacher=True, model=str(models / "student"))
    assert "got a label for a causal LM" in llmkd("train", causal, "--dry-run").error
    texts = recipe("mrpc", teacher=True, data={"path": str(models / "rows.jsonl")})
    assert "got no label for a classifier" in llmkd("train", texts, "--dry-run").error
    cut = recipe("mrpc", model={"name": "depth", "layers": 1, "num_labels": 2}, teacher=True)
    assert (
        "model.num_labels: got a value for a cut teacher" in llmkd("train", cut, f"teacher={models / 'teacher'}").error
    )
    assert llmkd("train", recipe("ok", teacher=True), "--dry-run").code == 0


def test_a_run_without_evaluation_data(llmkd, recipe, place, tmp_path):
    data = {"path": str(place / "data" / "mrpc" / "train.jsonl"), "columns": COLUMNS}
    assert llmkd("train", recipe("mrpc", teacher=True, data=data)).code == 0
    assert "the run has no evaluation data" in llmkd("evaluate", tmp_path / "mrpc").error
