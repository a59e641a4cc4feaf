"""Data of several domains: prepared apart, sampled as the weights say, cycled, the same wherever one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from llmkd.data import DataSpec, prepare
from llmkd.data.domains import DomainSampler
from llmkd.errors import ConfigError, DataError

SIZES = (40, 7, 23)
DOMAINS = np.repeat(np.arange(3), SIZES)


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts(name: str, count: int) -> list[dict]:
    return [{"text": f"{name} number {i}", "domain": name, "meta": {"set": name}} for i in range(count)]


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    return {name: write(tmp_path / f"{name}.jsonl", texts(name, n)) for name, n in (("web", 12), ("code", 6))}


@pytest.fixture
def mixed(tmp_path) -> str:
    rows = [row for pair in zip(texts("web", 6), texts("code", 6), strict=True) for row in pair] + texts("web", 12)[6:]
    return write(tmp_path / "mixed.jsonl", rows)


def read(dataset, tokenizer) -> dict[str, list[str]]:
    """The texts of each domain."""
    label, out = dataset.features["domain"], {}
    for row in dataset:
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        out.setdefault(label.int2str(row["domain"]), []).append(text)
    return out


# Preparing


@pytest.mark.parametrize("column", [None, "domain", "meta.set"])
def test_named_paths_and_a_column_give_the_same_domains(paths, mixed, tokenizer, column):
    more = {"path": paths} if column is None else {"path": mixed, "domain_column": column}
    data = prepare(DataSpec(**more, held_out_every=3, max_eval_samples=3, columns={"text": "text"}), tokenizer)
    assert read(data.train, tokenizer) == {
        "web": [f"web number {i}" for i in range(12) if i % 3],
        "code": [f"code number {i}" for i in range(6) if i % 3],
    }
    held_out = {"web": [f"web number {i}" for i in (0, 3, 6)], "code": ["code number 0", "code number 3"]}
    assert read(data.eval, tokenizer) == held_out, "every third row of each domain, at most 3 of each"
    assert (data.report["domains"], data.report["rows"], data.report["eval_samples"]) == (2, 12, 5)


def test_a_domain_may_have_columns_of_its_own_and_held_out_rows_elsewhere(paths, tmp_path, tokenizer):
    paths["code"] = write(tmp_path / "program.jsonl", [{"content": "x = 1"}, {"content": "y = 2"}])
    held_out = {"web": paths["web"], "code": {"path": paths["code"], "columns": {"text": "content"}, "max_samples": 1}}
    path = {"code": {"path": paths["code"], "columns": {"text": "content"}}, "web": [paths["web"]]}
    data = prepare(DataSpec(path=path, eval={"path": held_out}), tokenizer)
    assert list(read(data.train, tokenizer)) == ["code", "web"], "in the order of the recipe"
    assert read(data.train, tokenizer)["code"] == ["x = 1", "y = 2"]
    assert read(data.eval, tokenizer)["code"] == ["x = 1"]
    assert len(read(data.eval, tokenizer)["web"]) == 12


def test_a_packed_sequence_is_of_one_domain(paths, tokenizer):
    data = prepare(DataSpec(path=paths, held_out_every=6, max_length=64, packing=True), tokenizer)
    for name, sequences in read(data.train, tokenizer).items():
        other = {"web": "code", "code": "web"}[name]
        assert all(name in text and other not in text for text in sequences)
    assert any(len(row["seq_lengths"]) > 1 for row in data.train)


def test_without_domains_nothing_changes(mixed, tokenizer):
    data = prepare(DataSpec(path=mixed, columns={"text": "text"}), tokenizer)
    assert "domain" not in data.train.column_names


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": {"web": "WEB", "code": "EMPTY"}}, ["domain 'code'", "empty"]),
        ({"path": {"web": "WEB", "code": "ONE"}}, ["domain 'code'", "none with a supervised token"]),
        ({"eval": {"path": {"web": "WEB"}}}, ["data.eval", "no rows of domain 'code'"]),
        ({"eval": {"path": {"web": "WEB", "coed": "WEB"}}}, ["'coed'", "did you mean 'code'?"]),
        ({"eval": {"path": "WEB"}}, ["data.eval", "no domains", "eval.domain_column"]),
        ({"path": {"web": "WEB"}}, ["one domain, web", "at least two"]),
        ({"path": "WEB", "domain_column": "domain"}, ["one domain, web", "at least two"]),
        ({"path": "WEB", "domain_column": "domian"}, ["'domian'", "did you mean 'domain'?"]),
        ({"path": "GAP", "domain_column": "domain"}, ["data row 1.domain", "None"]),
    ],
)
def test_a_domain_that_is_missing_or_empty_is_named(paths, tmp_path, tokenizer, changes, words):
    files = {
        "WEB": paths["web"],
        "EMPTY": write(tmp_path / "empty.jsonl", []),
        "ONE": write(tmp_path / "one.jsonl", texts("code", 1)),
        "GAP": write(tmp_path / "gap.jsonl", [{"text": "a b", "domain": "web"}, {"text": "c", "domain": None}]),
    }

    def put(value):
        return {key: put(item) for key, item in value.items()} if isinstance(value, dict) else files.get(value, value)

    options = {"path": paths, **put(changes)}
    if "eval" not in options:
        options["held_out_every"] = 2
    with pytest.raises(DataError) as caught:
        prepare(DataSpec(**options), tokenizer)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"path": {"a": "x.txt"}, "domain_column": "d"}, "both domain_column and"),
        ({"path": {"a": {"path": {"b": "x.txt"}}}}, "domains inside a domain"),
    ],
)
def test_domains_are_named_once(options, word):
    from llmkd.config import check

    with pytest.raises(ConfigError, match=word):
        check(DataSpec, options, "data")


# Sampling


def sampler(size: int = 60, **more) -> DomainSampler:
    return DomainSampler(DOMAINS, 3, size, seed=5, **more)


def run(made: DomainSampler, weights, intervals: int) -> list[list[int]]:
    """The rows of several intervals, the counts handed on as a run does."""
    drawn, out = [0, 0, 0], []
    for number in range(intervals):
        made.begin(number, weights[number % len(weights)], drawn)
        out.append(list(made))
        drawn = [done + count for done, count in zip(drawn, made.counts(), strict=True)]
    return out


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (0.05, 0.9, 0.05), (1, 1, 1), (0.5, 0.0, 0.5)])
def test_frequencies_are_within_three_sigma_of_the_weights(weights):
    made = sampler(size=6000)
    rows = run(made, [weights], 3)
    counts = np.bincount(DOMAINS[np.concatenate(rows)], minlength=3)
    p = np.asarray(weights) / sum(weights)
    assert (abs(counts - 18000 * p) <= 3 * np.sqrt(18000 * p * (1 - p))).all()


def test_a_domain_goes_through_all_its_rows_before_it_begins_again_in_another_order():
    rows = np.concatenate(run(sampler(), [(0.2, 0.6, 0.2), (0.4, 0.4, 0.2)], 5))
    for number, size in enumerate(SIZES):
        drawn = rows[DOMAINS[rows] == number]
        passes = [drawn[start : start + size].tolist() for start in range(0, len(drawn), size)]
        for one in passes[:-1]:
            assert sorted(one) == np.flatnonzero(number == DOMAINS).tolist()
        assert len(set(passes[-1])) == len(passes[-1])
        if number == 1:
            assert len(passes) > 4
            assert len({tuple(one) for one in passes}) == len(passes)


def test_a_fresh_sampler_goes_on_where_another_stopped():
    weights = [(0.6, 0.3, 0.1), (0.1, 0.8, 0.1), (0.3, 0.3, 0.4)]
    whole = run(sampler(), weights, 3)
    drawn = np.bincount(DOMAINS[np.concatenate(whole[:2])], minlength=3).tolist()
    late = sampler()
    late.begin(2, weights[2], drawn)
    assert list(late) == whole[2]
    assert list(late) == list(late), "an interval may be read again, by a resumed run"
    assert len(late) == 60


def test_the_seed_and_the_interval_change_the_rows_and_a_bigger_batch_begins_alike():
    made = sampler()
    first = list(made)
    made.begin(1, [1, 1, 1], [0, 0, 0])
    second = list(made)
    made.begin(0, [1, 1, 1], [0, 0, 0])
    third = list(made)
    assert second != third
    assert list(DomainSampler(DOMAINS, 3, 60, seed=6)) != first
    assert list(sampler(size=90))[:60] == first


def test_counts_of_a_part():
    made = sampler()
    assert made.counts(17) == np.bincount(DOMAINS[list(made)[:17]], minlength=3).tolist()
    assert sum(made.counts()) == 60


def test_length_grouping_reorders_an_interval_and_changes_nothing_else():
    lengths = np.random.default_rng(0).integers(5, 500, len(DOMAINS))
    grouped, plain = sampler(size=240, lengths=lengths, group=8), sampler(size=240)
    assert sorted(grouped) == sorted(plain)
    assert list(grouped) != list(plain)

    def padding(rows: list[int]) -> int:
        batches = lengths[rows].reshape(-1, 8)
        return int((batches.max(1, keepdims=True) - batches).sum())

    assert padding(list(grouped)) < 0.5 * padding(list(plain))


def test_given_rows_have_their_domains_in_a_column(tokenizer):
    rows = Dataset.from_list([*texts("web", 4), *texts("code", 4)])
    data = prepare(DataSpec(path="unused", domain_column="domain", held_out_every=2), tokenizer, rows)
    assert {name: len(found) for name, found in read(data.train, tokenizer).items()} == {"web": 2, "code": 2}
    with pytest.raises(DataError, match="domain_column"):
        prepare(DataSpec(path={"web": "unused"}), tokenizer, rows)
