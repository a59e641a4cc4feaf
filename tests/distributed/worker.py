"""Runs every case of one framework on the ranks of one launch: `worker.py FRAMEWORK MODELS OUTPUT [CASE ...]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from cases import CASES
from exactness import BATCH, resume, run

from llmkd.distributed import start_processes


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed config under which even the smallest parameter is sharded, and whole weights can be saved."""
    sharding: dict[str, Any] = {"stage": stage}
    if stage == 3:
        sharding |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(names, "auto"), "zero_allow_untested_optimizer": True, "zero_optimization": sharding}


FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
FRAMEWORKS: Mapping[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP},
    **{f"zero{stage}": {"deepspeed": zero(stage)} for stage in (1, 2, 3)},
}


def begin(framework: str) -> dict[str, Any]:
    """Join the process group as a run would; tells accelerate to use FSDP, which it does not do by itself on a CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = FRAMEWORKS[framework]
    if framework == "fsdp2":
        PartialState(cpu=True, backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return {**settings, "use_cpu": True, "accelerator_config": {"use_configured_state": True}}
    return {**settings, **start_processes(settings)}


def main(framework: str, models: Path, output: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        started = time.perf_counter()
        micro = BATCH // 2 // case.accumulation
        split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": case.accumulation}
        run(case, models, output / case.name, **split, **begin(framework))
        if case.resume:
            resume(case, models, output / case.name, **split, **begin(framework))
        print(f"{framework} {case.name}: {time.perf_counter() - started:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
