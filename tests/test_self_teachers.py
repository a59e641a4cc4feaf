"""Teachers made of the student: what each copies and when, what it shares, and that a resumed run sees the same one."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from classes import classifier, data
from peft import LoraConfig
from test_trainer import arguments, rows
from torch import Tensor, nn
from transformers import TrainerCallback

from llmkd import CrossEntropy, DistillTrainer, LocalTeacher, Mix, TokenDistill
from llmkd.data.collate import Collator
from llmkd.errors import ConfigError
from llmkd.objectives import PSKD
from llmkd.teachers import EMA, TEACHERS, FrozenStart, PreviousEpoch, SelfTeacher, Teacher, Votes
from llmkd.types import Signal

EPOCH = 4  # steps: 7 rows, 2 a batch
MAKERS = {
    "frozen_start": FrozenStart,
    "previous_epoch": PreviousEpoch,
    "ema": lambda: EMA(decay=0.8),
    "votes": lambda: Votes(last=2),
    "votes_of_steps": lambda: Votes(last=3, every=3),
}


def goal() -> Mix:
    return Mix([TokenDistill("forward_kl"), CrossEntropy()], weights=[0.5, 1.0])


class Diary(TrainerCallback):
    """The student's weights after every optimizer step, and the teacher's answers before the next."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer
        self.weights, self.shown = [self.now()], []
        trainer.add_callback(self)

    def now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.distiller.student.named_parameters()}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.shown.append(answer(self.trainer))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.weights.append(self.now())


def answer(trainer: DistillTrainer) -> Tensor:
    """The teacher's probabilities on the first rows."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    return trainer.teacher(batch, {Signal.LOGITS}, trainer.distiller.vocab_size).rows.logits(slice(None)).softmax(-1)


def probabilities(trainer: DistillTrainer, weights: dict[str, Tensor]) -> Tensor:
    """A model's probabilities on the same rows, by its own forward."""
    model = copy.deepcopy(trainer.distiller.student).eval()
    model.load_state_dict(weights, strict=False)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return z[:, :-1, : trainer.distiller.vocab_size][batch["labels"][:, 1:] != -100].softmax(-1)


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(teacher, objective=None, student=None, folder="run", peft=None, **changes) -> DistillTrainer:
        torch.manual_seed(1)
        return DistillTrainer(
            student or make_model(), teacher, objective or goal(), arguments(tmp_path / folder, **changes),
            train_dataset=rows(), eval_dataset=rows(seed=4), processing_class=tokenizer, peft_config=peft,
        )  # fmt: skip

    return make


def trained(make_trainer, name: str, steps: int = 3 * EPOCH, **options) -> tuple[DistillTrainer, Diary]:
    trainer = make_trainer(MAKERS[name](), max_steps=steps, learning_rate=1e-2, **options)
    diary = Diary(trainer)
    trainer.train()
    return trainer, diary


