"""Student and objective as one module: what DDP, FSDP2 and DeepSpeed wrap. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from llmkd.adapters import adapter_of, check_takes, unwrap
from llmkd.objectives.base import Objective
from llmkd.types import Loss, Outputs, row_labels
from llmkd.zero3 import announce, take_in


class Distiller(nn.Module):
    """One forward: read the student, apply the objective. Only `.student` is exported.

    Args:
        student: a Hugging Face causal LM or sequence classifier, or its PEFT wrapper.
        objective: any Objective; its parameters train and sync with the student's.
        vocab_size: columns of the heads to compare (the tokenizer's), or None for all.
    """

    accepts_loss_kwargs = True  # the Trainer then counts the supervised items of the whole accumulation window

    def __init__(self, student: nn.Module, objective: Objective, vocab_size: int | None = None) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.adapter = adapter_of(student)
        check_takes(self.adapter, objective.takes)
        self.agreement = Agreement(self.adapter.measure)
        self.vocab_size = vocab_size

    @property
    def config(self) -> Any:
        """The student's config: the Trainer and DeepSpeed read it."""
        return unwrap(self.student).config

    @property
    def generation_config(self) -> Any:
        """The student's generation config."""
        return unwrap(self.student).generation_config

    @property
    def _no_split_modules(self) -> Any:
        """The student's layer classes: FSDP2 shards each."""
        return unwrap(self.student)._no_split_modules

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the student's activations in backward."""
        self.student.activation_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def compile_backbone(self, args: Any, accelerator: Any) -> None:
        """torch.compile the student's backbone in place, as `args` say, and keep the Trainer from compiling the loss."""
        self.adapter.backbone(self.student).compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    def forward(self, teacher: Outputs | None = None, only_measure: bool = False, **batch: Tensor) -> Loss:
        """The objective's sums, unless only to measure; in eval mode, `agreement.measure`'s sums as well."""
        needs = self.objective.needs | self.objective.student_needs
        student = self.adapter.read(self.student, batch, needs, self.vocab_size)
        for user in (self.objective, self.agreement):
            announce(user, student.rows.parameters())  # type: ignore[union-attr]
        for module in self.objective.row_modules():
            take_in(self.objective, module)
        loss = {} if only_measure else dict(self.objective(student, teacher, batch))
        if not self.training:
            loss.update(self.agreement(student, teacher, batch))
        return loss


class Agreement(nn.Module):
    """What the adapter measures, as a module, so that sharding frameworks gather the head for it."""

    def __init__(self, measure: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.measure = measure

    @torch.no_grad()
    def forward(self, student: Outputs, teacher: Outputs | None, batch: dict[str, Tensor]) -> Loss:
        """Sums named `agreement.*`: of a text nll, kl, top1_agreement, teacher_nll; of classes accuracy instead of nll."""
        rows = teacher.rows if teacher is not None else None
        sums = self.measure(student.rows, rows, row_labels(batch))  # type: ignore[arg-type]
        return {f"agreement.{name}": value for name, value in sums.items()}
