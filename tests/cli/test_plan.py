"""`--dry-run` checks without weights and writes nothing; `--smoke` runs every recipe without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmkd.config import load

NO_NETWORK = """
import socket, sys
def refuse(self, address):
    sys.exit(f"connects to {address}")
socket.socket.connect = refuse
sys.argv = ["llmkd", "train", sys.argv[1], "--smoke"]
from llmkd.cli import main
main()
"""
RECIPES = Path(__file__).parents[2] / "recipes"
RUNNABLE = sorted(
    file for file in RECIPES.rglob("*.yaml") if "accelerate" not in file.parts and "base" not in file.parts
)


def test_dry_run_reads_no_weights_and_writes_nothing(llmkd, recipe, models, tmp_path):
    file = recipe({"model": str(models / "hollow"), "teacher": str(models / "hollow")})
    before = sorted(tmp_path.rglob("*"))
    done = llmkd("train", file, "--dry-run", "train.seed=7")
    assert done.code == 0, done.err
    assert sorted(tmp_path.rglob("*")) == before
    assert yaml.safe_load(done.out) == load(file, ["train.seed=7"])
    comments = [line for line in done.out.splitlines() if line.startswith("#")]
    assert any("memory" in line and "student weights" in line and "total" in line for line in comments)


def test_dry_run_counts_the_copies_of_a_self_teacher(llmkd, recipe, models):
    plain = llmkd("train", recipe({"model": str(models / "hollow")}), "--dry-run")
    assert "snapshots" not in plain.out
    file = recipe({"model": str(models / "hollow"), "teacher": {"name": "votes", "last": 1000}})
    done = llmkd("train", file, "--dry-run")
    assert done.code == 0, done.err
    memory = next(line for line in done.out.splitlines() if "student snapshots" in line)
    sizes = dict(part.rsplit(" ", 1) for part in memory.partition("GiB: ")[2].split(", "))
    assert float(sizes["student snapshots"]) == pytest.approx(1000 * float(sizes["gradients"]), abs=6)
    assert float(sizes["student snapshots"]) > 0
    wrong = llmkd("train", recipe({"teacher": {"name": "votes", "last": 0}}), "--dry-run")
    assert "votes.last" in wrong.error


def test_dry_run_of_a_teacher_inside_a_teacher(llmkd, recipe, models):
    inner = {"name": "local", "path": str(models / "hollow")}
    file = recipe({"model": str(models / "hollow"), "teacher": {"name": "partition", "teacher": inner}})
    done = llmkd("train", file, "--dry-run")
    assert done.code == 0, done.err
    assert any("student snapshots" in line and "teacher weights" in line for line in done.out.splitlines())
    wrong = llmkd("train", recipe({"teacher": {"name": "partition", "teacher": inner, "by": "lable"}}), "--dry-run")
    assert "label" in wrong.error


def test_dry_run_and_an_adapter(llmkd, recipe, models):
    file = recipe({"model": str(models / "hollow"), "peft": {"r": 4, "target_modules": "all-linear"}})
    assert llmkd("train", file, "--dry-run").code == 0
    wrong = llmkd("train", file, "--dry-run", "peft.target_modules=[nowhere]")
    assert "nowhere" in wrong.error
    assert "peft" in wrong.error


def test_dry_run_finds_what_the_run_would_stop_at(llmkd, recipe, models):
    assert "teacher" in llmkd("train", recipe({"teacher": None}), "--dry-run").error
    assert "train" in llmkd("train", recipe(), "--dry-run", "train.learning_rat=1").error
    assert "held_out_evry" in llmkd("train", recipe(), "--dry-run", "data.held_out_evry=2").error


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection to somewhere else fails the test."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("file", RUNNABLE, ids=lambda file: str(file.relative_to(RECIPES)))
def test_every_recipe_smokes(llmkd, tmp_path, no_network, file):
    is_stage = "output_dir" in yaml.safe_load(file.read_text())
    done = llmkd("stage" if is_stage else "train", file, "--smoke")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("smoke: 8 rows read, " if is_stage else "smoke: 2 steps, loss ")
    assert list(tmp_path.iterdir()) == []


def test_smoke_of_hub_names_asks_no_hub(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", NO_NETWORK, str(RECIPES / "smollm2_360m_to_135m.yaml")]
    root = str(RECIPES.parent)
    env |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "smoke: 2 steps" in done.stdout


def test_there_are_recipes_to_smoke():
    assert len(RUNNABLE) > 5
