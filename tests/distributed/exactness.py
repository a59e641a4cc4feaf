"""One global batch for every framework: the cases, how to run one of them, and what to remember of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments

from llmkd import DistillTrainer, Mix, TokenDistill
from llmkd.data import Collator
from llmkd.divergences import DACKL, Standardised
from llmkd.objectives import OFA, Objective, SinKD, SpanLoss
from llmkd.schedules import Linear
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model
from llmkd.types import Batch, Loss, Outputs, Signal, supervised_rows

STEPS, BATCH, RESUME_AT = 5, 8, 2
STUDENT_SIZE, TEACHER_SIZE = 32, 48
EXPORT, MERGED, WEIGHTS, REPORT = "student", "merged", "weights.safetensors", "report.json"


@dataclass(frozen=True)
class Case:
    """What a run trains; `accumulation` micro-batches a step on each of two processes."""

    name: str
    objective: str = "tokens"
    tied: bool = False
    lora: bool = False
    empty: bool = False
    adamw: bool = False
    max_grad_norm: float = 0.0
    accumulation: int = 1
    evaluate: bool = False
    resume: bool = False


CASES = (
    Case("projector", "projected", accumulation=2, evaluate=True),
    Case("tied_clipped", "projected", tied=True, max_grad_norm=0.5),
    Case("adamw", "projected", adamw=True, max_grad_norm=0.5, accumulation=2, resume=True),
    Case("empty_rank", "projected", empty=True),
    Case("empty_rank_tied", empty=True, tied=True, accumulation=2),
    Case("learned", "learned", accumulation=2),
    Case("modules", "modules", empty=True),
    Case("coupled", "coupled", tied=True, empty=True),
    Case("lora", lora=True, tied=True, adamw=True, accumulation=2, resume=True),
)


def plain_reverse_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(q || p), nats, without a closed-form gradient: the driver has to use autograd."""
    return (log_s.exp() * (log_s - log_t)).sum(-1)


class Temper(nn.Module):
    """A divergence with a parameter of its own: KL(p || q) with the teacher's log-probabilities scaled by it."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([0.5]))  # FSDP2 and ZeRO-3 cannot shard a scalar

    def forward(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """[n, k], [n, k] -> [n] nats."""
        log_p = (log_t * self.power).log_softmax(-1)
        return (log_p.exp() * (log_p - log_s)).sum(-1)


class Projected(Objective):
    """Token distillation and the squared error of projected last hidden states, on the supervised rows."""

    needs = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES})

    def __init__(self) -> None:
        super().__init__()
        self.tokens = tokens()
        self.projector = nn.Linear(STUDENT_SIZE, TEACHER_SIZE)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        """Sums over the batch's supervised rows."""
        loss = self.tokens(student, teacher, batch)
        mine, theirs = (_last(outputs, batch) for outputs in (student, teacher))
        error = (self.projector(mine) - theirs).square().mean(-1).sum()
        return {**loss, "total": loss["total"] + 0.3 * error, "hidden": error.detach()}


def tokens() -> Mix:
    """A divergence with a closed-form gradient, and one without."""
    return Mix([TokenDistill("forward_kl"), TokenDistill(plain_reverse_kl, temperature=2.0)], weights=[1.0, 0.5])


def modules() -> Mix:
    """Divergences that are modules, with parameters and without, under policies; a loss that reads the label."""
    parts = [TokenDistill(Standardised(), policy="entropy_balance"), TokenDistill(Temper(), policy="reciprocal_rank")]
    return Mix([*parts, OFA()], weights=[Linear(1.0, 0.5), 1.0, 0.5])


def coupled() -> Mix:
    """Losses that look at several rows at once, within a sequence, and DAC-KL, whose network learns."""
    sinkd = SinKD(granularity="sequence", top_k=512)
    return Mix([sinkd, SpanLoss(top_k=8), TokenDistill(DACKL(top_k=8))], weights=[0.1, 1.0, 1.0])


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "tokens": tokens,
    "projected": Projected,
    "learned": lambda: TokenDistill(Temper()),
    "modules": modules,
    "coupled": coupled,
}


def _last(outputs: Outputs | None, batch: Batch) -> Tensor:
    assert outputs is not None
    assert outputs.hidden_states is not None
    return outputs.hidden_states[-1].flatten(0, 1).index_select(0, supervised_rows(batch))


def write_models(folder: Path) -> None:
    """Random models with logits that differ enough to train on: a teacher, an untied and a tied student."""
    for index, (name, tied, size) in enumerate(_MODELS):
        torch.manual_seed(index)
        config = tiny_config(hidden_size=size, tie_word_embeddings=tied, initializer_range=0.2)
        tiny_model(config).save_pretrained(folder / name)


