"""Processes: set up gloo where there is no accelerator, and reduce sums over ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


def start_processes(train: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments needs where there is no accelerator; for DeepSpeed, joins the launcher over gloo.

    On a CPU accelerate finds gloo if it is told `use_cpu`, which turns DeepSpeed off, silently. For DeepSpeed the state
    is therefore made first, and `use_configured_state` keeps it. Call it before TrainingArguments are made.

    Args:
        train: the TrainingArguments asked for.

    Returns:
        Arguments that win over them; {} where there is an accelerator.
    """
    if torch.accelerator.is_available():
        return {}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = train.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not deepspeed:
        if is_main() and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            logger.warning("accelerate has no FSDP on a CPU: these processes run as DDP, with the same result")
        return {"use_cpu": True}
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    kept = {"accelerator_config": {**(train.get("accelerator_config") or {}), "use_configured_state": True}}
    return {**kept, "use_cpu": True}  # harmless to a state that is made, and bf16 is refused without it


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; itself in a lone process."""
    return _reduced(values, dist.ReduceOp.SUM)


def min_over_ranks(values: Tensor) -> Tensor:
    """The smallest of a tensor over all ranks; itself in a lone process."""
    return _reduced(values, dist.ReduceOp.MIN)


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0
