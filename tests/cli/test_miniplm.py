"""MiniPLM through its recipes, on tiny models: reference, score, select, train any student, with and without KD."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from place import WORDS, files, write_rows

from llmkd.data.load import SourceSpec, load_rows
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model

RECIPES = Path(__file__).parents[2] / "recipes" / "miniplm"
QUICK = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False}
TRAIN = [f"train.{key}={value}" for key, value in QUICK.items()] + ["train.warmup_steps=1", "train.report_to=none"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    texts = [" ".join(WORDS[(row * 7 + place * 3) % len(WORDS)] for place in range(4 + row % 9)) for row in range(60)]
    return write_rows(
        tmp_path / "corpus.jsonl", [{"text": f"Row {row}. The {text}."} for row, text in enumerate(texts)]
    )


@pytest.fixture
def score_recipe(corpus, models, tmp_path):
    """The recipe of step 1 with tiny models, as a file; keywords replace keys."""

    def write(name: str = "1_score", **changes) -> Path:
        recipe = yaml.safe_load((RECIPES / "1_score.yaml").read_text())
        recipe["stage"] |= {"teacher": str(models / "teacher"), "reference": str(models / "student"), "max_length": 64}
        recipe["stage"]["exclude"] = {"path": str(corpus), "split": "train[:10%]"}
        recipe |= {"data": {"path": str(corpus)}, "output_dir": str(tmp_path / name), "rows_per_shard": 12, **changes}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


@pytest.mark.slow
def test_the_recipes_run_one_after_another(llmkd, corpus, models, tmp_path):
    """0 to 3 with the real recipes and overrides; the student is of another family, with another tokenizer."""
    other = tmp_path / "gpt2"
    tiny_model(tiny_config("gpt2", n_positions=512, n_embd=32, n_layer=2, n_head=4)).save_pretrained(other)
    byte_tokenizer(("zzz",)).save_pretrained(other)
    data = [f"data.path={corpus}", "data.max_length=64", "data.held_out_every=8"]
    student = f"model={{path: {models / 'student'}, config: null}}"
    done = llmkd("train", RECIPES / "0_reference.yaml", student, *data, "data.split=train[:10%]", *TRAIN)
    assert done.code == 0, done.err
    reference = "runs/miniplm/0_reference/student"
    done = llmkd("stage", RECIPES / "1_score.yaml", f"stage.teacher={models / 'teacher'}", "stage.max_length=64",
                 "stage.reference.dtype=float32", f"stage.exclude={{path: {corpus}, split: 'train[:10%]'}}",
                 f"data={{path: {corpus}}}", "rows_per_shard=16")  # fmt: skip
    assert done.code == 0, done.err
    assert "57 rows read" in done.out, "the last 95%"
    assert "in_reference 3" in done.out, "the second 5% of the corpus"
    done = llmkd("stage", RECIPES / "2_select.yaml", "rows_per_shard=7")
    assert done.code == 0, done.err
    scored, kept = (load_rows(SourceSpec(path=f"runs/miniplm/{name}")) for name in ("1_score", "2_select"))
    assert len(kept) == len(scored) // 2
    assert set(kept["example_id"]) <= set(scored["example_id"])
    whole = dict(zip(scored["example_id"], scored["text"], strict=True))
    assert all(whole[row["example_id"]] == row["text"] for row in kept)
    assert Path(reference).is_dir()
    new = f"model={{name: pretrained, path: {other}}}"
    done = llmkd("train", RECIPES / "3_train.yaml", new, "data.max_length=64", "data.held_out_every=4", *TRAIN,
                 "data.packing=false")  # fmt: skip
    assert done.code == 0, done.err
    done = llmkd("train", RECIPES / "3_train_kd.yaml", student, f"teacher={models / 'teacher'}", "data.max_length=64",
                 "data.held_out_every=4", *TRAIN)  # fmt: skip
    assert done.code == 0, done.err


def test_scores_are_the_same_bits_after_a_kill_and_on_two_ranks(server, score_recipe, tmp_path):
    assert server("stage", score_recipe("whole")).code == 0
    recipe = score_recipe("killed")
    assert server("stage", recipe, fault=("kill within write", 5)).code == -9
    assert server("stage", recipe).code == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    recipe = score_recipe("ranks")
    for rank in ("1", "0"):
        assert server("stage", recipe, env={"RANK": rank, "WORLD_SIZE": "2"}).code == 0
    assert files(tmp_path / "ranks") == files(tmp_path / "whole")


@pytest.mark.slow
def test_accelerate_launches_it_on_two_processes(server, score_recipe, tmp_path):
    assert server("stage", score_recipe("whole"), env={"OMP_NUM_THREADS": "1"}).code == 0
    recipe = score_recipe("launched")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    env = {**os.environ, "PYTHONPATH": str(RECIPES.parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launch, "-m", "llmkd", "stage", str(recipe)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "launched") == files(tmp_path / "whole")


def test_another_model_at_the_same_path_is_another_stage(llmkd, score_recipe, models, tmp_path):
    copy = tmp_path / "teacher"
    copy.mkdir()
    for file in (models / "teacher").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    override = f"stage.teacher={copy}"
    assert llmkd("stage", score_recipe(), override).code == 0
    weights = copy / "model.safetensors"
    weights.write_bytes((models / "student" / "model.safetensors").read_bytes())
    assert "models.teacher was" in llmkd("stage", score_recipe(), override).error


def test_two_separate_scores_are_joined_by_id(llmkd, score_recipe, tmp_path):
    assert llmkd("stage", score_recipe("both")).code == 0
    for name, missing in (("teacher", "reference"), ("reference", "teacher")):
        assert llmkd("stage", score_recipe(name), f"stage.{missing}=null").code == 0
    stage = {"name": "select", "score": "difference", "ratio": 0.3}
    places = {name: {"path": str(tmp_path / name)} for name in ("both", "teacher", "reference")}
    sources = {"one": {"data": places["both"]}, "two": {"data": places["teacher"], "join": places["reference"]}}
    for name, source in sources.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"stage": stage, **source, "output_dir": str(tmp_path / name)}))
        assert llmkd("stage", file).code == 0
    one, two = (load_rows(SourceSpec(path=str(tmp_path / name))) for name in ("one", "two"))
    assert one["example_id"] == two["example_id"]
    assert one["text"] == two["text"]
    assert one["score"] == pytest.approx(two["score"], abs=1e-5)


def test_a_join_that_does_not_fit_is_an_error(llmkd, score_recipe, tmp_path):
    assert llmkd("stage", score_recipe("a"), "data.max_samples=24").code == 0
    assert llmkd("stage", score_recipe("b"), "data.max_samples=25").code == 0
    assert llmkd("stage", score_recipe("c"), "data.max_samples=24", "rows_per_shard=8").code == 0
    file = tmp_path / "select.yaml"
    for other, words in (("b", "rows for"), ("c", "expected the same")):
        places = {"data": {"path": str(tmp_path / "a")}, "join": {"path": str(tmp_path / other)}}
        stage = {"name": "select", "score": "random", "ratio": 0.5}
        file.write_text(yaml.safe_dump({"stage": stage, "output_dir": str(tmp_path / "selected"), **places}))
        assert words in llmkd("stage", file).error
