"""`--help` and `list`: quick, with examples, and complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkd.build import TABLES

CHECK = """
import sys
from llmkd.cli import main
try:
    main()
except SystemExit as ended:
    heavy = {"torch", "transformers", "datasets", "trl", "numpy"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else ended.code)
"""


def without_torch(*words: str) -> str:
    """What a command prints that imports nothing heavy."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", CHECK, *words], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [("--help",), ("list", "--help"), ("list",), ("list", "--markdown")])
def test_help_and_list_import_no_torch(words):
    assert without_torch(*words)


def test_help_is_quick_and_has_examples():
    shown = without_torch("train", "--help")
    for words in ("llmkd train recipes/quickstart.yaml", "accelerate launch", "--resume", "--dry-run", "--smoke"):
        assert words in shown


@pytest.mark.parametrize(
    "words", [(), ("--help",), ("list", "--help"), ("stage", "--help"), ("evaluate", "--help"), ("push", "--help")]
)
def test_help_names_the_commands(llmkd, words):
    shown = llmkd(*words)
    assert "llmkd" in shown.out + shown.err
    assert "Usage" in shown.out + shown.err


def test_list_names_every_entry_with_formula_and_paper(llmkd):
    done = llmkd("list")
    assert done.code == 0
    blocks = done.out.split("\n    ")
    heads = [line for line in done.out.splitlines() if line and not line.startswith(" ")]
    assert heads == [f"{kind} {name}" for kind, table in TABLES.items() for name in table]
    assert len([block for block in blocks if block.startswith("paper: ") and len(block) > 15]) == len(heads)


@pytest.mark.parametrize("command", ["card", "push", "report"])
def test_commands_on_runs_have_an_example(llmkd, command):
    assert f"llmkd {command} runs/quickstart" in llmkd(command, "--help").out


@pytest.mark.parametrize("kind", list(TABLES))
def test_list_of_one_table(llmkd, kind):
    done = llmkd("list", kind)
    heads = [line for line in done.out.splitlines() if line and not line.startswith(" ")]
    assert heads == [f"{kind} {name}" for name in TABLES[kind]]


def test_list_of_no_table_suggests_one(llmkd):
    error = llmkd("list", "divergences").error
    assert "divergences" in error
    assert "did you mean 'divergence'?" in error
    assert "objective" in llmkd("list", "nonsense").error


def test_list_markdown_is_a_table(llmkd):
    lines = llmkd("list", "--markdown").out.splitlines()
    assert all(line.startswith("|") for line in lines)
    assert any("`forward_kl`" in line for line in lines)
