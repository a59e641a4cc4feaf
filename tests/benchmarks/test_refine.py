"""The benchmark of refined data: text dealt out once, a teacher that reads once, verdicts that follow the numbers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.recorded import RecordedTeacher
from benchmarks.refine import corpus, report, results
from llmkd.errors import ConfigError, DataError
from llmkd.teachers import LocalTeacher
from llmkd.types import Signal


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = {name: [{"text": f"{name} {i} " * 30, "domain": name} for i in range(16)] for name in ("wiki", "code")}
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["wiki"]))
    with gzip.open(tmp_path / "code.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows["code"])
    return tmp_path


def test_every_document_is_in_one_part(folder):
    parts, digest = corpus.read(folder)
    assert (parts, digest) == corpus.read(folder)
    for name in ("code", "wiki"):
        dealt = [text for part in parts.values() for text in part[name]]
        assert len(dealt) == len(set(dealt)) == 16
        assert {part: len(texts[name]) for part, texts in parts.items()} == {
            "test": 2, "validation": 2, "reference": 2, "train": 10,
        }  # fmt: skip


def test_windows_are_whole_and_supervised_but_for_their_first_token(folder, tokenizer):
    parts, _ = corpus.read(folder)
    data = corpus.chunks(parts["train"], {"code": 5, "wiki": 3}, 64, tokenizer)
    assert data["domain"] == [0] * 5 + [1] * 3
    assert data.features["domain"].names == ["code", "wiki"]
    for row in data:
        assert len(row["input_ids"]) == 64
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    with pytest.raises(DataError, match=r"domain 'wiki': got .* expected 500"):
        corpus.chunks(parts["train"], {"code": 1, "wiki": 500}, 64, tokenizer)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["expected a folder"]),
        ([{"text": "a"}], ["bad.jsonl:1", "`domain`"]),
        ([{"text": "a", "domain": "few"}], ["domain 'few'", "at least 8"]),
    ],
)
def test_text_that_cannot_be_dealt_out_is_refused(tmp_path, rows, words):
    if rows:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        corpus.read(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_recorded_teacher_shows_what_the_live_one_does_and_reads_once(make_model, tokenizer):
    live = LocalTeacher(make_model(seed=9), tokenizer)
    recorded, read = RecordedTeacher(live), []
    decoder = live.model.get_decoder()
    decoder.register_forward_hook(
        lambda module, inputs, kwargs, out: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ids = torch.randint(3, 259, (3, 9))
    labels = torch.cat([torch.full((3, 1), -100), ids[:, 1:]], dim=1)
    for rows, fresh in (([0, 1], [2]), ([1, 2], [1]), ([0, 2, 1], [])):
        batch = {"input_ids": ids[rows], "labels": labels[rows].clone()}
        if not fresh:
            batch["labels"][1] = -100  # a row that fills up a batch of an evaluation
        read.clear()
        shown: Any = recorded(batch, {Signal.LOGITS}, 259).rows
        assert read == fresh
        expected: Any = live(batch, {Signal.LOGITS}, 259).rows
        torch.testing.assert_close(shown.logits(slice(0, len(shown))), expected.logits(slice(0, len(expected))))


def fake(mean_kl: dict[str, list[float]]) -> dict:
    runs = [
        {"arm": arm, "seed": seed, "mean_kl": value, "worst_kl": 2 * value, "kl": {"wiki": value, "code": 2 * value}}
        for arm, values in mean_kl.items()
        for seed, value in enumerate(values, 1)
    ]
    settings = {"ddk": {"model": {"layers": [0, 1]}, "length": 64, "batch": 4, "steps": 10, "interval": 5}}
    shared = {"start": {"mean_kl": 2.0, "worst_kl": 3.0}, "windows": {"wiki": 10, "code": 30}}
    return {
        "runs": runs,
        "settings": settings,
        "ddk": shared,
        "data": {"domains": {"wiki": 1, "code": 1}},
        "device": "CPU",
    }


def test_a_verdict_compares_seed_by_seed():
    found = fake({"ddk": [1.0, 2.0, 3.0], "uniform": [1.1, 2.1, 3.1], "proportional": [0.9, 2.1, 2.9]})
    assert results.verdict(found, "ddk", "uniform", "mean_kl").startswith("lower on every seed (-0.100")
    assert results.verdict(found, "uniform", "ddk", "mean_kl").startswith("higher on every seed (+0.100")
    assert results.verdict(found, "ddk", "proportional", "mean_kl").startswith("no clear difference")


def test_the_section_says_what_was_measured_also_where_a_method_loses():
    text = report.section(fake({"ddk": [1.5, 1.6], "uniform": [1.1, 1.2]}))
    assert "| `ddk` | 1.550 ± 0.071 | 3.100 ± 0.141 |" in text
    assert "DDK against `uniform` at equal tokens: mean KL higher on every seed (+0.400" in text
    assert "over 2 seeds" in text
    assert report.section({"runs": []}).startswith("Nothing is measured yet")


def test_results_of_other_settings_are_not_mixed(tmp_path):
    file = tmp_path / "refine.json"
    shared = {"settings": {"ddk": {"steps": 10}}, "versions": {"torch": "2"}, "data": {"sha256": "a"}, "device": "CPU"}
    found = results.begin(file, shared)
    found["runs"].append({"arm": "ddk", "seed": 1})
    results.write(file, found)
    again = results.begin(file, shared)
    assert results.has(again, "ddk", 1)
    assert not results.has(again, "ddk", 2)
    with pytest.raises(ConfigError, match=r"settings.ddk.steps was 10, is 20"):
        results.begin(file, {**shared, "settings": {"ddk": {"steps": 20}}})
