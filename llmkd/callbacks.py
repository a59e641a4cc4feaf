"""What happens around the steps: the progress bar, a graceful Ctrl-C, what objective and teacher see of each step."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback, TrainerCallback

from llmkd.distributed import sum_over_ranks
from llmkd.teachers.base import SelfTeacher

if TYPE_CHECKING:
    from llmkd.trainer import DistillTrainer


SHOWN = {
    "loss": ("loss", "{:.4g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "eval_kl": ("held-out kl", "{:.4g}"),
}


class Progress(ProgressCallback):
    """One bar with loss, tokens/s and time left, instead of a printed line every few steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; a resumed run starts where it stopped."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("distil")
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest numbers in the bar."""
        if self.training_bar is None or not logs:
            return
        values = {label: form.format(logs[name]) for name, (label, form) in SHOWN.items() if name in logs}
        if values:
            self.shown = {**getattr(self, "shown", {}), **values}
            self.training_bar.set_postfix(self.shown)

    def release(self) -> None:
        """Close the bar, so that what is printed next begins a line."""
        if self.training_bar is not None:
            self.training_bar.close()


class Interrupt(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second one stops at once.

    Ranks agree on the step through an all-reduce whose result is read one step later, so nothing waits for it.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._previous: dict[int, Any] = {}
        self._pending: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals, in the main thread only."""
        try:
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self._previous = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop if any rank was asked to."""
        if args.world_size > 1:
            agreed = self._pending is not None and bool(self._pending.item())
            self._pending = sum_over_ranks(torch.tensor(float(self.asked), device=args.device))
        else:
            agreed = self.asked
        if agreed and not control.should_training_stop:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def release(callbacks: list[TrainerCallback]) -> None:
    """Close the bar and give the signals back, however a training ended."""
    for callback in callbacks:
        if isinstance(callback, Progress | Interrupt):
            callback.release()


class AfterStep(TrainerCallback):
    """Calls `objective.after_step` once an optimizer step, with means that are the same on every rank."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called between the optimizer's step and the next forward."""
        means = self.trainer.step_means()
        self.trainer.distiller.objective.after_step(state.global_step / max(1, state.max_steps), means)


class Follow(TrainerCallback):
    """Tells the objective which epoch begins, and a teacher that is made of the student how the student has changed.

    The state's epoch is whole when one begins, and what is resumed begins where it stopped, so a teacher's own clock says
    whether it has seen that epoch's start. At an epoch's end it could not: a checkpoint may fall just before.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer
        self._observe(0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before what may be an evaluation."""
        self.on_epoch_begin(args, state, control)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The objective's turn."""
        self.trainer.distiller.objective.begin_epoch(int(state.epoch), state.num_train_epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The teacher's turn, before the first micro-batch of each step."""
        self._observe(state.global_step, int(state.epoch))

    def _observe(self, step: int, epoch: int) -> None:
        if isinstance(self.trainer.teacher, SelfTeacher):
            self.trainer.teacher.observe(self.trainer.distiller.student, step, epoch)
