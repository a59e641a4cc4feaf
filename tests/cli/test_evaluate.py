"""`llmkd evaluate` runs lm-eval for real on small local files: values, files, resuming, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from place import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkd.evaluation import intervals, results

pytestmark = pytest.mark.slow  # lm-eval's index of tasks alone takes seconds

WNLI = [
    {"sentence1": "The cat sat on the mat.", "sentence2": "The mat was sat on.", "label": 1},
    {"sentence1": "The dog ran off.", "sentence2": "The dog is a cat.", "label": 0},
    {"sentence1": "A cat saw a dog.", "sentence2": "A dog saw.", "label": 0},
]
STSB = [
    {"sentence1": "a cat", "sentence2": "a cat sat", "label": 4.2},
    {"sentence1": "a dog", "sentence2": "the mat", "label": 0.4},
    {"sentence1": "ran off", "sentence2": "sat on", "label": 1.8},
]
AIME = [{"Problem": "What is 1 + 1?", "Answer": 2}, {"Problem": "What is 2 x 3?", "Answer": 6}]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)


@pytest.fixture(scope="session")
def finished(models, tmp_path_factory) -> Path:
    """A run folder as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(models / "student", folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    model.get_output_embeddings().weight.data *= 30
    model.save_pretrained(folder / "student")
    config = f"model: {models / 'student'}\nteacher: {models / 'teacher'}\nobjective: token\n"
    (folder / "config.yaml").write_text(f"{config}data: {{path: {models / 'rows.jsonl'}}}\ntrain: {{seed: 1}}\n")
    (folder / "metrics.json").write_text('{"after": {"kl": 0.5}}')
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def data(tmp_path) -> Path:
    """GLUE under its Hub name, AIME under the last part of it."""
    for name, rows in (("wnli", WNLI), ("rte", WNLI), ("stsb", STSB)):
        (tmp_path / "data" / "nyu-mll" / "glue" / name).mkdir(parents=True)
        write_rows(tmp_path / "data" / "nyu-mll" / "glue" / name / "validation.jsonl", rows)
    (tmp_path / "data" / "AIME_2024").mkdir()
    write_rows(tmp_path / "data" / "AIME_2024" / "train.jsonl", AIME)
    return tmp_path / "data"


def read(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def accuracy(folder: Path) -> float:
    """WNLI by hand: the choice with the larger log-likelihood after the plain prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in WNLI:
        prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        scores = []
        for choice in (" False", " True"):
            start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(log_p.gather(-1, ids[0, start:, None]).sum().item())
        right += int(scores[1] > scores[0]) == row["label"]
    return right / len(WNLI)


def test_student_start_and_teacher_side_by_side(llmkd, run, data, models):
    result = llmkd("evaluate", run, "--tasks", "wnli,stsb", "--data", data, "--no-chat-template")
    assert result.code == 0, result.err
    document = read(run)
    assert list(document["models"]) == ["student", "start", "teacher"]
    wnli = document["tasks"]["wnli"]
    folders = {"student": run / "student", "start": models / "student", "teacher": models / "teacher"}
    for label, folder in folders.items():
        found = wnli["models"][label]["acc"]
        assert found["value"] == pytest.approx(accuracy(folder))
        assert found["interval"][0] <= found["value"] <= found["interval"][1]
        assert f"{found['value']:.3f}" in result.out
    assert (wnli["n"], wnli["limit"], wnli["source"], wnli["main"]) == (3, None, "lm-eval", ["acc"])
    assert wnli["dataset"] == {"path": "nyu-mll/glue", "name": "wnli", "split": "validation", "local": True}
    assert document["tasks"]["stsb"]["source"] == "llmkd"
    assert -1 <= document["tasks"]["stsb"]["models"]["student"]["pearson"]["value"] <= 1
    assert {"lm_eval", "transformers", "llmkd"} <= set(document["llmkd"])
    assert "evaluation.json" in result.out


def test_chat_prompts_where_there_is_a_template(llmkd, run, data):
    prompts = {}
    for option in ("--chat-template", "--no-chat-template"):
        assert llmkd("evaluate", run, "--tasks", "rte", "--baseline", "", "--data", data, option).code == 0
        document = read(run)
        prompts[option] = document["tasks"]["rte"]["runs"]["student"]["prompts"]
        assert document["models"]["student"]["chat_template"] is (option == "--chat-template")
    assert prompts["--chat-template"] != prompts["--no-chat-template"]
    assert llmkd("evaluate", run, "--tasks", "rte", "--baseline", "", "--data", data).code == 0
    assert read(run)["tasks"]["rte"]["runs"]["student"]["prompts"] == prompts["--chat-template"]


def test_no_chat_template(llmkd, run, data):
    """Plain prompts, said so; but an error if the template was asked for."""
    for file in (run / "student").glob("chat_template*"):
        file.unlink()
    settings = json.loads((run / "student" / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (run / "student" / "tokenizer_config.json").write_text(json.dumps(settings))
    result = llmkd("evaluate", run, "--tasks", "rte", "--baseline", "start", "--data", data)
    assert result.code == 0
    assert "without a chat template: student" in result.out
    assert [model["chat_template"] for model in read(run)["models"].values()] == [False, True]
    error = llmkd("evaluate", run, "--tasks", "rte", "--data", data, "--chat-template").error
    assert "'student'" in error
    assert "has none; expected a chat model" in error


def test_aime_is_sampled_and_the_seed_decides(llmkd, run, data):
    def evaluate(*more):
        argv = ("--tasks", "aime24", "--baseline", "", "--data", data, "--repeats", 3, "--max-tokens", 8, *more)
        assert llmkd("evaluate", run, *argv).code == 0
        return read(run)["tasks"]["aime24"]

    task = evaluate()
    assert (task["repeats"], task["n"], task["generation"]["max_gen_toks"]) == (3, 2, 8)
    assert task["generation"]["do_sample"] is True
    assert task["models"]["student"]["mean@n"] == {
        "value": 0.0,
        "stderr": 0.0,
        "interval": [0.0, pytest.approx(0.658, abs=1e-3)],
    }
    assert set(task["models"]["student"]) == {"mean@n", "pass@n"}
    assert evaluate("--seed", 7)["seed"] == 7


def test_killed_half_way_it_goes_on_where_it_was(llmkd, run, data, monkeypatch):
    whole = run.parent / "whole"
    shutil.copytree(run, whole, copy_function=shutil.copy2)
    argv = ("--tasks", "rte,wnli", "--baseline", "start", "--data", data)
    assert llmkd("evaluate", whole, *argv).code == 0
    add, written = results.add, []

    def add_and_die(folder, name, task, label, *rest):
        written.append((label, name))
        if len(written) == 3:
            raise KeyboardInterrupt
        return add(folder, name, task, label, *rest)

    monkeypatch.setattr(results, "add", add_and_die)
    stopped = llmkd("evaluate", run, *argv)
    assert stopped.code == 130
    assert "Go on with the same command" in stopped.out
    assert set(read(run)["models"]) == {"student"}
    monkeypatch.setattr(results, "add", add)
    again = llmkd("evaluate", run, *argv)
    assert again.out.count("stands already") == 2
    for name, task in read(whole)["tasks"].items():
        found = read(run)["tasks"][name]
        assert {**found, "runs": 0} == {**task, "runs": 0}


def test_other_settings_are_other_results(llmkd, run, data):
    argv = ("evaluate", run, "--tasks", "wnli", "--data", data, "--baseline")
    assert llmkd(*argv, "start", "--limit", 2).code == 0
    assert read(run)["tasks"]["wnli"]["n"] == 2
    first = read(run)["tasks"]["wnli"]["hash"]
    assert llmkd(*argv, "").code == 0
    task = read(run)["tasks"]["wnli"]
    assert (task["n"], set(task["models"])) == (3, {"student"})
    assert task["hash"] != first
    (run / "student" / "model.safetensors").touch()
    assert "stands already" not in llmkd(*argv, "").out


def test_a_cut_student_and_a_model_by_name(llmkd, run, data, models):
    """The start of a cut student exists nowhere: it is made. Any model may be compared with."""
    config = (run / "config.yaml").read_text()
    cut = f"model: {{name: depth, layers: 1, path: {models / 'teacher'}}}"
    (run / "config.yaml").write_text(config.replace(f"model: {models / 'student'}", cut))
    other = str(models / "student")
    result = llmkd("evaluate", run, "--tasks", "rte", "--data", data, "--baseline", f"start,{other}")
    assert result.code == 0, result.err
    sizes = {label: model["parameters"] for label, model in read(run)["models"].items()}
    assert sizes["start"] < sizes["student"] == sizes[other]
    alone = llmkd("evaluate", models / "student", "--tasks", "rte", "--data", data)
    assert alone.code == 0
    (file,) = Path("evaluations").rglob("evaluation.json")
    found = json.loads(file.read_text())["tasks"]["rte"]["models"]["model"]["acc"]
    assert found == read(run)["tasks"]["rte"]["models"][other]["acc"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--tasks", "colaa"), "got 'colaa'; expected a task, group or tag of lm-eval, such as glue, aime24 or gsm8k; did you"),
        ((), "--tasks: got nothing; expected names, separated by commas. Set --tasks glue,aime24."),
        (("--tasks", "mrpc"), "task mrpc: its data are not in"),
        (("--tasks", "aime25"), "Copy the dataset 'math-ai/aime25' there."),
        (("--tasks", "rte", "--baseline", "techer"), "expected start, teacher or a model; did you mean 'teacher'?"),
        (("--tasks", "rte", "--backend", "vlm"), "unknown backend 'vlm'"),
        (("--tasks", "rte", "--batch-size", "big"), "--batch-size: got 'big'; expected auto or a number above 0. Set auto."),
        (("--tasks", "rte", "--repeats", "4"), "got 4, but no task of rte samples its answers; expected one. Remove it."),
        (("--tasks", "rte", "--max-tokens", "4"), "got 4, but no task of rte generates; expected one. Remove it."),
        (("--tasks", "aime24"), "32768 new tokens for a model of 512; expected room for the prompt as well. Set --max"),
    ],
)  # fmt: skip
def test_errors(llmkd, run, data, argv, said):
    assert said in llmkd("evaluate", run, "--data", data, *argv).error
    assert not (run / "evaluation.json").exists()


def test_data_that_cannot_be_read(llmkd, run, data):
    argv = ("evaluate", run, "--tasks", "rte")
    assert "is no folder" in llmkd(*argv, "--data", data / "none").error
    assert "cannot be loaded from 'nyu-mll/glue'" in llmkd(*argv).error
    folder = data / "nyu-mll" / "glue" / "rte"
    (folder / "validation.jsonl").rename(folder / "train.jsonl")
    error = llmkd(*argv, "--data", data).error
    assert "task rte: its data cannot be loaded in" in error
    assert "expected the dataset and split that the task names" in error


def test_an_unfinished_run(llmkd, run, data):
    (run / "metrics.json").unlink()
    error = llmkd("evaluate", run, "--tasks", "rte", "--data", data).error
    assert "is a run that has not finished" in error
    assert f"llmkd train {run / 'config.yaml'} train.output_dir={run} --resume" in error


def test_results_that_are_none(llmkd, run, data):
    (run / "evaluation.json").write_text('{"tasks": []}')
    assert (
        "expected results of llmkd evaluate. Delete it."
        in llmkd("evaluate", run, "--tasks", "rte", "--data", data).error
    )


def test_start_of_a_model_that_is_no_run(llmkd, models, data):
    error = llmkd("evaluate", models / "student", "--tasks", "rte", "--baseline", "start", "--data", data).error
    assert "which is no run folder; expected a model" in error
