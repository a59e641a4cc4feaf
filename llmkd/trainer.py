"""DistillTrainer: transformers' Trainer with a teacher and an objective. It knows no particular loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llmkd.adapters import adapter_of
from llmkd.callbacks import AfterStep, Follow, Interrupt, Progress, release
from llmkd.checkpoints import Checkpoints
from llmkd.data.collate import collator, pad_with_unsupervised
from llmkd.data.ids import DocumentCollator
from llmkd.data.sampler import EpochSampler
from llmkd.distiller import Distiller
from llmkd.distributed import min_over_ranks
from llmkd.errors import ConfigError, TrainingError
from llmkd.meters import Meter, passed
from llmkd.objectives.base import Objective
from llmkd.students import as_student
from llmkd.teachers import Teacher, as_teacher, check_data, check_needs, live_models, reads_documents
from llmkd.types import Outputs, Signal, tensors_of
from llmkd.versions import peak_memory_mb, warn_of_slow_bfloat16
from llmkd.weights import load_tokenizer, locate
from llmkd.zero3 import inferring


class DistillTrainer(Checkpoints, Trainer):
    """Distil `teacher` into `model` with any objective.

    loss = sum over supervised items of the accumulation window and of all ranks / their number: the same for any split
    into devices, accumulation steps and micro-batches, and any padding.

    Args:
        model: the student: a Hub name, a local path, a causal LM or a sequence classifier (its PEFT wrapper, too).
        teacher: a Hub name, a local path, a model of that kind, or any `Teacher`; None for objectives that need none.
        objective: what to minimise, such as `Mix([TokenDistill("forward_kl"), CrossEntropy()], weights=[1.0, 0.1])`.
        args: transformers.TrainingArguments, as they are.
        train_dataset, eval_dataset: tokenised rows with `input_ids` and `labels` (see `llmkd.data.prepare`); a
            classifier's have one `label`, -100 where it is not known.
        processing_class: the tokenizer; it decides which columns of the heads are tokens.
        peft_config: train a LoRA (or other PEFT) adapter of the student instead of all weights.
        data_collator: default `data.collate.collator`. callbacks, optimizers: as in Trainer.

    Raises:
        ConfigError: the objective needs what the teacher does not provide, or the tokenizers differ.
    """

    loss_is_scaled_for_ga = True  # read by Trainer: compute_loss divides by the count of the whole window

    def __init__(
        self,
        model: str | nn.Module,
        teacher: str | nn.Module | Teacher | None = None,
        objective: Objective | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        data_collator: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if objective is None:
            raise ConfigError("objective: got None; expected an Objective, such as TokenDistill('forward_kl').")
        args = _checked(args or TrainingArguments(output_dir="distilled"))
        student, processing_class = _student(model, processing_class)
        self.teacher = as_teacher(teacher)
        check_needs(objective, self.teacher)
        adapter = adapter_of(student)
        columns = adapter.columns(student, self.teacher, processing_class)
        if peft_config is not None:
            student = get_peft_model(student, peft_config)  # type: ignore[arg-type]
        adapter.check(student)
        self.distiller = Distiller(student, objective, columns)
        super().__init__(
            model=self.distiller,
            args=args,
            data_collator=data_collator or collator(adapter.unit, processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.torch_compile:
            self.distiller.compile_backbone(args, self.accelerator)
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator)
        check_data(self.teacher, train_dataset, *_each(eval_dataset))
        if getattr(self.data_collator, "packing", False):
            self._check_packing()
        if reads_documents(self.teacher) and not isinstance(self.data_collator, DocumentCollator):
            self.data_collator = DocumentCollator(self.data_collator)
        self._train_meter, self._step_meter, self._bad_step = Meter(), Meter(), torch.tensor(torch.inf)
        self._last_log, self.interrupt = time.perf_counter(), Interrupt()
        self.train_sampler: Sampler | None = None  # of rows, instead of the default order; see `mixing`
        for callback in (self.interrupt, Follow(self), *([AfterStep(self)] if objective.watches_steps else [])):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress)

    def _check_packing(self) -> None:
        rows = max(self.args.train_batch_size, self.args.eval_batch_size)
        for model in (self.distiller.student, *live_models(self.teacher)):
            adapter_of(model).check_packing(model, rows)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; however it ends, the bar is closed and Ctrl-C is Python's again."""
        self._last_log = time.perf_counter()
        try:
            return super().train(*args, **kwargs)
        finally:
            release(self.callback_handler.callbacks)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's sum over the window's global item count: the only division by a count there is."""
        needs = self.distiller.objective.needs
        loss = model(teacher=self._signals(inputs, needs) if needs else None, **tensors_of(inputs))
        items = torch.as_tensor(num_items_in_batch, device=loss["total"].device)
        counts = {"items": (inputs["labels"] != -100).sum(), "tokens": _tokens(inputs)}
        sums = {name: value for name, value in loss.items() if name != "total"}
        self._train_meter.add({**sums, **counts})
        step = torch.where(loss["total"].detach().isfinite(), torch.inf, self.state.global_step + 1.0)
        self._bad_step = torch.minimum(self._bad_step.to(step.device), step)
        if self.distiller.objective.watches_steps:
            self._step_meter.add({**sums, "items": counts["items"]})
        mean = loss["total"] * (self.accelerator.num_processes / items.clamp(min=1))
        return (mean, loss) if return_outputs else mean

    def step_means(self) -> dict[str, float]:
        """Means of the optimizer step that just ended, over all ranks."""
        return _means(self._step_meter.totals())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term's own mean, tokens/s, and tokens and seconds so far; stop if the loss is not finite."""
        tokens, seconds = 0.0, time.perf_counter() - self._last_log
        if "loss" in logs:
            self.stop_unless_finite()
            totals = self._train_meter.totals()
            tokens = totals.pop("tokens", 0.0)
            logs.update(_means(totals), tokens_per_second=round(tokens / max(seconds, 1e-9), 1))
            logs.update(self.distiller.objective.logs())
        self._last_log += seconds
        super().log({**logs, **passed(self.state.log_history, tokens, seconds)}, start_time)

    def stop_unless_finite(self) -> None:
        """Raise a TrainingError, on every rank, if the loss of any was NaN or infinite since the start."""
        step = min_over_ranks(self._bad_step).item()
        if step < float("inf"):
            kept = self.last_checkpoint() or "none yet"
            raise TrainingError(
                f"loss: not finite at step {int(step)}; expected a finite number. Lower train.learning_rate, or use "
                f"train.bf16 instead of fp16. Last good checkpoint: {kept}."
            )

    def _signals(self, inputs: dict[str, Tensor], needs: frozenset[Signal]) -> Outputs:
        return self.teacher(inputs, needs, self.distiller.vocab_size)  # type: ignore[misc]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation in order; ranks get equally many batches by rows without a supervised token, never by repeats."""
        own: Any = self.eval_dataset
        dataset = own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset or own
        if dataset is None:
            raise ConfigError("eval_dataset: got None; expected held-out data, such as data.held_out_every: 8.")
        padded: Any = pad_with_unsupervised(dataset, self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(padded)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The objective and the adapter's measures on fixed data: token-weighted over all ranks, deterministic."""
        meter, samples = Meter(), 0
        with self._eval_model() as model, torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            model.eval()
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                with torch.no_grad(), self.accelerator.autocast():
                    needs = self.distiller.objective.needs | {Signal.LOGITS}
                    loss = model(teacher=self._signals(batch, needs) if self.teacher else None, **tensors_of(batch))
                meter.add({**loss, **self._counts(batch)})
                samples += len(batch["labels"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = meter.totals()
        if not totals.get("items"):
            raise ConfigError("eval_dataset: it has no supervised token; expected at least one label that is not -100.")
        report = {**_report(totals, self.distiller.adapter.summary), "peak_memory_mb": peak_memory_mb()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in report.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)  # type: ignore[arg-type]

    def _counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = {"items": (batch["labels"] != -100).sum()}
        tokenizer: Any = self.processing_class
        if tokenizer is not None and self.distiller.adapter.unit == "token":
            texts = tokenizer.batch_decode([row[row != -100] for row in batch["labels"].cpu()])
            size = sum(len(text.encode()) for text in texts)
            counts["bytes"] = torch.tensor(size, device=counts["items"].device)
        return counts

    @contextmanager
    def _eval_model(self) -> Iterator[nn.Module]:
        """The model as training wraps it. Before that nothing stays wrapped, or training would not wrap it again."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        wrapped: Any = self.model_wrapped
        if wrapped is not self.model:
            yield wrapped
        elif plugin is not None and plugin.zero_stage == 3:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            with inferring(wrapped, dtype, self.args.world_size) as engine:
                yield engine
        elif self.is_fsdp_enabled:
            if not self.accelerator._models:
                raise ConfigError("evaluate: FSDP shards when training starts. Train first, or set eval_on_start.")
            yield wrapped
        else:
            yield wrapped.to(self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Shuffled, or length-grouped, from the seed and the epoch alone, so that a resumed run sees the same order."""
        if self.train_sampler is not None:
            return self.train_sampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        group = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps if strategy == "group_by_length" else 0
        )
        return EpochSampler(dataset, seed, group * self.args.world_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)


def _checked(args: TrainingArguments) -> TrainingArguments:
    if not args.average_tokens_across_devices:
        raise ConfigError(
            "train.average_tokens_across_devices: got false; expected true: the loss is a mean over all tokens."
        )
    if args.label_smoothing_factor:
        raise ConfigError("train.label_smoothing_factor has no effect on an objective. Remove it.")
    if args.bf16:
        warn_of_slow_bfloat16()
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False  # it reads the loss on the host each micro-step; `stop_unless_finite` says more
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    return args


def _student(model: str | nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    if isinstance(model, str) and tokenizer is None:
        tokenizer = load_tokenizer(locate(model))
    return as_student(model), tokenizer


def _each(datasets: Any) -> list[Any]:
    """One dataset, several by name, or none."""
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]


def _tokens(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())


def _means(totals: dict[str, float]) -> dict[str, float]:
    items = max(totals.pop("items", 0.0), 1.0)
    return {name: value / items for name, value in totals.items()}


def _report(totals: dict[str, float], summary: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Evaluation sums -> loss, every term's mean, and the summary of the adapter's measures."""
    size = totals.pop("bytes", 0.0)
    nll = {name: totals.get(f"agreement.{name}") for name in ("nll", "teacher_nll")}
    per_byte = {name: value / size for name, value in nll.items() if value is not None and size}
    means = _means(totals)
    close = {name.removeprefix("agreement."): means.pop(name) for name in list(means) if name.startswith("agreement.")}
    return {"loss": means.pop("total"), **means, **summary(close, per_byte)}
