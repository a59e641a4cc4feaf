"""Packing, length grouping, several epochs, selected and repeated rows, evaluation: cached training is live training."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from shelf import TEXTS, opened, samples, save_texts, stage_of, write
from transformers import TrainingArguments

from llmkd import CrossEntropy, DistillTrainer, Mix, TokenDistill
from llmkd.data import Collator
from llmkd.mixing import FILE, mix_domains
from llmkd.reweighting import DDK
from llmkd.students.tiny import byte_tokenizer
from llmkd.teachers import local

EXACT = {"hidden": "hidden", "topk": {"name": "topk", "k": 264, "bits": 32}}


def trained(make_model, teacher, train, evaluation, folder, packing: bool, **changes):
    """Logged losses of two epochs, the evaluation at the end and the student."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    options |= {"train_sampling_strategy": "group_by_length", "learning_rate": 1e-3, "logging_steps": 1, **changes}
    args = TrainingArguments(str(folder), use_cpu=True, save_strategy="no", report_to="none", **options)
    trainer = DistillTrainer(
        make_model(seed=3),
        teacher,
        Mix([TokenDistill("jsd"), TokenDistill("forward_kl"), CrossEntropy()], [1.0, 0.5, 0.1]),
        args,
        train,
        evaluation,
        byte_tokenizer(),
        data_collator=Collator(0, packing=packing),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate(), trainer.distiller.student.state_dict()


@pytest.fixture(scope="module")
def store(teacher, corpus, tmp_path_factory):
    """A function: the store of a kind, written once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = write(stage_of(teacher, corpus, tmp_path_factory.mktemp(name) / "store", EXACT[name]))
        return opened(made[name])

    return of


@pytest.mark.parametrize(("name", "packing"), [("hidden", True), ("hidden", False), ("topk", True)])
def test_everything_at_once(make_model, teacher, store, tmp_path, name, packing):
    """A selection of the rows in another order and one row twice; the rest is held out; neither is as it was written."""
    chosen = save_texts(tmp_path / "chosen.jsonl", [TEXTS[i] for i in (7, 2, 5, 1, 8, 4)])
    train = samples(chosen, packing=packing)
    train = concatenate_datasets([train, train.select([0])]).shuffle(seed=1)
    held_out = samples(save_texts(tmp_path / "rest.jsonl", [TEXTS[i] for i in (9, 0, 3)]), packing=packing)
    live, shown = (
        trained(make_model, source, train, held_out, tmp_path / label, packing)
        for label, source in (("live", local(path=str(teacher))), ("cached", store(name)))
    )
    assert len(live[0]) >= 4
    torch.testing.assert_close(torch.tensor(shown[0]), torch.tensor(live[0]), rtol=1e-3, atol=1e-4)
    for key in ("eval_loss", "eval_kl", "eval_top1_agreement"):
        assert shown[1][key] == pytest.approx(live[1][key], rel=1e-3, abs=1e-4)
    for name_, weight in live[2].items():
        torch.testing.assert_close(shown[2][name_], weight, rtol=1e-2, atol=2e-4)


def with_domains(data: Dataset) -> Dataset:
    """Long texts and short ones."""
    numbers = [int(length > 20) for length in data["length"]]
    assert len(set(numbers)) == 2
    return data.add_column("domain", numbers).cast_column("domain", ClassLabel(names=["short", "long"]))


@pytest.mark.parametrize("name", ["hidden", "topk"])
def test_ddk_draws_the_same_rows_and_trains_alike(make_model, teacher, corpus, store, tmp_path, name):
    """The teacher's perplexities, by which DDK draws, are read from the store too."""
    data, looks = with_domains(samples(corpus)), {}
    for label, source in (("live", local(path=str(teacher))), ("cached", store(name))):
        folder = tmp_path / label
        args = TrainingArguments(str(folder), use_cpu=True, max_steps=8, save_strategy="no", report_to="none",
                                 learning_rate=3e-2, logging_steps=1)  # fmt: skip
        trainer = DistillTrainer(make_model(seed=3), source, TokenDistill(), args, data, data, byte_tokenizer())
        mix_domains(trainer, DDK(interval=3), folder)
        trainer.train()
        content = json.loads((folder / FILE).read_text())
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        looks[label] = [content["teacher_perplexity"], content["looks"], losses]
    (perplexity, live, losses), (stored, shown, cached_losses) = looks["live"], looks["cached"]
    assert stored == pytest.approx(perplexity, rel=1e-5)
    assert [look["rows_drawn"] for look in shown] == [look["rows_drawn"] for look in live]
    assert cached_losses == pytest.approx(losses, rel=1e-3)
    assert len({look["r"]["long"] for look in live if look["r"]}) > 1, "r moved"


def test_in_fp32_hidden_states_train_to_the_same_bits(make_model, teacher, tmp_path):
    """Where the teacher sees the same shapes: one document a batch."""
    data = save_texts(tmp_path / "texts.jsonl")
    cached = opened(write(stage_of(teacher, data, tmp_path / "store", "hidden", batch_size=1)))
    runs = []
    for label, source in (("live", local(path=str(teacher))), ("cached", cached)):
        args = TrainingArguments(
            str(tmp_path / label), use_cpu=True, max_steps=6, save_strategy="no", per_device_train_batch_size=1
        )
        trainer = DistillTrainer(
            make_model(seed=3), source, TokenDistill(), args, samples(data), None, byte_tokenizer()
        )
        trainer.train()
        runs.append(trainer.distiller.student.state_dict())
    assert all(torch.equal(weight, runs[1][key]) for key, weight in runs[0].items())


def test_evaluation_says_nothing_of_kl_where_the_store_cannot(make_model, teacher, corpus, tmp_path):
    for store, temperature in (("sampled", 1.0), ({"name": "topk", "temperature": 2.0}, 2.0)):
        folder = tmp_path / f"store{temperature:g}"
        cached = opened(write(stage_of(teacher, corpus, folder, store)))
        data = samples(corpus)
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
        goal = TokenDistill(temperature=temperature)
        trainer = DistillTrainer(make_model(), cached, goal, args, data, data, byte_tokenizer())
        report = trainer.evaluate()
        assert "eval_kl" not in report
        assert "eval_top1_agreement" not in report
        assert report["eval_forward_kl"] > 0
