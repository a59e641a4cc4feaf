"""`llmkd train` to the end: the run folder, what is printed, and that llmkd is not needed afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from place import WORDS, recipe_of, write_rows

from llmkd.checkpoints import complete_checkpoints
from llmkd.config import load

MEASURED = {"kl", "top1_agreement", "perplexity", "bits_per_byte", "tokens_per_second", "peak_memory_mb"}
READER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
sys.modules["llmkd"] = None
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 0
ids = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert ids.shape[1] <= 7 + 4 and tokenizer.decode(ids[0]).startswith("the cat")
assert sum(p.numel() for p in model.parameters()) == int(sys.argv[2])
"""


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """One run by `python -m llmkd` in a fresh interpreter: its folder and what it printed."""
    place = tmp_path_factory.mktemp("finished")
    config = recipe_of(models)
    config["train"] |= {"num_train_epochs": 6, "output_dir": "out/run"}
    (place / "recipe.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "llmkd", "train", "recipe.yaml", "train.seed=3"]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return place, done


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": root}


def test_the_run_folder_is_complete(finished):
    run = finished[0] / "out" / "run"
    files = {"config.yaml", "metrics.json", "history.json", "tokens.json"}
    assert {file.name for file in run.iterdir()} == {"student", "checkpoints", *files}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (run / "student").iterdir()
    }
    assert len(complete_checkpoints(run / "checkpoints")) == 9


def test_config_is_the_resolved_recipe(finished):
    place = finished[0]
    assert load(place / "out/run/config.yaml") == load(place / "recipe.yaml", ["train.seed=3"])


def test_metrics_have_every_number_and_the_kl_goes_down(finished):
    metrics = json.loads((finished[0] / "out/run/metrics.json").read_text())
    for column in ("before", "after"):
        assert set(metrics[column]) == MEASURED
        assert all(value > 0 for name, value in metrics[column].items() if name != "top1_agreement")
    assert metrics["after"]["kl"] < 0.7 * metrics["before"]["kl"]
    assert metrics["after"]["top1_agreement"] > metrics["before"]["top1_agreement"]
    assert {"tokens_per_second", "peak_memory_mb", "loss", "steps", "seconds"} <= set(metrics["train"])
    assert metrics["train"]["steps"] == 42
    assert metrics["train"]["data"]["samples"] > 0
    assert metrics["seed"] == 3
    assert {"python", "torch", "transformers", "llmkd"} <= set(metrics["versions"])


def test_the_output_is_llmkds_own(finished):
    done = finished[1]
    first, *table = done.stdout.splitlines()
    assert first.startswith("data: 49 rows, ")
    for label in ("student before", "student after", "teacher", "KL to teacher", "top-1 agreement", "perplexity",
                  "bits per byte", "parameters", "tokens/s"):  # fmt: skip
        assert label in "\n".join(table)
    assert "run folder: out/run" in table
    noise = [
        line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not re.search(r"\d+%\||examples", line)
    ]
    assert noise in ([], [line for line in noise if line.startswith("WARNING data")])
    bar = re.split(r"\r", done.stderr)[-1]
    assert re.search(r"distil: 100%.*42/42 \[.*loss=[\d.]+.*tokens/s=[\d,]+", bar), bar


def test_the_printed_next_command_runs(finished):
    place, done = finished
    command = done.stdout.rpartition("next:\n")[2].strip()
    assert command.startswith("python -c ")
    command = command.replace("python", sys.executable, 1)
    spoken = subprocess.run(
        command, shell=True, cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.startswith("The for statement")


def test_the_student_needs_nothing_of_llmkd(finished, tmp_path):
    run = finished[0] / "out/run"
    size = json.loads((run / "metrics.json").read_text())["parameters"]
    command = [sys.executable, "-c", READER, str(run / "student"), str(size)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_output_dir_follows_the_recipes_name(llmkd, recipe, tmp_path):
    file = recipe({"train.output_dir": None, "train.num_train_epochs": 1}, name="my_recipe.yaml")
    done = llmkd("train", file)
    assert done.code == 0, done.err
    assert (tmp_path / "runs/my_recipe/metrics.json").is_file()
    assert "run folder: runs/my_recipe" in done.out


def test_extends_and_overrides_reach_the_run(llmkd, recipe, tmp_path):
    recipe({"train.num_train_epochs": 1})
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: recipe.yaml\nobjective: cross_entropy\ntrain: {{output_dir: {tmp_path / 'child'}}}\n")
    done = llmkd("train", child, "train.max_steps=2", "data.max_samples=20")
    assert done.code == 0, done.err
    config = load(tmp_path / "child/config.yaml")
    assert config["objective"] == "cross_entropy"
    assert (config["train"]["max_steps"], config["data"]["max_samples"]) == (2, 20)
    assert json.loads((tmp_path / "child/metrics.json").read_text())["train"]["steps"] == 2


def test_parts_of_the_users_own_module_are_found_from_here(llmkd, recipe, tmp_path):
    (tmp_path / "own_losses.py").write_text(
        "def squared(log_t, log_s):\n"
        '    """sum_k (p_k - q_k)^2"""\n'
        "    return (log_t.exp() - log_s.exp()).square().sum(-1)\n"
    )
    file = recipe({"objective": {"name": "token", "divergence": "own_losses:squared"}})
    done = llmkd("train", file, "train.max_steps=1")
    assert done.code == 0, done.err


def test_a_run_without_teacher_and_held_out_text(llmkd, recipe, tmp_path):
    file = recipe(
        {"teacher": None, "objective": "cross_entropy", "data.held_out_every": None, "train.num_train_epochs": 1}
    )
    done = llmkd("train", file)
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["after"]["kl"] is None
    assert metrics["teacher"] == {}


def test_samples_without_a_supervised_token_are_counted_not_fatal(llmkd, recipe, tmp_path, caplog):
    rows = [{"prompt": "say " * 20 if i % 4 == 1 else "say: ", "completion": WORDS[i % 8]} for i in range(24)]
    file = recipe({"data.path": str(write_rows(tmp_path / "asked.jsonl", rows)), "train.num_train_epochs": 1})
    done = llmkd("train", file)
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "run/metrics.json").read_text())["train"]["data"]
    assert data["no_supervised_token"] + data.get("eval_no_supervised_token", 0) == 6
    assert "no supervised token" in done.out
    assert "no_supervised_token" in caplog.text
