"""AIME's answers and STS-B's score: known responses, a scripted model through lm-eval, scipy's formulas."""

from __future__ import annotations

import json
import math

import pytest
from scipy.stats import pearsonr, spearmanr

from llmkd.evaluation import harness, suite, table
from llmkd.evaluation.suite import Sampling
from llmkd.evaluation.tasks import scoring


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("So we get \\boxed{25}.", True),
        ("So we get \\boxed{025}.", True),
        ("First \\boxed{7}, no: \\boxed{25}", True),
        ("The answer is 25.", True),
        ("Therefore $x = 25$.", True),
        ("\\boxed{\\frac{50}{2}}", True),
        ("We try 25, but the answer is \\boxed{26}.", False),
        ("The answer is 26.", False),
        ("", False),
        ("I do not know.", False),
    ],
)
def test_answers(response, right):
    assert scoring.is_right(response, "25") is right


@pytest.mark.parametrize("doc", [{"Problem": "p {x}", "Answer": 25}, {"problem": "p {x}", "answer": "025"}])
def test_both_years_name_their_columns_in_their_own_way(doc):
    assert scoring.aime_prompt(doc).startswith("p {x}\n")
    assert "\\boxed{}" in scoring.aime_prompt(doc)
    assert scoring.aime_answer(doc) == "25"


def test_mean_and_pass_of_n():
    found = scoring.aime_results({"answer": "3"}, [["\\boxed{3}", "\\boxed{4}", "\\boxed{3}", "none"]])
    assert found == {"mean@n": 0.5, "pass@n": 1.0}
    assert scoring.aime_results({"answer": "3"}, [["no", "\\boxed{4}"]]) == {"mean@n": 0.0, "pass@n": 0.0}


def test_stsb_is_the_expected_score():
    log_p = [math.log(p) for p in (0.1, 0.1, 0.2, 0.3, 0.2, 0.1)]
    found = scoring.stsb_results({"label": 2.5}, [(value - 400, False) for value in log_p])
    assert found["pearson"] == found["spearman"] == (2.5, pytest.approx(0.1 + 0.4 + 0.9 + 0.8 + 0.5))


def test_correlations_are_scipys_and_0_of_a_constant():
    pairs = [(0.0, 1.0), (2.0, 1.5), (3.0, 1.4), (5.0, 4.0)]
    known, expected = zip(*pairs, strict=True)
    assert scoring.pearson(pairs) == pytest.approx(pearsonr(known, expected).statistic)
    assert scoring.spearman(pairs) == pytest.approx(spearmanr(known, expected).statistic)
    assert scoring.pearson([(0.0, 1.0), (2.0, 1.0)]) == scoring.spearman([(0.0, 1.0), (2.0, 1.0)]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aime24", "aime25"])
def test_n_answers_of_each_problem_reach_the_score(tmp_path, name):
    """Through lm-eval, with a model that is right twice of four times on the first problem and never on the second."""
    from lm_eval.api.model import LM

    prompts = []

    class Scripted(LM):
        def generate_until(self, requests):
            answers = {"one": ["\\boxed{7}", "\\boxed{8}", "It is 7.", "?"], "two": ["\\boxed{1}"] * 4}
            for request in requests:
                prompts.append(request.args[0])
                assert request.args[1]["do_sample"] is True
            return [answers[request.args[0][:3]].pop() for request in requests]

        def loglikelihood(self, requests):
            raise AssertionError("not asked for")

        loglikelihood_rolling = loglikelihood

    folder = tmp_path / ("AIME_2024" if name == "aime24" else "aime25")
    folder.mkdir()
    rows = [{"problem": "one", "answer": "007"}, {"problem": "two", "answer": "2"}]
    split = "train" if name == "aime24" else "test"
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = suite.load(name, {}, tmp_path, Sampling(max_tokens=50, repeats=4))
    found, _ = harness._measure(Scripted(), name, task, harness.Settings(), chat=False)
    assert len(prompts) == 8
    assert {metric: number["value"] for metric, number in found.items()} == {"mean@n": 0.25, "pass@n": 0.5}
    assert suite.describe(name, task, None, 0, tmp_path)["repeats"] == 4


@pytest.mark.slow
def test_groups_and_tags_have_leaves():
    found = suite.expand(["glue", "mmlu_stem", "aime24"])
    assert list(found["glue"]) == [
        "cola",
        "mnli",
        "mnli_mismatch",
        "mrpc",
        "qnli",
        "qqp",
        "rte",
        "sst2",
        "stsb",
        "wnli",
    ]
    assert "mmlu_college_physics" in found["mmlu_stem"]
    assert list(found["aime24"]) == ["aime24"]
    entry = suite.manager().task_index["aime24"]
    assert entry.yaml_path.is_relative_to(suite.OWN)


def test_an_average_is_of_scores_and_none_where_one_is_missing():
    one = {
        "main": ["acc", "f1"],
        "models": {"a": {"acc": {"value": 0.8}, "f1": {"value": 0.6}}, "b": {"acc": {"value": 1.0}}},
    }
    two = {"main": ["mcc"], "models": {"a": {"mcc": {"value": 0.1}}}}
    document = {"tasks": {"one": one, "two": two}}
    assert table.averages(document, ["one", "two"], ["a", "b"]) == [pytest.approx(0.4), None]