_MODELS = (("teacher", False, TEACHER_SIZE), ("untied", False, STUDENT_SIZE), ("tied", True, STUDENT_SIZE))


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences of 6 to 20 random tokens in spans of three; the first third of each is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 21, (count,), generator=generator).tolist()
    texts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [
        {
            "input_ids": ids,
            "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :],
            "spans": [1 + place // 3 for place in range(len(ids))],
        }
        for ids in texts
    ]


def train_rows(case: Case) -> Dataset:
    """40 sequences; in `empty` cases rank 1 of two sees no label in step 2, rank 0 none in step 4."""
    data = rows(STEPS * BATCH, seed=1)
    if case.empty:
        micro = BATCH // 2 // case.accumulation
        for step, rank in ((1, 1), (3, 0)):
            for index in range(BATCH):
                if index // micro % 2 == rank:
                    row = data[step * BATCH + index]
                    row["labels"] = [-100] * len(row["labels"])
    return Dataset.from_list(data)


def trainer(
    case: Case, models: Path, output: Path, collate: dict[str, Any] | None = None, **train: Any
) -> DistillTrainer:
    """The case's trainer, its models loaded from the disk as a run would; `train` are further TrainingArguments."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 2,
        "max_steps": STEPS,
        "optim": "adamw_torch" if case.adamw else "sgd",
        "learning_rate": 0.02 if case.adamw else 0.2,
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": case.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **train,
    }
    args = TrainingArguments(**settings)  # first: it tells transformers how ZeRO-3 shards what is loaded next
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return DistillTrainer(
        model=_load(models / ("tied" if case.tied else "untied")),
        teacher=_load(models / "teacher"),
        objective=OBJECTIVES[case.objective](),
        args=args,
        train_dataset=train_rows(case),
        eval_dataset=Dataset.from_list(rows(11, seed=2)),
        processing_class=tokenizer,
        peft_config=lora if case.lora else None,
        data_collator=Collator(0, **(collate or {})),
    )


def _load(path: Path) -> Any:
    from llmkd.students.pretrained import pretrained

    return pretrained(path=str(path))


def run(case: Case, models: Path, output: Path, collate: dict[str, Any] | None = None, **train: Any) -> None:
    """Train and write what is compared: losses, gradient norms, evaluations, weights, the exported student."""
    saving = {"save_strategy": "steps", "save_steps": RESUME_AT} if case.resume else {}
    made = trainer(case, models, output / "run", collate, **saving, **train)
    report: dict[str, Any] = {"framework": framework(made)}
    if case.evaluate and not made.is_fsdp_enabled:
        report["before"] = evaluation(made)
    made.train()
    report["steps"] = history(made)
    if case.evaluate:
        report["after"] = evaluation(made)
    write_weights(made, output / WEIGHTS)
    made.save_student(str(output / EXPORT))
    if case.lora:
        made.save_student(str(output / MERGED), merge=True)
    if made.args.should_save:
        (output / REPORT).write_text(json.dumps(report))


def resume(case: Case, models: Path, output: Path, **train: Any) -> None:
    """Go on from the checkpoint at step 2 of the run in `output`."""
    made = trainer(case, models, output / "resumed_run", **train)
    made.train(resume_from_checkpoint=str(output / "run" / f"checkpoint-{RESUME_AT}"))
    (output / "resumed").mkdir(exist_ok=True)
    write_weights(made, output / "resumed" / WEIGHTS)
    if made.args.should_save:
        (output / "resumed" / REPORT).write_text(json.dumps({"steps": history(made)}))


def framework(made: DistillTrainer) -> str:
    """What really wraps the model."""
    plugin = getattr(made.accelerator.state, "deepspeed_plugin", None)
    return f"zero{plugin.zero_stage}" if plugin is not None else str(made.accelerator.distributed_type.value)


def history(made: DistillTrainer) -> list[dict[str, float]]:
    """Loss, gradient norm and the objective's own means of every step."""
    unstable = {"epoch", "tokens_per_second", "learning_rate"}
    entries = [entry for entry in made.state.log_history if "grad_norm" in entry]
    return [{name: value for name, value in entry.items() if name not in unstable} for entry in entries]


def evaluation(made: DistillTrainer) -> dict[str, float]:
    """The numbers of `evaluate` that do not depend on the machine."""
    names = ("kl", "top1_agreement", "perplexity", "teacher_perplexity", "bits_per_byte", "loss", "forward_kl")
    metrics = made.evaluate()
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def write_weights(made: DistillTrainer, file: Path) -> None:
    """Student and objective, gathered from all ranks."""
    state: Any = made.accelerator.get_state_dict(made.model_wrapped)
    if made.args.should_save:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, file)
