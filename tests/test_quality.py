"""`python -m benchmarks quality`: every method has its place, runs compare like with like, and the words follow the numbers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset

from benchmarks.quality import bench as quality_bench
from benchmarks.quality import entries, report, results
from benchmarks.quality.bench import Bench, evenly_spaced
from benchmarks.quality.picture import draw
from benchmarks.recorded import RecordedTeacher
from llmkd import build
from llmkd.data.collate import Collator
from llmkd.errors import ConfigError
from llmkd.students.tiny import byte_tokenizer
from llmkd.teachers import LocalTeacher
from llmkd.types import Signal

KL = {
    "cross_entropy": (2.0, 2.2),
    "forward_kl": (1.0, 1.2),
    "jsd": (0.5, 0.6),
    "tvd": (1.1, 1.15),
    "reverse_kl": (3, 3),
}


def record(name: str, seed: int, kl: float, **more) -> dict:
    run = {"entry": name, "seed": seed, "recipe": entries.ENTRIES[name], "kl": kl, "top1_agreement": 0.5}
    return {**run, "perplexity": 10 * kl, **more}


@pytest.fixture
def measured() -> dict:
    runs = [record(name, seed, kl) for name, values in KL.items() for seed, kl in enumerate(values, 1)]
    runs.append({"entry": "dkd", "seed": 1, "recipe": entries.ENTRIES["dkd"], "failed": "loss: not finite at step 3"})
    start = {"kl": 4.0, "top1_agreement": 0.1, "perplexity": 999.0, "teacher_perplexity": 20.0}
    settings = quality_bench.settings()
    return {"versions": {"torch": "2"}, "device": "a CPU", "settings": settings, "start": start, "runs": runs}


# The table of entries


def test_every_method_of_the_tables_is_measured_or_left_out_with_a_reason():
    assert entries.uncovered() == []
    known = {name for kind in entries.COMPARED for name in build.TABLES[kind]}
    assert set(entries.LEFT_OUT) <= known
    assert all(entries.LEFT_OUT.values())
    assert not set(entries.LEFT_OUT) & set(entries.ENTRIES)


def test_a_method_without_an_entry_that_uses_it_is_found(monkeypatch):
    monkeypatch.delitem(entries.ENTRIES, "jsd")
    monkeypatch.setitem(entries.ENTRIES, "tvd", {"objective": "cross_entropy"})
    assert entries.uncovered() == ["jsd", "tvd"]


@pytest.mark.parametrize("name", entries.ENTRIES)
def test_an_entry_builds_as_a_recipes_objective(name):
    goal = build.objective(entries.ENTRIES[name]["objective"])
    assert (Signal.LOGITS in goal.needs) == (name not in (entries.CONTROL, "uskd"))  # uskd teaches itself
    assert goal.reads <= {"spans"}, "which the benchmark's samples have"


def test_methods_are_those_that_a_recipe_names():
    ramp = {"name": "linear", "start": 1, "end": 2}
    token = {"name": "token", "divergence": {"name": "standardised", "divergence": "jsd"}, "temperature": ramp}
    assert entries.methods({"objective": [token, "nkd"]}) == {"token", "standardised", "jsd", "linear", "nkd"}
    assert entries.methods({"objective": "nkd", "teacher": {"name": "mine", "path": "x"}}) == {"nkd", "mine"}
    assert entries.methods({"data": {"name": "nkd"}}) == set()


# Results


def test_a_measured_run_is_not_run_again_and_a_changed_entry_is(tmp_path, measured, monkeypatch):
    file = tmp_path / "quality.json"
    results.add(file, measured, record("jsd", 3, 0.7))
    assert [path.name for path in tmp_path.iterdir()] == ["quality.json"]
    found = results.begin(file, {"versions": measured["versions"], "settings": quality_bench.settings()})
    assert found == measured
    assert results.has(found, "jsd", 3)
    assert not results.has(found, "jsd", 4)
    monkeypatch.setitem(
        entries.ENTRIES, "jsd", {"objective": {"name": "token", "divergence": "jsd", "temperature": 2.0}}
    )
    assert not results.has(found, "jsd", 3)
    assert "jsd" not in results.spreads(found)


def test_a_run_takes_the_place_of_an_earlier_one(tmp_path, measured):
    results.add(tmp_path / "quality.json", measured, record("jsd", 1, 9.0))
    assert sorted(run["kl"] for run in results.runs_of(measured, "jsd")) == [0.6, 9.0]


@pytest.mark.parametrize("change", [{"settings": quality_bench.settings(quick=True)}, {"versions": {"torch": "3"}}])
def test_other_settings_or_versions_do_not_mix_with_what_was_measured(tmp_path, measured, change):
    file = tmp_path / "quality.json"
    results.write(file, measured)
    with pytest.raises(
        ConfigError, match=r"quality.json: (settings.train.max_steps|versions.torch) was .* Move the file"
    ):
        results.begin(file, {**measured, **change})


def test_the_spread_is_the_sample_standard_deviation(measured):
    spread = results.spreads(measured)["forward_kl"]["kl"]
    assert (spread.mean, spread.std) == (pytest.approx(1.1), pytest.approx(0.2 / 2**0.5))
    assert spread.show("{:.2f}") == "1.10 ± 0.14"
    assert results.spread([1.5]).show("{:.2f}") == "1.50"


# Words and picture


def test_the_table_is_sorted_and_names_control_failures_and_start(measured):
    section = report.section(measured)
    lines = section.splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")]
    control = "`cross_entropy`, the control: no teacher"
    assert names == ["`jsd`", "`forward_kl`", "`tvd`", control, "`reverse_kl`", "`dkd`", "start"]
    assert lines[2] == "| `jsd` | 0.550 ± 0.071 | 50.0% ± 0.0% | 5.5 ± 0.7 |"
    assert "\n\nThe quickstart's teacher (perplexity 20.0) and student start; " in section
    assert "over 2 seeds, each another order" in section


def test_what_differs_by_less_than_the_spread_is_said_to_be_no_different(measured):
    assert report.against(results.spreads(measured), "forward_kl") == (
        ["jsd"],
        ["tvd"],
        ["cross_entropy", "reverse_kl"],
    )
    against_forward, against_control = report.findings(results.spreads(measured))
    assert "closer to the teacher `jsd`; farther `cross_entropy`, `reverse_kl`; no difference `tvd`." in against_forward
    assert "3 of 4 losses end closer" in against_control
    assert against_control.endswith("`reverse_kl`.")


def test_a_method_without_a_number_says_why(measured):
    losses = results.spreads(measured)
    cells = [report.cell(measured, losses, name) for name in ("jsd", "dkd", "token", "taid")]
    assert cells == ["0.550 ± 0.071", "not finite", "as forward_kl", ""]


def test_nothing_measured_is_said_so(tmp_path):
    assert report.section(results.read(tmp_path / "none.json")).startswith("Nothing is measured yet")


def test_the_picture_fetches_nothing_and_is_the_same_again(tmp_path, measured):
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    draw(measured, first)
    draw(copy.deepcopy(measured), second)
    text = first.read_text()
    assert text == second.read_text()
    assert "font-family" not in text
    assert 'href="http' not in text


# A run, on tiny models


@pytest.fixture
def tiny_bench(make_model) -> Bench:
    ids = torch.randint(3, 259, (12, 16), generator=torch.Generator().manual_seed(1)).tolist()
    ids[3] = ids[3][:9]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]], "spans": [1] * len(row)} for row in ids]
    samples = Dataset.from_list(rows)
    student, teacher = make_model(seed=1), LocalTeacher(make_model(seed=2))
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    train = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    recorded = RecordedTeacher(teacher)
    parts = (samples.select(range(8)), samples.select(range(8, 12)))
    return Bench({"train": train}, student, start, recorded, byte_tokenizer(), *parts)


def test_a_recorded_teacher_shows_what_the_live_one_does(tiny_bench):
    batch = Collator(0)([tiny_bench.train[i] for i in (5, 3, 0)])
    ours = tiny_bench.teacher(batch, {Signal.LOGITS}, 259).rows
    live = tiny_bench.teacher.teacher(batch, {Signal.LOGITS}, 259).rows
    assert len(ours) == len(live) == 15 + 8 + 15
    torch.testing.assert_close(ours.logits(slice(None)), live.logits(slice(None)))


def test_a_run_starts_over_and_depends_on_its_seed_alone(tiny_bench):
    start = tiny_bench.measure()
    first = tiny_bench.run(entries.ENTRIES["dac_kl"], seed=1)
    tiny_bench.run(entries.ENTRIES["span"], seed=3)
    again, other = (tiny_bench.run(entries.ENTRIES["dac_kl"], seed=seed) for seed in (1, 2))
    assert first["kl"] == again["kl"] != other["kl"]
    assert first["kl"] < start["kl"]
    assert json.loads(json.dumps(first)) == first


def test_a_loss_that_is_not_finite_is_a_result(tiny_bench):
    tiny_bench.start["model.norm.weight"][0] = torch.nan
    assert tiny_bench.run(entries.ENTRIES["forward_kl"], seed=1)["failed"].startswith("loss: not finite at step 1")


def test_samples_are_taken_from_all_over():
    taken = evenly_spaced(Dataset.from_dict({"n": list(range(10))}), 4)
    assert taken["n"][:] == [0, 2, 5, 7]
