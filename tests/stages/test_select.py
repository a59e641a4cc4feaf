"""`select`: MiniPLM's golden numbers and identities, exact cuts against a plain sort, bands, balance, scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from llmkd.config import build
from llmkd.data.load import SourceSpec
from llmkd.errors import ConfigError, DataError
from llmkd.stages import TABLES, Select
from llmkd.stages.order import Block, cuts, keys_of
from llmkd.stages.scores import Column, Difference, Perplexity, Random
from llmkd.stages.source import LoadedRows, open_source

TEACHER = [1.24, 2.36, 0.16, 3.0, 2.5, 1.9]
REFERENCE = [1.28, 5.59, 2.73, 2.8, 3.3, 2.6]


def select(columns: dict[str, list], **options) -> tuple[list[int], dict[str, list]]:
    """The kept row numbers, and all that the stage returned."""
    source = LoadedRows(Dataset.from_dict(columns))
    stage = Select(**{"score": Difference(), **options})
    stage.features(source.features)
    stage.begin(source)
    out = stage.process(source.read(0, len(source)))
    return [number for number, reason in enumerate(out["rejected"]) if not reason], out


def losses(teacher=TEACHER, reference=REFERENCE) -> dict[str, list[float]]:
    return {"teacher_nll_mean": list(teacher), "reference_nll_mean": list(reference)}


def test_golden_numbers():
    kept, out = select(losses(), ratio=0.5)
    assert out["score"] == pytest.approx([0.04, 3.23, 2.57, -0.20, 0.80, 0.70])
    assert kept == [1, 2, 4]
    assert min(out["score"][number] for number in kept) == pytest.approx(0.80)
    assert [out["rejected"][number] for number in (0, 3, 5)] == ["not_selected"] * 3


def test_equal_models_keep_the_first_rows():
    assert select(losses(TEACHER, TEACHER), ratio=0.5)[0] == [0, 1, 2]
    assert select(losses([1.0] * 7, [1.0] * 7), top_k=3)[0] == [0, 1, 2]


@pytest.mark.parametrize("ratio", [0.0, 0.17, 0.29, 0.5, 0.99, 1.0])
def test_a_ratio_keeps_its_floor_in_order_and_the_best(ratio):
    scores = np.random.default_rng(1).normal(size=100).round(1)  # with ties
    kept, out = select(losses(np.zeros(100), scores), ratio=ratio)
    assert len(kept) == round(ratio * 100), "floor(ratio n), of the decimal ratio: 0.29 * 100 is 28.999... in floats"
    assert kept == sorted(set(kept))
    dropped = [score for score, reason in zip(out["score"], out["rejected"], strict=True) if reason]
    assert min((scores[number] for number in kept), default=math.inf) >= max(dropped, default=-math.inf)


def test_the_teachers_offset_does_not_matter_and_its_scale_does():
    offset = [loss + 7.0 for loss in TEACHER]
    assert select(losses(offset), ratio=0.5)[0] == select(losses(), ratio=0.5)[0]
    mixed = losses([1.0, 2.0], [2.0, 2.5])
    assert select(mixed, top_k=1)[0] == [0]
    assert select({**mixed, "teacher_nll_mean": [3.0, 6.0]}, top_k=1)[0] == [0]
    assert select({**mixed, "teacher_nll_mean": [0.3, 0.6]}, top_k=1)[0] == [1], "scaled by 0.3 the order flips"


def test_mean_and_sum_rank_two_chunks_differently():
    tokens, means = np.array([10, 1000]), np.array([0.5, 0.1])
    columns = {
        **losses([1.0, 1.0], 1.0 + means),
        "teacher_nll_sum": tokens.astype(float).tolist(),
        "reference_nll_sum": (tokens * (1 + means)).tolist(),
    }
    assert select(columns, top_k=1)[0] == [0]
    kept, out = select(columns, top_k=1, score=Difference(of="sum"))
    assert kept == [1]
    assert out["score"] == pytest.approx([5.0, 100.0])


def test_a_threshold_is_inclusive():
    score = np.subtract(REFERENCE, TEACHER)[4]
    assert select(losses(), threshold=float(score))[0] == [1, 2, 4]


def test_the_smallest_instead_of_the_largest():
    kept, out = select(losses(), ratio=0.5, largest=False)
    assert kept == [0, 3, 5]
    assert out["score"][3] == pytest.approx(-0.2), "the score itself keeps its sign"
    assert select(losses(), threshold=0.05, largest=False)[0] == [0, 3]


def test_a_band_of_perplexity_leaves_out_both_ends():
    columns = {"reference_nll_mean": [float(value) for value in (5, 1, 4, 2, 3, 0, 6, 7, 8, 9)]}
    kept, out = select(columns, band=(0.3, 0.6), score=Perplexity())
    assert sorted(columns["reference_nll_mean"][number] for number in kept) == [4, 5, 6]
    assert out["score"][0] == pytest.approx(math.exp(5))


def test_two_bands_that_meet_share_no_row_and_miss_none():
    columns = losses(np.zeros(30), np.random.default_rng(2).integers(0, 4, 30).astype(float))
    ends = ((0.0, 0.31), (0.31, 0.5), (0.5, 1.0))
    assert sorted(row for band in ends for row in select(columns, band=band)[0]) == list(range(30))


def test_balanced_selection_keeps_the_shares_of_the_classes():
    label = ["a", "b", "a", "c", "a", "b", "a", "c", "a", "b", "a", "b"]
    scores = np.arange(12.0)
    kept, _ = select({**losses(np.zeros(12), scores), "label": label}, ratio=0.5, balanced="label")
    assert kept == [6, 7, 8, 9, 10, 11]
    assert [sum(label[number] == name for number in kept) for name in "abc"] == [3, 2, 1]


def test_a_score_that_is_not_finite_is_rejected_and_does_not_count():
    kept, out = select(losses([math.nan, *TEACHER, math.inf], [1.0, *REFERENCE, 1.0]), ratio=0.5)
    assert kept == [2, 3, 5]
    assert [out["rejected"][number] for number in (0, 7)] == ["not_finite"] * 2


def test_random_is_uniform_and_depends_on_seed_and_id_alone():
    ids = np.arange(10_000)
    first, second = (Random(seed)({"example_id": ids}) for seed in (0, 1))
    assert 0 <= first.min() < first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert (Random(0)({"example_id": ids[::-1]})[::-1] == first).all()
    everything, _ = select({"text": ["a"] * 9}, score=Random(), ratio=1.0)
    assert everything == list(range(9)), "f = 1 is the data set as it was"


@pytest.mark.parametrize("spread", [1e-300, 1.0, 1e300])
def test_cuts_are_those_of_a_stable_sort(spread):
    draw = np.random.default_rng(3)
    scores = (draw.normal(size=3000).round(2) * spread).astype(np.float64)
    scores[::7], scores[3::7] = 0.0, -0.0
    ids = np.cumsum(draw.integers(1, 9, 3000))
    groups = draw.choice(["x", "y"], 3000)

    def blocks():
        for start in range(0, 3000, 257):
            part = slice(start, start + 257)
            yield Block(scores[part], ids[part], groups[part])

    members = {name: np.flatnonzero(groups == name) for name in ("x", "y")}
    ranks = {(name, r): r for name, rows in members.items() for r in (1, 2, len(rows) // 2, len(rows) - 1, len(rows))}
    for (name, rank), cut in cuts(blocks, ranks).items():
        inside = members[name][cut.covers(scores, ids)[members[name]]]
        order = np.lexsort((ids[members[name]], -scores[members[name]]))[:rank]
        assert sorted(inside) == sorted(members[name][order])


def test_keys_sort_as_falling_scores_do():
    scores = np.array([1e308, 3.5, 5e-324, 0.0, -0.0, -5e-324, -2.0, -1e308])
    keys = keys_of(scores)
    assert keys[3] == keys[4]
    assert (keys[:-1] <= keys[1:]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "0 of ratio"),
        ({"ratio": 0.5, "top_k": 3}, "2 of ratio"),
        ({"ratio": 1.5}, "stage.ratio"),
        ({"top_k": -1}, "stage.top_k"),
        ({"band": (0.6, 0.3)}, "stage.band"),
        ({"top_k": 3, "balanced": "label"}, "stage.balanced"),
    ],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(ConfigError, match=words):
        Select(score=Difference(), **options)


def test_more_rows_than_there_are():
    with pytest.raises(DataError, match=r"7 of 6 rows"):
        select(losses(), top_k=7)


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(DataError, match="did you mean 'teacher_nl_mean'"):
        select({"teacher_nl_mean": [1.0], "reference_nll_mean": [1.0]}, ratio=0.5)
    with pytest.raises(DataError, match="expected 'mine'"):
        select(losses(), ratio=0.5, score=Column("mine"))


def test_a_recipe_names_a_score_and_its_options():
    stage = build("stage", {"name": "select", "score": {"name": "difference", "of": "sum"}, "ratio": 0.5}, TABLES)
    assert stage.score == Difference(of="sum")


def test_a_stage_reads_no_domains(tmp_path):
    spec = SourceSpec(path=str(tmp_path / "rows.jsonl"), domain_column="kind")
    with pytest.raises(DataError, match=r"data.domain_column: got 'kind'; expected none.*Remove it"):
        open_source(spec)
