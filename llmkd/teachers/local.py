"""A live teacher: a Hugging Face model in this process, in its checkpoint's dtype, frozen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from llmkd.adapters import Adapter, adapter_of, freeze
from llmkd.types import Batch, Outputs, Signal
from llmkd.weights import load_model, load_tokenizer, locate
from llmkd.zero3 import gathered, inference_engine


class LocalTeacher:
    """Runs its decoder once a batch, without gradients or dropout, outside the optimizer and the checkpoints.

    Under ZeRO-3 it is sharded over the ranks, with a config of its own; only its head is whole on every rank.

    Args:
        model: a causal LM or a sequence classifier; it is frozen and put into eval mode.
        tokenizer: its tokenizer, to compare vocabularies with the student's; None if unknown.
    """

    provides = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES, Signal.ATTENTIONS})

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.adapter = adapter_of(model)
        self.adapter.check(model)
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self.vocab_size = self.adapter.width(model)
        self._reader: nn.Module = _Reader(model, self.adapter)
        self._head: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
        """The teacher's supervised rows, and its hidden states and attentions if they are asked for."""
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            out = self._reader(batch=batch, needs=needs, vocab_size=vocab_size)
        if self._head:
            out.rows = out.rows.using([out.rows.hidden, *self._head])
        return out

    def prepare(self, accelerator: Any) -> None:
        """Move to the accelerator's device; under ZeRO-3, shard."""
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            self.model.to(accelerator.device)
            return
        head = list(self.adapter.head(self.model))
        with gathered(head):
            self._head = [parameter.detach().to(accelerator.device, copy=True) for parameter in head]
        dtype = next(iter(self._head or self.model.parameters())).dtype
        self._reader = inference_engine(self._reader, dtype, accelerator.num_processes)


class _Reader(nn.Module):
    """`read` as a module's forward: what ZeRO-3's hooks need."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, batch: Batch, needs: Collection[Signal], vocab_size: int | None) -> Outputs:
        return self.adapter.read(self.model, batch, needs, vocab_size)


def local(
    *,
    path: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LocalTeacher:
    """p = softmax(teacher(x)): a model from the Hub, a folder, a GGUF file or `pkg://package/file.gguf`, run live.

    Args:
        path, gguf_file, revision: see `weights.locate`.
        dtype: `auto` keeps the checkpoint's dtype.
        attn_implementation: transformers' attention backend; None lets it choose.
        trust_remote_code: run code that the model's repository carries.

    Reference: Hinton et al. 2015, arXiv 1503.02531.
    """
    source = locate(path, gguf_file, revision)
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = load_model(source, dtype, trust_remote_code, **extra)
    return LocalTeacher(model, load_tokenizer(source, trust_remote_code))
