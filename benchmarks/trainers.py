"""One epoch over given batches: by llmkd, by TRL's trainers, and by nothing but the work that no trainer can avoid."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from benchmarks.samples import Batch
from llmkd.objectives import TokenDistill
from llmkd.trainer import DistillTrainer

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 1,  # of batches that are made already
    "learning_rate": 1e-5,
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "bf16": False,
}


@dataclass
class Setting:
    """What all methods share: two models, their tokenizer, a scratch folder, and options of TrainingArguments."""

    student: Any
    teacher: Any
    tokenizer: Any
    folder: Path
    options: dict[str, Any]

    def arguments(self, kind: type[TrainingArguments], given: list[Batch], **own: Any) -> Any:
        """Arguments of one epoch."""
        return kind(output_dir=str(self.folder), **{"max_steps": len(given), **OPTIONS, **self.options, **own})


Method = Callable[[Setting, list[Batch]], Callable[[], Any]]


def llmkd(setting: Setting, given: list[Batch]) -> Callable[[], Any]:
    """DistillTrainer, forward KL."""
    trainer = DistillTrainer(
        model=copy.deepcopy(setting.student),
        teacher=setting.teacher,
        objective=TokenDistill("forward_kl"),
        args=setting.arguments(TrainingArguments, given),
        processing_class=setting.tokenizer,
        **_made(given),
    )
    return lambda: trainer.train().training_loss


def gkd(setting: Setting, given: list[Batch]) -> Callable[[], Any]:
    """TRL's experimental GKDTrainer with lmbda = 0 and beta = 0, which is the forward KL too."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = setting.arguments(GKDConfig, given, lmbda=0.0, beta=0.0, gradient_checkpointing=False)
    trainer = GKDTrainer(
        model=copy.deepcopy(setting.student),
        teacher_model=setting.teacher,
        args=args,
        processing_class=setting.tokenizer,
        **_made(given, ("input_ids", "attention_mask", "labels")),
    )
    return lambda: trainer.train().training_loss


def sft(setting: Setting, given: list[Batch]) -> Callable[[], Any]:
    """TRL's SFTTrainer: the floor of a trainer without a teacher."""
    from trl import SFTConfig, SFTTrainer

    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=copy.deepcopy(setting.student),
        args=setting.arguments(SFTConfig, given, **own),
        processing_class=setting.tokenizer,
        **_made(given, ("input_ids", "attention_mask", "labels")),
    )
    return lambda: trainer.train().training_loss


def limit(setting: Setting, given: list[Batch]) -> Callable[[], Any]:
    """The physical limit: both backbones once, the student's backward, four head GEMMs a supervised row; no optimizer."""
    student, teacher = copy.deepcopy(setting.student).train(), setting.teacher
    heads = [model.get_output_embeddings().weight.detach() for model in (student, teacher)]
    place = next(student.parameters()).device
    bf16 = bool(setting.options.get("bf16"))
    heads = [head.bfloat16() for head in heads] if bf16 else heads

    def run() -> None:
        for made in given:
            batch = {name: value.to(place) for name, value in made.items()}
            inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
            with torch.no_grad():
                seen = teacher.get_decoder()(**inputs, use_cache=False).last_hidden_state
            with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
                hidden = student.get_decoder()(**inputs, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
            rows = [x.detach().flatten(0, 1)[batch["rows"]].to(heads[0].dtype) for x in (hidden, seen)]
            _gemms(*rows, *heads)
            student.zero_grad(set_to_none=True)

    return run


def _gemms(hidden_s: Tensor, hidden_t: Tensor, head_s: Tensor, head_t: Tensor) -> None:
    z_s = hidden_s @ head_s.t()
    hidden_t @ head_t.t()
    z_s @ head_s
    z_s.t() @ hidden_s


def optimizer(setting: Setting, given: list[Batch]) -> Callable[[], Any]:
    """What the limit leaves out: clipping and a fused AdamW step a batch."""
    student = copy.deepcopy(setting.student)
    parameters = list(student.parameters())
    adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-6)

    def run() -> None:
        for _ in given:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()

    return run


METHODS: dict[str, Method] = {"limit": limit, "optimizer": optimizer, "llmkd": llmkd, "gkd": gkd, "sft": sft}


def _made(given: list[Batch], names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Dataset and collator of batches that are made already; `names` are the columns that a trainer may see."""

    def collate(examples: list[dict[str, Any]]) -> Batch:
        batch = given[examples[0]["number"]]
        return {name: value for name, value in batch.items() if names is None or name in names}

    return {"train_dataset": Dataset.from_dict({"number": list(range(len(given)))}), "data_collator": collate}


def quiet() -> None:
    """Only the results are printed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
