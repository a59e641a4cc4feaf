"""kill -9, Ctrl-C and a full disk at any moment: going on gives the undisturbed result, bit for bit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from place import recipe_of

from llmkd.checkpoints import complete_checkpoints

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
SAME = ("kl", "top1_agreement", "perplexity", "bits_per_byte")


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that must not depend on what happened on the way."""
    metrics = json.loads((run / "metrics.json").read_text())
    weights = {file.name: file.read_bytes() for file in (run / "student").glob("*.safetensors")}
    assert weights
    kept = {part: {key: metrics[part].get(key) for key in SAME} for part in ("before", "after", "teacher")}
    counted = {key: metrics["train"][key] for key in ("steps", "tokens", "data")}
    return {"weights": weights, **kept, **counted}


def steps(run: Path) -> list[int]:
    return [int(folder.name.rpartition("-")[2]) for folder in complete_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(server, models, tmp_path_factory):
    """The results of a full and of a LoRA run that nothing happened to."""
    found = {}
    for name, more in (("full", {}), ("lora", {"peft": LORA})):
        folder = tmp_path_factory.mktemp(name)
        config = recipe_of(models) | more
        config["train"]["output_dir"] = str(folder / "run")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
        ended = server("train", folder / "recipe.yaml")
        assert ended.code == 0, ended.err
        found[name] = outcome(folder / "run")
    assert found["full"]["steps"] == 21
    assert found["full"]["after"]["kl"] < found["full"]["before"]["kl"]
    return found


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        (("kill in step", 3), []),
        (("kill in step", 12), [5, 10]),
        (("kill after checkpoint", 5), [5]),
        (("kill in checkpoint", 10), [5]),
        (("kill in export", 0), [5, 10, 15, 20, 21]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(server, undisturbed, recipe, tmp_path, fault, kept):
    file, run = recipe(), tmp_path / "run"
    assert server("train", file, fault=fault).code == -9
    assert steps(run) == kept
    assert not (run / "metrics.json").exists()
    ended = server("train", file, "--resume")
    assert ended.code == 0, ended.err
    assert outcome(run) == undisturbed["full"]


def test_a_run_killed_twice_with_few_checkpoints_kept(server, undisturbed, recipe, tmp_path):
    file, run = recipe({"train.save_total_limit": 1}), tmp_path / "run"
    assert server("train", file, fault=("kill in checkpoint", 10)).code == -9
    assert steps(run) == [5], "the older checkpoint goes only once the newer is whole"
    assert server("train", file, "--resume", fault=("kill in step", 17)).code == -9
    assert server("train", file, "--resume").code == 0
    assert outcome(run) == undisturbed["full"]
    assert steps(run) == [21]


@pytest.mark.parametrize("fault", [("kill in step", 2), ("kill in step", 8)])
def test_an_adapter_resumes_alike(server, undisturbed, recipe, tmp_path, fault):
    file = recipe({"peft": LORA})
    assert server("train", file, fault=fault).code == -9
    assert server("train", file, "--resume").code == 0
    assert outcome(tmp_path / "run") == undisturbed["lora"]


@pytest.mark.parametrize("signal", ["interrupt", "terminate"])
def test_a_signal_saves_and_says_how_to_go_on(server, undisturbed, recipe, tmp_path, signal):
    file, run = recipe({"data.max_length": 48}, name="a recipe.yaml"), tmp_path / "run"
    stopped = server("train", file, "data.columns={text: text}", fault=(signal, 7))
    assert stopped.code == 130
    assert steps(run) == [5, 8]
    said = stopped.out.splitlines()[-1]
    assert said.startswith("stopped; checkpoint: ")
    assert "checkpoint-8" in said
    program, *words = shlex.split(said.partition("Go on with: ")[2])
    assert program == "llmkd"
    assert words[-1] == "--resume"
    assert server(*words).code == 0
    assert outcome(run) == undisturbed["full"]


def test_a_second_interrupt_stops_at_once(server, undisturbed, recipe, tmp_path):
    file, run = recipe(), tmp_path / "run"
    stopped = server("train", file, fault=("interrupt twice", 7))
    assert stopped.code == 130
    assert steps(run) == [5]
    assert f"interrupted. Go on with: llmkd train {file} --resume" in stopped.out
    assert "Traceback" not in stopped.err
    assert server("train", file, "--resume").code == 0
    assert outcome(run) == undisturbed["full"]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(server, undisturbed, recipe, tmp_path):
    file, run = recipe(), tmp_path / "run"
    full = server("train", file, fault=("disk full", 10))
    assert full.code == 1
    assert "disk" in full.error
    assert "checkpoint-10" in full.error
    assert "--resume" in full.error
    assert steps(run) == [5]
    assert server("train", file, "--resume").code == 0
    assert outcome(run) == undisturbed["full"]


def test_a_finished_run_says_so_and_another_recipe_is_told_apart(server, recipe, llmkd, tmp_path):
    file, run = recipe({"train.num_train_epochs": 1}), tmp_path / "run"
    assert llmkd("train", file).code == 0
    before = outcome(run)
    again = llmkd("train", file)
    assert str(run) in again.error
    assert "--resume" in again.error
    assert "train.output_dir" in again.error
    other = llmkd("train", file, "--resume", "train.learning_rate=0.5")
    assert "train.learning_rate was 0.01, is 0.5" in other.error
    added = llmkd("train", file, "--resume", "train.weight_decay=0.1")
    assert "train.weight_decay was None, is 0.1" in added.error
    deeper = llmkd("train", file, "--resume", "objective.1.weight=0.3")
    assert "objective" in deeper.error
    assert "0.3" in deeper.error
    done = llmkd("train", file, "--resume")
    assert done.code == 0
    assert "finished already" in done.out
    assert outcome(run) == before


def test_resume_of_nothing_is_a_new_run(llmkd, recipe, tmp_path):
    assert llmkd("train", recipe({"train.num_train_epochs": 1}), "--resume").code == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_folder_that_is_no_run_is_refused(llmkd, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for words in ((), ("--resume",)):
        assert str(tmp_path / "run") in llmkd("train", recipe(), *words).error
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    refused = llmkd("train", recipe(), f"train.output_dir={tmp_path / 'run' / 'thesis.txt'}")
    assert "thesis.txt" in refused.error
