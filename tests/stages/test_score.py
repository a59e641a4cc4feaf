"""`score` against a slow loop in fp64; padding, masks, rejects, exclusion, formats."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset

from llmkd.errors import ConfigError, DataError
from llmkd.stages import Score
from llmkd.stages.source import LoadedRows
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model
from llmkd.types import Signal

TEXTS = [
    "A cat sat on the mat. " * 3,
    "dog",
    "The dog ran off! And the cat? It sat.",
    "x" * 70,
    "on and on and on " * 2,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("teacher", 0), ("reference", 1)):
        torch.manual_seed(seed)
        model = tiny_model(tiny_config())
        model.get_output_embeddings().weight.data *= 20
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("teacher", "reference")}


def scored(columns: dict[str, list], **options) -> dict[str, list]:
    source = LoadedRows(Dataset.from_dict(columns))
    stage = Score(**{"max_length": 128, **options})
    wanted = {*stage.features(source.features), "rejected"}
    stage.begin(source)
    out = stage.process(source.read(0, len(source)))
    assert {*out} - {"example_id"} == wanted
    return out


def load(path: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).double().eval()


@torch.no_grad()
def oracle(path: str, ids: list[int], first: int = 1) -> list[torch.Tensor]:
    """log p of all tokens at each scored position, and the label: one text alone, fp64, no padding."""
    log_p = load(path)(input_ids=torch.tensor([ids])).logits[0, :, :259].log_softmax(-1)
    return [(log_p[i - 1], ids[i]) for i in range(first, len(ids)) if ids[i - 1] != 0]


def ids_of(text: list[str]) -> list[int]:
    tokenizer = byte_tokenizer()
    ids = [[*tokenizer(piece)["input_ids"], 0] for piece in text]
    return [token for piece in ids for token in piece][:-1]


def test_sums_and_means_are_those_of_a_loop(models):
    out = scored({"text": TEXTS}, **models, max_length=48)
    assert len(out["text"]) > 4
    for number, text in enumerate(out["text"]):
        for part in ("teacher", "reference"):
            losses = [-log_p[label].item() for log_p, label in oracle(models[part], ids_of(text))]
            assert out["tokens"][number] == len(losses)
            assert out[f"{part}_nll_sum"][number] == pytest.approx(sum(losses), rel=1e-5)
            assert out[f"{part}_nll_mean"][number] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_el2n_and_disagreement_are_those_of_a_loop(models):
    out = scored({"text": TEXTS}, **models, max_length=64, measures=["el2n", "disagreement"])
    for number, text in enumerate(out["text"]):
        teacher, reference = (oracle(models[part], ids_of(text)) for part in ("teacher", "reference"))
        errors = [(q.exp() - torch.nn.functional.one_hot(torch.tensor(y), 259)).norm().item() for q, y in reference]
        apart = [(p.exp() * (p - q)).sum().item() for (p, _), (q, _) in zip(teacher, reference, strict=True)]
        assert out["reference_el2n"][number] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert 0 <= out["reference_el2n"][number] <= math.sqrt(2)
        assert out["disagreement"][number] == pytest.approx(sum(apart) / len(apart), rel=1e-4)


def test_equal_models_have_equal_scores_and_agree(models):
    out = scored({"text": TEXTS}, teacher=models["teacher"], reference=models["teacher"], measures=["disagreement"])
    assert out["teacher_nll_mean"] == out["reference_nll_mean"]
    assert out["disagreement"] == [0.0] * len(out["text"])


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_a_score_does_not_depend_on_the_batch_and_its_padding(models, batch_tokens):
    alone = scored({"text": TEXTS}, **models, max_length=40, batch_tokens=1)
    out = scored({"text": TEXTS}, **models, max_length=40, batch_tokens=batch_tokens)
    assert out["text"] == alone["text"]
    for name in ("teacher_nll_mean", "reference_nll_sum"):
        assert out[name] == pytest.approx(alone[name], rel=1e-5)


def test_a_batch_holds_no_more_tokens_than_asked(models, monkeypatch):
    from llmkd.teachers import LocalTeacher

    sizes, original = [], LocalTeacher.__call__

    def watched(self, batch, needs, vocab_size=None):
        assert needs == {Signal.LOGITS}
        sizes.append((batch["input_ids"].shape, batch["attention_mask"].sum().item()))
        return original(self, batch, needs, vocab_size)

    monkeypatch.setattr(LocalTeacher, "__call__", watched)
    scored({"text": TEXTS * 4}, teacher=models["teacher"], pack=False, max_length=80, batch_tokens=200)
    assert all(shape[0] == 1 or shape.numel() <= 200 for shape, _ in sizes)
    padding = 1 - sum(real for _, real in sizes) / sum(shape.numel() for shape, _ in sizes)
    assert padding < 0.2, "examples of like length share a batch"


def test_documents_of_the_reference_are_left_out_to_the_letter(models, tmp_path):
    (tmp_path / "ref.jsonl").write_text("".join(json.dumps({"text": TEXTS[number]}) + "\n" for number in (1, 3)))
    out = scored({"text": TEXTS}, teacher=models["teacher"], exclude={"path": str(tmp_path / "ref.jsonl")})
    assert out["rejected"].count("in_reference") == 2
    kept = [text for text, reason in zip(out["text"], out["rejected"], strict=True) if not reason]
    assert "".join(piece for text in kept for piece in text) == "".join(TEXTS[number] for number in (0, 2, 4))


def test_rows_are_scored_as_they_are_and_long_ones_rejected(models):
    out = scored({"text": TEXTS, "label": list("abcde")}, teacher=models["teacher"], pack=False, max_length=60)
    assert out["text"] == TEXTS
    assert out["label"] == list("abcde")
    assert out["rejected"] == ["too_long", "", "", "too_long", ""]
    losses = [-log_p[label].item() for log_p, label in oracle(models["teacher"], [*ids_of([TEXTS[1]]), 0])]
    assert out["teacher_nll_sum"][1] == pytest.approx(sum(losses), rel=1e-5)


def test_only_a_completion_is_scored(models):
    columns = {"prompt": ["the cat ", "on"], "completion": ["sat", " and off"]}
    out = scored(columns, teacher=models["teacher"], pack=False)
    ids = [*ids_of(["the cat sat"]), 0]
    losses = [-log_p[label].item() for log_p, label in oracle(models["teacher"], ids, first=8)]
    assert out["tokens"] == [4, 9]
    assert out["teacher_nll_sum"][0] == pytest.approx(sum(losses), rel=1e-5)


def test_a_row_without_a_scored_token_is_rejected(models):
    assert scored({"text": ["", "ab"]}, teacher=models["teacher"], pack=False)["rejected"][0] == "no_supervised_token"


def test_a_model_that_is_not_finite_is_told_row_by_row(models, monkeypatch):
    from llmkd.stages import score

    original = score.measure

    def broken(*args, **kwargs):
        out = original(*args, **kwargs)
        out["teacher_nll_mean"][0] = math.nan
        return out

    monkeypatch.setattr(score, "measure", broken)
    out = scored({"text": TEXTS}, teacher=models["teacher"], pack=False, max_length=90)
    assert out["rejected"] == ["not_finite", "", "", "", ""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got no model"),
        ({"teacher": "T", "max_length": 513}, "expected at most 512, the context of teacher"),
        ({"teacher": "T", "measures": ["el2n"]}, "expected a reference"),
        ({"teacher": "T", "domain": "topic", "pack": False}, "stage.domain"),
        ({"teacher": {"path": "T", "dtyp": "bfloat16"}}, "did you mean 'dtype'"),
        ({"teacher": "./nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(models, options, words):
    given = json.loads(json.dumps(options).replace('"T"', json.dumps(models["teacher"])))
    with pytest.raises(ConfigError, match=words):
        Score(**{"max_length": 128, **given})


def test_two_tokenizers_are_refused(models, tmp_path):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "other")
    byte_tokenizer(("zzz",)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="id 259"):
        Score(teacher=models["teacher"], reference=str(tmp_path / "other"), max_length=128)


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"body": ["a"]}, {}, "expected 'text'"),
        ({"text": ["a"], "tokens": [1]}, {"pack": False}, "which score makes"),
        ({"text": [["a", ""]]}, {}, "pack=false"),
        ({"text": ["a"], "messages": [[]]}, {"pack": False}, "one of them"),
        ({"text": ["a"]}, {"domain": "topic"}, "expected 'topic'"),
    ],
)
def test_columns_that_do_not_fit(models, columns, options, words):
    with pytest.raises(DataError, match=words):
        scored(columns, teacher=models["teacher"], **options)


def test_a_row_that_is_no_text(models):
    out = scored({"text": ["a b", None]}, teacher=models["teacher"])
    assert out["rejected"] == ["not_text", ""]
    with pytest.raises(DataError, match=r"example_id 1\.text"):
        scored({"text": ["a b", None]}, teacher=models["teacher"], pack=False)


def test_a_shard_of_which_nothing_is_left(models, tmp_path):
    (tmp_path / "ref.jsonl").write_text(json.dumps({"text": "dog"}) + "\n")
    out = scored({"text": ["dog", "dog"]}, teacher=models["teacher"], exclude={"path": str(tmp_path / "ref.jsonl")})
    assert out["rejected"] == ["in_reference"] * 2
