"""The page about a selection: every row in the histogram once, the right rows at the ends, foreign text made harmless."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from llmkd.stages import Select
from llmkd.stages.page import SHOWN, selection_page, survey
from llmkd.stages.scores import Column
from llmkd.stages.source import LoadedRows

SCORES = np.random.default_rng(0).normal(size=500)


@pytest.fixture
def selection():
    texts = [[f"document {number} <script>alert(1)</script>", ""] for number in range(500)]
    scores = SCORES.tolist()
    scores[7] = float("nan")
    source = LoadedRows(Dataset.from_dict({"text": texts, "mine": scores, "tokens": [3] * 500}))
    stage = Select(score=Column("mine"), ratio=0.2)
    stage.features(source.features)
    stage.begin(source)
    return stage, source


def test_a_survey_counts_each_row_once_and_finds_the_ends(selection, monkeypatch):
    monkeypatch.setattr("llmkd.stages.page.BLOCK", 64)
    found = survey(*selection)
    assert found.rows == {"kept": 99, "dropped": 400}
    assert found.not_finite == 1
    finite = np.delete(np.arange(500), 7)
    order = finite[np.argsort(-SCORES[finite])]
    expected = {("kept", "best"): order[:SHOWN], ("kept", "worst"): order[98 : 98 - SHOWN : -1],
                ("dropped", "best"): order[99 : 99 + SHOWN], ("dropped", "worst"): order[: -SHOWN - 1 : -1]}  # fmt: skip
    for name, rows in expected.items():
        assert found.ends[name][:, 1].tolist() == rows.tolist()
    assert found.negative == (SCORES[finite] < 0).sum()


def test_the_page_is_one_file_and_runs_no_code_of_a_document(selection):
    page = selection_page(*selection, "Selection a<b>")
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert "document " in page
    assert "&lt;script&gt;" in page
    assert "a&lt;b&gt;" in page
    assert page.count("<table>") == 4
    assert page.count("<tr>") == 4 * (SHOWN + 1)
    for attribute in ("src=", 'href="http', "@import"):
        assert attribute not in page


def test_equal_scores_have_a_page_too():
    source = LoadedRows(Dataset.from_dict({"text": ["a"] * 5, "mine": [1.0] * 5}))
    stage = Select(score=Column("mine"), ratio=1.0)
    stage.begin(source)
    assert "5 of 5 rows kept" in selection_page(stage, source, "all")
