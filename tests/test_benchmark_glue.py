"""The GLUE benchmark's objectives, averages and table, from made-up results."""

from __future__ import annotations

import pytest

from benchmarks.glue import ROOT, average, objective, spread, table
from llmkd import config

ALONE = {"accuracy": 0.6, "f1": 0.8}


def task(teacher, **methods):
    entries = {name: {"seeds": {}, **spread(seeds)} for name, seeds in methods.items()}
    return {"teacher": teacher, "methods": entries, "train_examples": 560, "of": 3667}


@pytest.fixture
def tasks():
    pair = [ALONE, {"accuracy": 0.8, "f1": 0.8}]
    mrpc = task({"accuracy": 0.9, "f1": 0.7}, alone=pair, kd=pair, sinkd=[ALONE, ALONE])
    rte = task({"accuracy": 0.5}, alone=(three := [{"accuracy": 0.5}, {"accuracy": 0.7}]), kd=three, sinkd=three)
    stsb = task({"pearson": 0.9}, alone=[{"pearson": None}, {"pearson": 0.4}], kd=[{"pearson": 0.5}, {"pearson": 0.5}])
    return {"mrpc": mrpc, "rte": rte, "stsb": stsb}


def test_methods_differ_by_their_objective_alone():
    of_recipe = config.load(ROOT / "recipes" / "glue" / "mrpc.yaml")["objective"]
    assert objective(of_recipe, "alone") == "cross_entropy"
    assert [part["name"] for part in objective(of_recipe, "kd")] == ["token"]
    assert objective(of_recipe, "sinkd") == of_recipe
    regression = config.load(ROOT / "recipes" / "glue" / "stsb.yaml")["objective"]
    assert (objective(regression, "alone"), objective(regression, "sinkd")) == ("regression", None)
    assert [part["target"] for part in objective(regression, "kd")] == ["label", "teacher"]


def test_an_average_is_over_the_tasks_that_all_have(tasks):
    found = average(tasks)
    assert found == {name: pytest.approx(value) for name, value in
                     {"teacher": 0.65, "alone": 0.675, "kd": 0.675, "sinkd": 0.65}.items()}  # fmt: skip


def test_a_constant_student_counts_as_0(tasks):
    assert tasks["stsb"]["methods"]["alone"]["mean"]["pearson"] == pytest.approx(0.2)


def test_the_table(tasks):
    result = {
        "tasks": tasks,
        "average": average(tasks),
        "seeds": [0, 1],
        "seconds": 120.0,
        "device": "CPU",
        "threads": 1,
    }
    lines = table(result).splitlines()
    assert "| mrpc | accuracy | 90.0 | 70.0 ± 14.1 | 70.0 ± 14.1 | 60.0 ± 0.0 |" in lines
    assert "| stsb | pearson | 90.0 | 20.0 ± 28.3 | 50.0 ± 0.0 | - |" in lines
    assert "| average | of the tasks that all have | 65.0 | 67.5 | 67.5 | 65.0 |" in lines
    assert "mrpc 560 of 3,667" in lines[-1]
