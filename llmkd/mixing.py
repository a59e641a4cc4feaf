"""Training on a mixture of domains that a re-weighting moves: one epoch of the Trainer is one interval of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llmkd.data.domains import DomainSampler
from llmkd.data.ids import DOMAIN
from llmkd.errors import ConfigError, TrainingError
from llmkd.events import TopKRows
from llmkd.meters import Meter
from llmkd.plots import plot_domains
from llmkd.reweighting import Reweighting, Shares
from llmkd.rows import look
from llmkd.types import Signal, row_labels, tensors_of

if TYPE_CHECKING:
    from llmkd.trainer import DistillTrainer

logger = logging.getLogger(__name__)

FILE = "domains.json"
UNUSABLE = {  # TrainingArguments under which an interval would not be an epoch, or would not come back
    "auto_find_batch_size": "the batch must be known beforehand",
    "ignore_data_skip": "a resumed interval would begin again",
    "restore_callback_states_from_checkpoint": "the domains' state is restored anyway",
}


@dataclass
class State:
    """What a checkpoint keeps: the interval that has begun, its r and the rows drawn before it, a domain each."""

    interval: int = 0
    r: Shares = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    teacher: Shares = field(default_factory=dict)
    looks: list[dict[str, Any]] = field(default_factory=list)


def mix_domains(trainer: DistillTrainer, reweighting: Reweighting, folder: str | Path) -> None:
    """Let `trainer` draw its rows from domains as `reweighting` says; call it before `trainer.train()`.

    The data sets need a ClassLabel column `domain` (`data.domains.prepare` adds it), and `max_steps` must be set: domains
    have no end. `folder` gets domains.json, written anew at each look at the validation sets (step, perplexity and r a
    domain, the rows drawn so far), and at the end a picture of it, domains.svg.

    Raises: ConfigError if the data or the training arguments do not suit.
    """
    trainer.add_callback(DomainMixing(trainer, reweighting, Path(folder) / FILE))


class DomainMixing(TrainerCallback, ExportableState):
    """Measures the domains' perplexities once an interval, moves r, and plans the rows of the next interval.

    All ranks compute the same from globally summed losses. A checkpoint's trainer_state.json holds `State`; nothing in
    it depends on the number of processes.
    """

    def __init__(self, trainer: DistillTrainer, reweighting: Reweighting, file: Path) -> None:
        check_arguments(trainer.args)
        _check_models(trainer, reweighting)
        self.trainer, self.reweighting, self.file = trainer, reweighting, file
        self.names = _names(trainer)
        reweighting.check(self.names)
        self.rows = _count(trainer.train_dataset, self.names, "training")
        _count(trainer.eval_dataset, self.names, "validation")
        self.sets = _by_domain(trainer.eval_dataset, self.names)
        self.sampler = trainer.train_sampler = _sampler(trainer, len(self.names), reweighting.interval)
        self.now = State()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"args": {}, "attributes": asdict(self.now)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for the first time, or take up where the checkpoint stopped."""
        if state.global_step:
            self.now = _restored(state.stateful_callbacks.get(type(self).__name__), self.rows)
        else:
            teacher = self._perplexities("teacher", self._teacher_nll) if self.trainer.teacher is not None else {}
            self.now = State(drawn=dict.fromkeys(self.names, 0), teacher=teacher)
            student = self._perplexities("student", self._student_nll)
            self.now.r = self.reweighting.start(self.rows, student, teacher)
            self._note(state.global_step, student, self.now.r)
        self._plan()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where an interval has ended: move r and plan the next one."""
        if state.global_step // self.reweighting.interval == self.now.interval:
            return
        student = self._perplexities("student", self._student_nll)
        drawn = self._drawn(None)
        r = self.reweighting.update(self.now.r, student, self.now.teacher)
        self.now = State(self.now.interval + 1, r, drawn, self.now.teacher, self.now.looks)
        self._note(state.global_step, student, r)
        self._plan()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A last look at a training that came to its end."""
        if state.global_step >= state.max_steps:
            self._note(state.global_step, self._perplexities("student", self._student_nll), None)
            if args.should_save:
                _draw(self.file)

    def _plan(self) -> None:
        first = self.now.interval == 0
        shares = self.reweighting.first_draw(self.now.r, self.rows) if first else self.now.r
        weights, drawn = ([values[name] for name in self.names] for values in (shares, self.now.drawn))
        self.sampler.begin(self.now.interval, weights, drawn)  # type: ignore[arg-type]

    def _drawn(self, steps: int | None) -> dict[str, int]:
        """Rows of each domain that were drawn by `steps` steps into the interval, or by its end."""
        counts = self.sampler.counts(None if steps is None else steps * _rows_a_step(self.trainer.args))
        return {name: self.now.drawn[name] + count for name, count in zip(self.names, counts, strict=True)}

    def _note(self, step: int, student: Shares, r: Shares | None) -> None:
        """Keep a look, log it, and write the file."""
        drawn = self.now.drawn if r is not None else self._drawn(step - self.now.interval * self.reweighting.interval)
        self.now.looks.append({"step": step, "perplexity": student, "r": r, "rows_drawn": drawn})
        logs = {f"domain/{name}/perplexity": value for name, value in student.items()}
        self.trainer.log({**logs, **{f"domain/{name}/r": value for name, value in (r or {}).items()}})
        if self.trainer.args.should_save:
            content = {
                "interval": self.reweighting.interval,
                "rows": self.rows,
                "teacher_perplexity": self.now.teacher,
                "looks": self.now.looks,
            }
            partial = self.file.with_suffix(".partial")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            partial.replace(self.file)

    def _perplexities(self, who: str, nll: Callable[[dict[str, Tensor]], Tensor]) -> Shares:
        """exp of the mean over all tokens of a domain's validation set and over all ranks, a domain each."""
        hidden = self.trainer.args.disable_tqdm or not self.trainer.is_world_process_zero()
        found = {}
        for name, data in tqdm(self.sets.items(), f"{who}'s perplexity of domains", leave=False, disable=hidden):
            meter = Meter()
            with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
                for batch in self.trainer.get_eval_dataloader(data):
                    batch = self.trainer._prepare_inputs(batch)
                    with torch.no_grad(), self.trainer.accelerator.autocast():
                        meter.add({"nll": nll(batch), "tokens": (batch["labels"] != -100).sum()})  # type: ignore[arg-type]
            totals = meter.totals()
            mean = totals["nll"] / max(totals["tokens"], 1.0)
            if not math.isfinite(mean):
                raise TrainingError(
                    f"domain '{name}': the {who}'s loss on its validation set is {mean}; expected a finite number. "
                    "Lower train.learning_rate."
                )
            found[name] = math.exp(min(mean, 700.0))
        return found

    def _student_nll(self, batch: dict[str, Tensor]) -> Tensor:
        with self.trainer._eval_model() as model:
            model.eval()  # DeepSpeed's returns nothing
            return model(only_measure=True, **tensors_of(batch))["agreement.nll"]

    def _teacher_nll(self, batch: dict[str, Tensor]) -> Tensor:
        distiller, teacher = self.trainer.distiller, self.trainer.teacher
        rows, labels = teacher(batch, {Signal.LOGITS}, distiller.vocab_size).rows, row_labels(batch)  # type: ignore[misc]
        if isinstance(rows, TopKRows):
            return -rows.of_labels(labels).double().sum()
        of_label = look(lambda log_p, label: log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1), rows, labels)  # type: ignore[arg-type]
        return -of_label.double().sum()