def blend(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    out = {name: tensor.double() for name, tensor in weights[0].items()}
    for later in weights[1:]:
        out = {name: decay * tensor + (1 - decay) * later[name].double() for name, tensor in out.items()}
    return {name: tensor.float() for name, tensor in out.items()}


EXPECTED = {  # the weights whose mean answer the teacher gives before step s
    "frozen_start": lambda w, s: [w[0]],
    "previous_epoch": lambda w, s: [w[s // EPOCH * EPOCH]],
    "ema": lambda w, s: [blend(w[: s + 1], 0.8)],
    "votes": lambda w, s: [w[e * EPOCH] for e in range(max(0, s // EPOCH - 1), s // EPOCH + 1)],
    "votes_of_steps": lambda w, s: [w[t * 3] for t in range(max(0, s // 3 - 2), s // 3 + 1)],
}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_it_answers_as_the_student_did(make_trainer, name):
    trainer, diary = trained(make_trainer, name)
    assert len(diary.shown) == 3 * EPOCH
    for step, shown in enumerate(diary.shown):
        each = [probabilities(trainer, weights) for weights in EXPECTED[name](diary.weights, step)]
        torch.testing.assert_close(shown, sum(each) / len(each), rtol=1e-4, atol=1e-7, msg=f"step {step}")
    assert len(trainer.teacher._copies) <= trainer.teacher.snapshots
    moved = not torch.equal(diary.shown[0], diary.shown[-1])
    assert moved == (name != "frozen_start")


def test_they_are_teachers_and_others_are_not_of_their_kind(make_model, tokenizer):
    for name in ("frozen_start", "previous_epoch", "ema", "votes"):
        assert isinstance(TEACHERS[name](), SelfTeacher)
    local = LocalTeacher(make_model(), tokenizer)
    assert isinstance(local, Teacher)
    assert not isinstance(local, SelfTeacher)


@pytest.mark.parametrize("half", [False, True])
def test_at_its_start_a_student_is_its_teacher_to_the_bit(make_trainer, make_model, half):
    """No dropout reaches the copies, and they run in the student's mixed precision."""
    student = make_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer = make_trainer(FrozenStart(), TokenDistill(), student, max_steps=1, bf16=half)
    before = student.transformer.h[0].mlp.c_fc.weight.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-12)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(student.transformer.h[0].mlp.c_fc.weight, before, rtol=0, atol=1e-3)


def test_no_dropout_reaches_a_copy(make_trainer, make_model):
    trainer = make_trainer(PreviousEpoch(), student=make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train())
    assert torch.equal(answer(trainer), answer(trainer))
    assert not any(module.training for module in trainer.teacher._copies[0].modules())


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("stop", [EPOCH, 6], ids=["at an epoch's end", "within an epoch"])
def test_a_resumed_run_sees_the_same_teacher(make_trainer, make_model, tmp_path, name, stop):
    """The checkpoint of an epoch's last step is written before the epoch ends; that of another, after it began."""
    options = {"steps": 10, "save_strategy": "steps", "save_steps": stop}
    whole, diary = trained(make_trainer, name, folder="a", **options)
    again = make_trainer(
        MAKERS[name](), student=make_model(seed=5), folder="b", max_steps=10, learning_rate=1e-2,
        save_strategy="steps", save_steps=stop,
    )  # fmt: skip
    later = Diary(again)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert len(later.shown) == 10 - stop
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(later.shown, diary.shown[stop:], strict=True))
    for (key, ours), theirs in zip(later.now().items(), diary.now().values(), strict=True):
        assert torch.equal(ours, theirs), key
    for key, tensor in again.teacher.state_dict().items():
        assert torch.equal(tensor, whole.teacher.state_dict()[key]), key


def test_an_adapter_s_copies_share_the_base(make_trainer, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer, diary = trained(make_trainer, "votes", peft=lora, save_strategy="steps", save_steps=8)
    students = dict(trainer.distiller.student.named_parameters())
    for model in trainer.teacher._copies:
        for name, parameter in model.named_parameters():
            assert (parameter is students[name]) == ("lora" not in name), name
    each = [probabilities(trainer, diary.weights[step]) for step in (EPOCH, 2 * EPOCH)]
    torch.testing.assert_close(diary.shown[-1], sum(each) / 2, rtol=1e-4, atol=1e-7)
    saved = safetensors.torch.load_file(tmp_path / "run" / "checkpoint-8" / "teacher.safetensors")
    parameters = [name for name in saved if "weight" in name]
    assert parameters
    assert all("lora" in name for name in parameters)


def test_only_checkpoints_hold_the_copies(make_trainer, tmp_path):
    trainer, _ = trained(make_trainer, "ema", save_strategy="steps", save_steps=4)
    trainer.save_student(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "teacher.safetensors").exists()
    assert trainer._checkpoint_bytes() > 4 * 4 * sum(p.numel() for p in trainer.distiller.parameters())


def test_a_checkpoint_of_another_teacher_is_an_error(make_trainer, tmp_path):
    make_trainer(None, CrossEntropy(), max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ConfigError, match=r"without teacher\.safetensors"):
        make_trainer(EMA(), max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_training_twice_goes_on_from_the_student_as_it_is(make_trainer):
    trainer, first = trained(make_trainer, "previous_epoch", steps=EPOCH + 2)
    second = Diary(trainer)
    trainer.train()
    torch.testing.assert_close(second.shown[0], probabilities(trainer, first.weights[EPOCH + 2]), rtol=1e-4, atol=1e-7)


def test_what_cannot_be_copied_is_an_error(make_trainer, make_model):
    with pytest.raises(ConfigError, match=r"bfloat16.*model\.dtype=float32"):
        make_trainer(EMA(), student=make_model().bfloat16())
    teacher = FrozenStart()
    make_trainer(teacher)
    with pytest.raises(ConfigError, match="second student"):
        make_trainer(teacher)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: EMA(1.0), "decay: got 1.0"), (lambda: Votes(0), "last: got 0"), (lambda: Votes(2, 0), "every: got 0")],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_votes_show_no_hidden_states(make_trainer):
    assert Votes().provides == {Signal.LOGITS}
    shown = make_trainer(PreviousEpoch()).teacher(
        Collator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]), {Signal.LOGITS, Signal.HIDDEN_STATES}, 259
    )
    assert len(shown.hidden_states) == 3


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_classifier_teaches_itself(tokenizer, tmp_path, name):
    objective: nn.Module = PSKD() if name == "previous_epoch" else goal()
    trainer = DistillTrainer(
        classifier(), MAKERS[name](), objective, arguments(tmp_path, max_steps=7, logging_steps=1),
        train_dataset=data(), eval_dataset=data(4), processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_kl"] > 0
