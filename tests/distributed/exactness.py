"""One global batch for every framework: how to run one of the cases, and what to remember of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import OBJECTIVES, STUDENT_SIZE, TEACHER_SIZE, Case
from datasets import ClassLabel, Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainingArguments

from llmkd import DistillTrainer
from llmkd.data import Collator, DataSpec, prepare
from llmkd.mixing import mix_domains
from llmkd.reweighting import DDK
from llmkd.stages.runner import prepare as prepare_stage
from llmkd.stages.runner import run as run_stage
from llmkd.students.tiny import byte_tokenizer, tiny_config, tiny_model
from llmkd.teachers import EMA, cached

STEPS, BATCH, RESUME_AT, INTERVAL = 5, 8, 2, 2
HELD_OUT, LENGTH, TEXTS = 11, 24, "texts.jsonl"
EXPORT, MERGED, WEIGHTS, REPORT = "student", "merged", "weights.safetensors", "report.json"


def write_models(folder: Path) -> None:
    """Random models with logits that differ enough to train on: a teacher, an untied and a tied student."""
    for index, (name, tied, size) in enumerate(_MODELS):
        torch.manual_seed(index)
        config = tiny_config(hidden_size=size, tie_word_embeddings=tied, initializer_range=0.2)
        tiny_model(config).save_pretrained(folder / name)
    byte_tokenizer().save_pretrained(folder / "teacher")
    _write_store(folder)


def _write_store(folder: Path) -> None:
    """Texts, and the teacher's hidden states of them."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(6, 21, (STEPS * BATCH + HELD_OUT,), generator=generator).tolist()
    texts = ["".join(map(chr, torch.randint(97, 123, (length,), generator=generator).tolist())) for length in lengths]
    (folder / TEXTS).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stage = {"name": "cache_teacher", "teacher": str(folder / "teacher"), "store": "hidden", "max_length": LENGTH}
    recipe = {"stage": stage, "data": {"path": str(folder / TEXTS)}, "output_dir": str(folder / "store")}
    run_stage(prepare_stage(recipe), lambda text: None)


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
    return _in_domains(data) if case.domains else Dataset.from_list(data)


def _in_domains(data: list[dict[str, list[int]]]) -> Dataset:
    """The rows dealt out to two domains, unevenly."""
    marked = [{**row, "domain": int(i % 4 == 0)} for i, row in enumerate(data)]
    return Dataset.from_list(marked).cast_column("domain", ClassLabel(names=["much", "little"]))


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
    if case.domains:
        settings["train_sampling_strategy"] = "random"
    args = TrainingArguments(**settings)  # first: it tells transformers how ZeRO-3 shards what is loaded next
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    train_dataset, held_out = train_rows(case), Dataset.from_list(rows(HELD_OUT, seed=2))
    if case.domains:
        held_out = _in_domains(rows(HELD_OUT, seed=2))
    if case.cached:
        samples = prepare(DataSpec(path=str(models / TEXTS), max_length=LENGTH), tokenizer).train
        train_dataset, held_out = samples.select(range(STEPS * BATCH)), samples.skip(STEPS * BATCH)
    made = DistillTrainer(
        model=_load(models / ("tied" if case.tied else "untied")),
        teacher=_teacher(case, models),
        objective=OBJECTIVES[case.objective](),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora if case.lora else None,
        data_collator=Collator(0, **(collate or {})),
    )
    if case.domains:
        mix_domains(made, DDK(interval=INTERVAL), output)
    return made


def _teacher(case: Case, models: Path) -> Any:
    if case.cached:
        return cached(path=str(models / "store"))
    return EMA(decay=0.5) if case.ema else _load(models / "teacher")


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
    report["steps"], report["looks"] = history(made), looks(made)
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
    unstable = {"epoch", "tokens_per_second", "seconds", "learning_rate"}
    entries = [entry for entry in made.state.log_history if "grad_norm" in entry]
    return [{name: value for name, value in entry.items() if name not in unstable} for entry in entries]


def looks(made: DistillTrainer) -> list[dict[str, float]]:
    """What a run with domains measured of them, and how it moved r."""
    entries = [entry for entry in made.state.log_history if any(name.startswith("domain/") for name in entry)]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


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