def _draw(file: Path) -> None:
    try:
        plot_domains(file)
    except ConfigError as error:  # a picture is no reason to lose a run
        logger.warning("no picture of %s: %s", file, error)


def check_arguments(args: Any) -> None:
    """Raise a ConfigError if these TrainingArguments, or as many of them as are known, do not suit domains."""
    if args.max_steps <= 0:
        raise ConfigError("train.max_steps: got none; expected a number of steps: domains are sampled without end.")
    for name, reason in UNUSABLE.items():
        if getattr(args, name):
            raise ConfigError(f"train.{name}: got true; expected false with domains: {reason}. Remove it.")
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        raise ConfigError(
            f"train.train_sampling_strategy: got '{args.train_sampling_strategy}'; expected random or group_by_length: "
            "domains are sampled."
        )


def _check_models(trainer: DistillTrainer, reweighting: Reweighting) -> None:
    if reweighting.needs_teacher and trainer.teacher is None:
        raise ConfigError("reweighting: it compares student and teacher; expected a teacher, got none. Name one.")
    if trainer.distiller.adapter.unit != "token":
        raise ConfigError("reweighting: got a classifier; expected a causal LM, which has a perplexity.")


def _names(trainer: DistillTrainer) -> list[str]:
    """The domains' names, the same in both data sets."""
    found = []
    for what, data in (("train_dataset", trainer.train_dataset), ("eval_dataset", trainer.eval_dataset)):
        names = getattr(getattr(data, "features", {}).get(DOMAIN), "names", None)  # type: ignore[union-attr]
        if names is None:
            raise ConfigError(
                f"{what}: got none with a ClassLabel column '{DOMAIN}'; expected every row's domain. "
                "Use data.domains.prepare, or Dataset.class_encode_column."
            )
        found.append(list(names))
    if found[0] != found[1]:
        raise ConfigError(f"domains: got {found[0]} for training, {found[1]} for validation; expected the same.")
    if len(found[0]) < 2:
        raise ConfigError(
            f"reweighting: got one domain, '{found[0][0]}'; expected at least two. Name more, or remove reweighting."
        )
    return found[0]


def _count(data: Any, names: list[str], what: str) -> dict[str, int]:
    counts = dict(zip(names, np.bincount(data[DOMAIN], minlength=len(names)).tolist(), strict=True))
    for name, count in counts.items():
        if count == 0:
            raise ConfigError(f"domain '{name}': got no rows for {what}; expected at least one. Add some.")
    return counts


def _rows_a_step(args: Any) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _sampler(trainer: DistillTrainer, domains: int, interval: int) -> DomainSampler:
    args, data = trainer.args, trainer.train_dataset
    grouped = args.train_sampling_strategy == "group_by_length"
    return DomainSampler(
        data[DOMAIN],  # type: ignore[index]
        domains,
        interval * _rows_a_step(args),
        args.seed if args.data_seed is None else args.data_seed,
        data["length"] if grouped else None,  # type: ignore[index]
        _rows_a_step(args) if grouped else 0,
    )


def _by_domain(data: Any, names: list[str]) -> dict[str, Any]:
    numbers = np.asarray(data[DOMAIN])
    return {name: data.select(np.flatnonzero(numbers == i)) for i, name in enumerate(names)}


def _restored(saved: Mapping[str, Any] | None, rows: Mapping[str, int]) -> State:
    if saved is None:
        raise ConfigError(
            "--resume: the checkpoint is of a run without re-weighting; expected one with. Start a new run."
        )
    state = State(**saved["attributes"])
    if set(state.drawn) != set(rows):
        raise ConfigError(
            f"--resume: the run has the domains {', '.join(state.drawn)}; got {', '.join(rows)}. Use the data it began with."
        )
    for values in (state.r, state.drawn, state.teacher):  # the file has them sorted
        ordered = {name: values[name] for name in rows if name in values}
        values.clear()
        values.update(ordered)  # type: ignore[arg-type]
    return state
