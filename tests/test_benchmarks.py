"""What the benchmarks say of themselves: memory that is really taken, and ratios that are really compared."""

from __future__ import annotations

import json

import pytest
import torch
import typer

from benchmarks import record, samples, trainers
from benchmarks.measure import extra_memory, interleave


def result(**ratios: float) -> dict:
    return {"cases": [{"case": "one", "ratios": ratios}, {"case": "without"}]}


def test_extra_memory_is_the_peak_of_the_call_alone():
    held = torch.ones(2**22)  # 16 MiB before the call do not count
    extra = extra_memory(lambda: torch.ones(2**24).sum() + held[0])
    assert 60 < extra < 90


def test_functions_are_called_in_turn():
    order, seen = [], {}
    measured = interleave({name: lambda name=name: order.append(name) or name for name in "ab"}, 2, seen.__setitem__)
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert seen == {"a": "a", "b": "b"}
    assert all(value.seconds == min(value.times) and len(value.times) == 2 for value in measured.values())


@pytest.mark.parametrize(("now", "fallen"), [(2.0, 0), (1.85, 0), (1.75, 1), (3.0, 0)])
def test_a_ratio_may_move_by_a_tenth(now, fallen):
    shared, lines = record.compare(result(trl_over_llmkd=2.0, gone=1.0), result(trl_over_llmkd=now, new=1.0))
    assert shared == 1
    assert len(lines) == fallen
    assert all("one: trl_over_llmkd fell from 2.0 to 1.75" in line for line in lines)


@pytest.mark.parametrize(("old", "code"), [(2.0, None), (2.5, 1), (None, 1)])
def test_against_exits_with_one_if_a_ratio_fell_or_nothing_is_in_common(tmp_path, monkeypatch, old, code):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    file = tmp_path / "head.json"
    file.write_text(json.dumps(result(**({} if old is None else {"trl_over_llmkd": old}))))
    new = {**record.header(3), **result(trl_over_llmkd=2.0)}
    if code is None:
        record.finish("head", new, file)
    else:
        with pytest.raises(typer.Exit) as ended:
            record.finish("head", new, file)
        assert ended.value.exit_code == code
    written = json.loads(file.read_text())
    assert written["repeats"] == 3
    assert {"versions", "device", "commit", "threads"} <= set(written)


def test_every_method_trains_on_the_same_batches(make_model, tokenizer, tmp_path):
    rows = samples.samples(tokenizer, count=40)
    assert all(len(row["input_ids"]) == len(row["labels"]) <= samples.LIMIT for row in rows)
    shuffled, grouped = (samples.batches(rows, 4, 2, grouped) for grouped in (False, True))
    assert samples.shape(grouped)["padding"] < samples.shape(shuffled)["padding"]
    setting = trainers.Setting(
        make_model(vocab_size=259), make_model(seed=9, vocab_size=259), tokenizer, tmp_path, {"learning_rate": 1e-3}
    )
    losses = {name: method(setting, grouped)() for name, method in trainers.METHODS.items()}
    assert losses["llmkd"] == pytest.approx(losses["gkd"], rel=1e-5)
    assert losses["sft"] > 1
