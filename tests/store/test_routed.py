"""Each example is read by its domain's teacher, and by no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from shelf import opened, samples, save_teacher, save_texts, stage_of, write
from transformers import TrainingArguments

from llmkd import DistillTrainer, Mix, TokenDistill
from llmkd.data import Collator, DocumentCollator
from llmkd.errors import ConfigError, DataError
from llmkd.heads import DenseRows, HeadRows
from llmkd.objectives import SinKD, SpanLoss
from llmkd.teachers import RoutedTeacher, local, routed
from llmkd.types import Signal

EXACT = {"name": "topk", "k": 264, "bits": 32}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("second"), num_hidden_layers=1)


def with_domains(data, names=("math", "code")):
    """Every third example is of the second domain."""
    return data.add_column("domain", [names[i % 3 == 0] for i in range(len(data))])


def rows_of(source, batch) -> torch.Tensor:
    rows = source(batch, {Signal.LOGITS}, 259).rows
    if isinstance(rows, DenseRows | HeadRows) or not hasattr(rows, "ids"):
        return rows.logits(slice(None)).log_softmax(-1)
    return torch.full((len(rows), 259), -torch.inf).scatter(1, rows.ids.clamp_min(0), rows.log_probs)


def truth(batch, teachers, by_example) -> torch.Tensor:
    """The rows of whole batches under each teacher, and of each row its own."""
    everything = torch.stack([rows_of(teacher, batch) for teacher in teachers])
    owner = torch.tensor(by_example)[batch["rows"] // batch["input_ids"].shape[1]]
    return everything[owner, torch.arange(len(owner))]


@pytest.mark.parametrize(("kind", "packing"), [("live", False), ("live", True), ("hidden", False), ("topk", True)])
def test_rows_are_those_of_the_examples_own_teacher(teacher, second, corpus, tmp_path, kind, packing):
    data = with_domains(samples(corpus, packing=packing))
    live = [local(path=str(teacher)), local(path=str(second))]
    if kind == "live":
        members = live
    else:
        stores = ((teacher, tmp_path / "one"), (second, tmp_path / "two"))
        store = "hidden" if kind == "hidden" else EXACT
        members = [opened(write(stage_of(path, corpus, folder, store))) for path, folder in stores]
    source = RoutedTeacher(dict(zip(("math", "code"), members, strict=True)))
    source.check_data(data)
    collate = DocumentCollator(Collator(0, packing=packing))
    for start in range(0, len(data) - 3, 3):
        batch = collate([data[i] for i in range(start, start + 4)])
        by_example = [int(domain == "code") for domain in batch["routes"].domains]
        torch.testing.assert_close(rows_of(source, batch), truth(batch, live, by_example), rtol=1e-4, atol=2e-5)
    alone = collate([data[1], data[2]])
    torch.testing.assert_close(rows_of(source, alone), truth(alone, live, [0, 0]), rtol=1e-4, atol=2e-5)


def test_each_teacher_runs_on_its_own_examples(teacher, second, corpus):
    data = with_domains(samples(corpus))
    members = {"math": local(path=str(teacher)), "code": local(path=str(second))}
    seen = {}
    for name, member in members.items():
        reader = member._reader
        member._reader = lambda batch, reader=reader, name=name, **kwargs: (
            seen.__setitem__(name, len(batch["input_ids"])) or reader(batch=batch, **kwargs)
        )
    RoutedTeacher(members)(DocumentCollator(Collator(0))([data[i] for i in range(6)]), {Signal.LOGITS}, 259)
    assert seen == {"math": 4, "code": 2}


def test_it_trains_on_numbered_domains_with_any_objective(teacher, second, corpus, make_model, tokenizer, tmp_path):
    data = with_domains(samples(corpus, spans="punctuation"), (0, 1)).cast_column(
        "domain", ClassLabel(names=["math", "code"])
    )
    source = routed(teachers={"code": str(second), "math": str(teacher)})
    for goal in (SinKD(top_k=20), Mix([SpanLoss(), TokenDistill("jsd")])):
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", report_to="none")
        trainer = DistillTrainer(make_model(), source, goal, args, data, data, tokenizer)
        trainer.train()
        assert trainer.evaluate()["eval_kl"] > 0
    named = with_domains(samples(corpus))
    assert source._number(1) == 0
    source.check_data(named)
    assert np.array([source._number(value) for value in named["domain"]]).sum() > 0


def test_errors(teacher, second, corpus, tmp_path):
    data = samples(corpus)
    source = routed(teachers={"math": str(teacher), "code": str(second)})
    with pytest.raises(DataError, match="needs a column 'domain'"):
        source.check_data(data)
    with pytest.raises(DataError, match="got the domain 'prose'; expected one of math, code"):
        source.check_data(with_domains(data, ("math", "prose")))
    with pytest.raises(ConfigError, match="without routes"):
        source(DocumentCollator(Collator(0))([data[0]]), {Signal.LOGITS})
    few = save_texts(tmp_path / "few.jsonl", ["One text.", "Another."])
    stored = opened(write(stage_of(second, few, tmp_path / "hidden", "hidden")))
    with pytest.raises(DataError, match="is not in"):
        RoutedTeacher({"math": local(path=str(teacher)), "code": stored}).check_data(with_domains(data))
    top = opened(write(stage_of(second, corpus, tmp_path / "topk", "topk")))
    with pytest.raises(ConfigError, match="expected one kind of all"):
        RoutedTeacher({"math": local(path=str(teacher)), "code": top})
