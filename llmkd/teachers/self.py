"""Teachers that are the student itself at other times: its start, its last epoch, its moving average, its last few selves.

Each snapshot is one copy of the weights that train, in their dtype; what is frozen (the base model under an adapter) is
shared with the student, except where ZeRO-3 or FSDP shards that: then it is one whole copy of all weights on every rank.
They run as the student does, in its mixed precision, but without dropout.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.adapters import adapter_of, freeze
from llmkd.combined import mean_rows
from llmkd.errors import ConfigError
from llmkd.heads import full
from llmkd.types import Batch, Outputs, Signal
from llmkd.zero3 import gathered

CLOCK = "clock"


class Snapshots(ABC):
    """What all of them share: the copies, how they answer, how they are saved.

    Raises:
        ConfigError: a second student.
    """

    provides = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES, Signal.ATTENTIONS})
    tokenizer = None
    vocab_size = None
    snapshots = 1

    def __init__(self) -> None:
        self._copies: list[nn.Module] = []  # the newest last
        self._learned: frozenset[str] = frozenset()
        self._student: nn.Module | None = None
        self._clock = 0
        self._precision: Any = nullcontext
        self._device: torch.device | None = None
        self._shares = True

    def prepare(self, accelerator: Any) -> None:
        """Take over the student's device and precision; share nothing with what will be sharded."""
        zero3 = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", 0) == 3
        self._shares = not zero3 and getattr(accelerator.state, "fsdp_plugin", None) is None
        self._precision, self._device = accelerator.autocast, accelerator.device

    @torch.no_grad()
    def observe(self, student: nn.Module, step: int, epoch: int) -> None:
        """Look at the student before step `step` of epoch `epoch`, both from 0; the first look is its start."""
        if self._student is not None:
            if student is not self._student:
                raise ConfigError("teacher: got a second student; expected one. Make another teacher for it.")
            now = self._now(step, epoch)
            if now != self._clock:
                self._clock = now
                self._move(student)
            return
        self._student = student
        self._learned = frozenset(name for name, p in student.named_parameters() if p.requires_grad)
        with gathered(student.parameters()):
            self._copies = [freeze(self._twin(student)).to(self._device)]

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The newest copy's signals; rows are the mean of all copies' probabilities."""
        with self._precision():
            shown = [adapter_of(model).read(model, batch, needs, vocab_size) for model in self._copies]
            rows = [out.rows.cast(autocast=True) for out in shown]  # type: ignore[union-attr]
        return Outputs(mean_rows(rows), shown[-1].hidden_states, shown[-1].attentions)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Tensor]:
        """The copies' own tensors, each name behind its copy's number, and the time of the newest."""
        copies = enumerate(self._copies)
        tensors = {f"{i}.{name}": tensor.contiguous() for i, model in copies for name, tensor in self._own(model)}
        return {**tensors, CLOCK: torch.tensor(self._clock)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._clock = int(state[CLOCK])
        count = 1 + max(int(name.partition(".")[0]) for name in state if name != CLOCK)
        self._copies = self._copies[:count] + [self._twin(self._copies[0]) for _ in range(count - len(self._copies))]
        for i, model in enumerate(self._copies):
            for name, tensor in self._own(model):
                tensor.copy_(state[f"{i}.{name}"])

    @abstractmethod
    def _now(self, step: int, epoch: int) -> int:
        """The time by this teacher's clock; it moves when that does."""

    @abstractmethod
    def _move(self, student: nn.Module) -> None:
        """Bring the copies up to date."""

    def _twin(self, model: nn.Module) -> nn.Module:
        """A copy of a model that shares what is frozen."""
        frozen = [p for name, p in model.named_parameters() if name not in self._learned] if self._shares else []
        return copy.deepcopy(model, {id(p): p for p in frozen})

    def _own(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a copy that are not the student's: what trains, and buffers."""
        yield from ((name, p) for name, p in model.named_parameters() if name in self._learned)
        yield from model.named_buffers()

    def _move_to(self, model: nn.Module, student: nn.Module, share: float = 1.0) -> None:
        """Move a copy's weights towards the student's by a share of the way, its buffers wholly."""
        for (name, mine), (_, theirs) in zip(self._own(model), self._own(student), strict=True):
            with gathered([theirs]):
                whole = full(theirs).to(mine)
                mine.lerp_(whole, share) if share < 1 and name in self._learned else mine.copy_(whole)


class FrozenStart(Snapshots):
    """p = softmax(student_0(x)): the student as it was before its first step.

    Reference: Roth et al. 2024 (Fantastic Gains), arXiv 2310.17653: the reference that a student keeps close to.
    """

    def _now(self, step: int, epoch: int) -> int:
        return 0

    def _move(self, student: nn.Module) -> None:
        """It never moves."""


class PreviousEpoch(Snapshots):
    """p = softmax(student_{e-1}(x)): the student at the end of the previous epoch; in the first epoch, its start.

    A run of one epoch, or of data without a length, therefore sees the start alone.

    Reference: Kim et al. 2021 (PS-KD), arXiv 2006.12000; Carrino et al. 2023, arXiv 2309.17134.
    """

    def _now(self, step: int, epoch: int) -> int:
        return epoch

    def _move(self, student: nn.Module) -> None:
        self._move_to(self._copies[0], student)


class EMA(Snapshots):
    """p = softmax(ema(x)), weights ema <- decay ema + (1 - decay) student after every optimizer step; ema_0 = student_0.

    Args:
        decay: in [0, 1); buffers are copied, not averaged.

    Raises:
        ConfigError: decay is out of range, or weights in half precision train, where the average's small steps round to 0.

    Reference: Tarvainen and Valpola 2017 (mean teacher), arXiv 1703.01780.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay: got {decay}; expected at least 0 and below 1, such as 0.999.")
        super().__init__()
        self.decay = decay

    def observe(self, student: nn.Module, step: int, epoch: int) -> None:
        """As any of them does, once the weights' dtype is found to bear an average."""
        dtypes = {p.dtype for p in student.parameters() if p.requires_grad}
        if self._student is None and (half := dtypes & {torch.float16, torch.bfloat16}):
            raise ConfigError(
                f"ema: got weights in {half.pop()}, which rounds an average's steps of {1 - self.decay:.2g} away; expected "
                "float32. Set model.dtype=float32, with train.bf16=true for the speed."
            )
        super().observe(student, step, epoch)

    def _now(self, step: int, epoch: int) -> int:
        return step

    def _move(self, student: nn.Module) -> None:
        self._move_to(self._copies[0], student, 1 - self.decay)


class Votes(Snapshots):
    """p = (1 / K) sum_k softmax(student_k(x)) over its last K snapshots; fewer, and its start, until there are K.

    Args:
        last: K, at least 1; each is a forward pass more in every step, and a copy more in memory.
        every: optimizer steps between snapshots; None takes one at the end of each epoch but the last.

    Raises:
        ConfigError: `last` or `every` is below 1.

    Reference: Laine and Aila 2017 (temporal ensembling), arXiv 1610.02242: its idea, with snapshots instead of stored outputs.
    """

    provides = frozenset({Signal.LOGITS})

    def __init__(self, last: int = 3, every: int | None = None) -> None:
        for name, value in (("last", last), ("every", 1 if every is None else every)):
            if value < 1:
                raise ConfigError(f"votes.{name}: got {value}; expected at least 1.")
        super().__init__()
        self.snapshots, self.every = last, every

    def _now(self, step: int, epoch: int) -> int:
        return epoch if self.every is None else step // self.every

    def _move(self, student: nn.Module) -> None:
        full = len(self._copies) == self.snapshots
        model = self._copies.pop(0) if full else self._twin(self._copies[0])
        self._move_to(model, student)
        self._copies.append(model)
