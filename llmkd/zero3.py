"""DeepSpeed ZeRO-3, where a model's weights are spread over ranks from the moment they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are ZeRO-3 shards."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def size(parameter: Tensor) -> int:
    """Elements of a parameter, all shards together."""
    return getattr(parameter, "ds_numel", parameter.numel())


def gathered(parameters: Iterable[Tensor], write: bool = False) -> Any:
    """A block in which sharded parameters are whole on every rank; call it on all ranks. A no-op otherwise.

    Args:
        write: keep what the block changes, as rank 0 has it; without it changes are lost.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


@contextmanager
def whole_models() -> Iterator[None]:
    """A block in which transformers builds models with whole weights, even under ZeRO-3."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def announce(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Tell ZeRO-3, once, that `module` uses parameters of another module: it gathers them around its forward."""
    known = getattr(module, "_external_params", {})
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and id(parameter) not in known:
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


def take_in(owner: nn.Module, inner: nn.Module) -> None:
    """Let `owner` gather the parameters of `inner`, a module that it calls a different number of times on each rank.

    The hooks of `inner` would fetch at every call, and ranks would wait for each other for ever. A module without
    parameters has such hooks, too: they fetch ahead for the modules after it.
    """
    for module in inner.modules():
        if hasattr(module, "ds_id"):  # DeepSpeed's mark on a module with its hooks
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    announce(owner, inner.parameters())


def inference_engine(module: nn.Module, dtype: torch.dtype, world_size: int) -> nn.Module:
    """Shard a frozen module with a ZeRO-3 config of its own, in its own dtype, without an optimizer."""
    import deepspeed

    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine = deepspeed.initialize(model=module, config=config)[0]
    engine.eval()  # DeepSpeed's returns nothing
    return engine


@contextmanager
def inferring(module: nn.Module, dtype: torch.dtype, world_size: int) -> Iterator[nn.Module]:
    """A block in which a module runs as such an engine. Its weights stay sharded afterwards; its hooks are gone."""
    engine = inference_engine(module, dtype, world_size)
    try:
        yield engine
    finally:
        engine.destroy()  # type: ignore[operator]
