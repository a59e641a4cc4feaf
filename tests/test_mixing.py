"""Training on domains: what is measured, how r moves the rows that are drawn, and that a checkpoint keeps all of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset
from test_trainer import Recording, arguments
from test_trainer_state import StopAt

from llmkd import CrossEntropy, DistillTrainer, Mix, TokenDistill
from llmkd.errors import ConfigError, TrainingError
from llmkd.mixing import FILE, mix_domains
from llmkd.reweighting import DDK, Fixed
from llmkd.teachers import EnsembleTeacher, LocalTeacher, RoutedTeacher

NAMES = ["low", "mid", "high"]
SIZES = {"low": 30, "mid": 6, "high": 12}


def domains(sizes=SIZES, seed: int = 0, names=NAMES) -> Dataset:
    """Texts of three alphabets, with lengths that differ: the domains' perplexities part as the student learns."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for number, name in enumerate(names):
        for _ in range(sizes.get(name, 0)):
            length = int(torch.randint(5, 15, (), generator=generator))
            ids.append(torch.randint(3 + 80 * number, 3 + 80 * number + 4**number, (length,), generator=generator))
            labels.append(number)
    rows = [row.tolist() for row in ids]
    columns = {"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows], "length": [len(row) for row in rows]}
    return Dataset.from_dict({**columns, "domain": labels}).cast_column("domain", ClassLabel(names=names))


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(reweighting=None, folder="run", seed=0, teacher="live", **changes) -> DistillTrainer:
        data = {"train_dataset": domains(), "eval_dataset": domains({"low": 3, "mid": 2, "high": 4}, seed=7)}
        data |= {key: changes.pop(key) for key in list(changes) if key in data}
        options = {"max_steps": 8, "learning_rate": 3e-2, "train_sampling_strategy": "random", **changes}
        trainer = DistillTrainer(
            make_model("gpt2", seed=seed, resid_pdrop=0.1),
            Recording(make_model(seed=9), tokenizer) if teacher == "live" else teacher,
            Mix([TokenDistill("forward_kl"), CrossEntropy()], [0.2, 1.0]) if teacher else CrossEntropy(),
            arguments(tmp_path / folder, **options), processing_class=tokenizer, **data,
        )  # fmt: skip
        mix_domains(trainer, reweighting or DDK(interval=3), tmp_path / folder)
        return trainer

    return make


def looks(folder) -> list[dict]:
    return json.loads((folder / FILE).read_text())["looks"]


def perplexity(model, rows) -> float:
    """exp of the mean over all tokens of a set, one token at a time, in float64."""
    model, total, count = model.double().eval(), 0.0, 0
    with torch.no_grad():
        for row in rows:
            log_q = model(torch.tensor([row["input_ids"]])).logits[0, :, :259].log_softmax(-1)
            for position, label in enumerate(row["input_ids"][1:]):
                total, count = total - log_q[position, label].item(), count + 1
    return math.exp(total / count)


def test_perplexities_are_of_all_tokens_of_each_domain(make_trainer, make_model, tmp_path):
    make_trainer().train()
    first = looks(tmp_path / "run")[0]
    content = json.loads((tmp_path / "run" / FILE).read_text())
    held_out = domains({"low": 3, "mid": 2, "high": 4}, seed=7)
    student, teacher = make_model("gpt2", resid_pdrop=0.1), make_model(seed=9)
    for number, name in enumerate(NAMES):
        rows = held_out.filter(lambda row, wanted=number: row["domain"] == wanted)
        assert first["perplexity"][name] == pytest.approx(perplexity(student, rows), rel=1e-5)
        assert content["teacher_perplexity"][name] == pytest.approx(perplexity(teacher, rows), rel=1e-5)


def test_r_moves_by_the_papers_equations_every_interval(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    content, found = json.loads((tmp_path / "run" / FILE).read_text()), looks(tmp_path / "run")
    assert [look["step"] for look in found] == [0, 3, 6, 8]
    ddk, teacher = DDK(interval=3), content["teacher_perplexity"]
    r = ddk.start(SIZES, found[0]["perplexity"], teacher)
    assert found[0]["r"] == r
    for look in found[1:3]:
        r = ddk.update(r, look["perplexity"], teacher)
        assert look["r"] == r
    assert found[3]["r"] is None, "the last look moves nothing"
    values = [look["r"]["high"] for look in found[:3]]
    assert max(values) - min(values) > 1e-3, "the student learned the domains unevenly"


def test_rows_are_drawn_by_their_number_first_and_by_r_then(make_trainer, tmp_path):
    seen, options = [], {"per_device_train_batch_size": 16, "max_steps": 24}
    trainer = make_trainer(Fixed({"low": 0.0, "mid": 0.75, "high": 0.25}, interval=12), **options)
    original = trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(row["domain"] for row in rows) or original(rows)
    trainer.train()
    drawn = looks(tmp_path / "run")[-1]["rows_drawn"]
    trained = [domain for domain in seen if domain is not None]
    assert drawn["low"] == 0
    assert sum(drawn.values()) == 24 * 16
    assert 0.75 * 384 - 3 * 8.5 < drawn["mid"] < 0.75 * 384 + 3 * 8.5
    assert trained.count(1) >= drawn["mid"]
    ddk = make_trainer(DDK(alpha=1.0, interval=12), folder="ddk", **options)
    assert ddk.train() is not None
    first, second = looks(tmp_path / "ddk")[1:]
    share = first["rows_drawn"]["low"] / (12 * 16)
    assert abs(share - 30 / 48) < 3 * math.sqrt(30 / 48 * 18 / 48 / 192), "D_0 is drawn from all rows alike"
    later = {name: second["rows_drawn"][name] - first["rows_drawn"][name] for name in NAMES}
    for name, p in first["r"].items():
        assert abs(later[name] - 192 * p) <= 3 * math.sqrt(192 * p * (1 - p)) + 1e-9, name


def test_the_teacher_is_read_once(make_trainer):
    trainer = make_trainer(Fixed(interval=2), max_steps=6)
    calls = trainer.teacher.calls
    trainer.train()
    batches_once = 2 + 1 + 2  # 3, 2 and 4 validation rows, in batches of 2
    assert len(calls) == batches_once + 6


def test_an_ensembles_perplexity_is_that_of_the_mean_of_its_probabilities(make_trainer, make_model, tmp_path):
    members = [make_model(seed=9), make_model(seed=5)]
    trainer = make_trainer(teacher=EnsembleTeacher([LocalTeacher(model) for model in members], [3.0, 1.0]))
    trainer.train()
    found = json.loads((tmp_path / "run" / FILE).read_text())["teacher_perplexity"]
    held_out = domains({"low": 3, "mid": 2, "high": 4}, seed=7)
    for number, name in enumerate(NAMES):
        total, count = 0.0, 0
        for row in held_out.filter(lambda row, wanted=number: row["domain"] == wanted):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                p, r = (model.double()(ids).logits[0, :-1, :259].softmax(-1) for model in members)
            mean = 0.75 * p + 0.25 * r
            total -= mean.gather(-1, ids[0, 1:, None]).log().sum().item()
            count += len(ids[0]) - 1
        assert found[name] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_each_domain_may_have_its_own_teacher(make_trainer, make_model, tmp_path):
    members = {name: make_model(seed=seed) for seed, name in enumerate(NAMES)}
    make_trainer(teacher=RoutedTeacher({name: LocalTeacher(model) for name, model in members.items()})).train()
    found = json.loads((tmp_path / "run" / FILE).read_text())["teacher_perplexity"]
    held_out = domains({"low": 3, "mid": 2, "high": 4}, seed=7)
    for number, name in enumerate(NAMES):
        rows = held_out.filter(lambda row, wanted=number: row["domain"] == wanted)
        assert found[name] == pytest.approx(perplexity(members[name], rows), rel=1e-5)


def test_logs_and_pictures_show_every_domain(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "domain/mid/perplexity" in entry]
    assert [entry["step"] for entry in logs] == [0, 3, 6, 8]
    for name in NAMES:
        assert logs[1][f"domain/{name}/r"] == looks(tmp_path / "run")[1]["r"][name]
    picture = (tmp_path / "run" / "domains.svg").read_text()
    assert "<svg" in picture
    for name in NAMES:
        assert f">{name}<" in picture


def test_measuring_changes_nothing(make_trainer):
    """Two looks or eight: the same rows in the same order, dropout and all, where r does not depend on the looks."""
    weights = []
    for interval in (8, 4):
        trainer = make_trainer(Fixed(interval=interval), folder=str(interval), max_steps=4)
        trainer.train()
        weights.append(trainer.distiller.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("stop", [4, 6], ids=["within an interval", "between two"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(make_trainer, tmp_path, strategy, stop):
    options = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": strategy}
    whole = make_trainer(folder="whole", **options)
    whole.train()
    cut = make_trainer(folder="cut", **options)
    cut.add_callback(StopAt(stop))
    cut.train()
    assert looks(tmp_path / "cut")[-1]["step"] <= stop, "a stopped run does not look for the last time"
    again = make_trainer(folder="cut", seed=5, **options)
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=cut.last_checkpoint())
    assert looks(tmp_path / "cut") == looks(tmp_path / "whole")
    for (name, ours), theirs in zip(again.distiller.named_parameters(), whole.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_resumed_run_may_split_its_batch_otherwise(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(folder="whole", per_device_train_batch_size=4, **options)
    whole.train()
    cut = make_trainer(folder="cut", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    cut.add_callback(StopAt(4))
    cut.train()
    again = make_trainer(folder="cut", per_device_train_batch_size=4, **options)
    again.train(resume_from_checkpoint=cut.last_checkpoint())
    ours, theirs = looks(tmp_path / "cut"), looks(tmp_path / "whole")
    assert [look["rows_drawn"] for look in ours] == [look["rows_drawn"] for look in theirs]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataset": domains().remove_columns("domain")}, ["train_dataset", "'domain'", "class_encode_column"]),
        ({"eval_dataset": None}, ["eval_dataset", "'domain'"]),
        ({"eval_dataset": domains({"low": 2, "high": 2})}, ["domain 'mid'", "validation"]),
        ({"train_dataset": domains({"low": 2, "high": 2})}, ["domain 'mid'", "training"]),
        ({"eval_dataset": domains(names=["low", "mid", "tall"])}, ["tall", "the same"]),
        ({key: domains(names=["low"]) for key in ("train_dataset", "eval_dataset")}, ["one domain", "'low'", "two"]),
        ({"max_steps": -1}, ["train.max_steps", "without end"]),
        ({"ignore_data_skip": True}, ["train.ignore_data_skip", "false"]),
        ({"train_sampling_strategy": "sequential"}, ["'sequential'", "group_by_length"]),
        ({"teacher": None}, ["teacher", "none"]),
    ],
)
def test_what_cannot_be_mixed_is_said_on_one_line(make_trainer, changes, words):
    with pytest.raises(ConfigError) as caught:
        make_trainer(**changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fixed_mixtures_need_no_teacher(make_trainer, tmp_path):
    make_trainer(Fixed(interval=4), teacher=None).train()
    assert looks(tmp_path / "run")[-1]["step"] == 8
    assert json.loads((tmp_path / "run" / FILE).read_text())["teacher_perplexity"] == {}


def test_a_student_that_is_not_finite_names_the_domain(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.distiller.student.get_input_embeddings().weight[84] = torch.nan  # of the middle alphabet
    with pytest.raises(TrainingError, match="domain 'mid'"):
        trainer.train()


def test_other_domains_than_the_checkpoints_are_refused(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 4}
    first = make_trainer(max_steps=4, **options)
    first.train()
    renamed = {key: domains(names=["low", "mid", "tall"], sizes={"low": 9, "mid": 9, "tall": 9})
               for key in ("train_dataset", "eval_dataset")}  # fmt: skip
    with pytest.raises(ConfigError, match="high, low, mid; got low, mid, tall"):
        make_trainer(**options, **renamed).train(resume_from_checkpoint=first.last_checkpoint())
