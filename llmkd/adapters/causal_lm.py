"""Read a causal language model: one decoder pass, next-token rows of the supervised positions, never [B, T, V]."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llmkd.errors import ConfigError
from llmkd.rows import HeadRows
from llmkd.types import Batch, Outputs, Signal, supervised_rows

DIVIDES = {"granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa", "granitemoe_swa"}


def read(model: nn.Module, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
    """Run the decoder once and show what is asked for.

    Args:
        model: a Hugging Face causal LM, or its PEFT wrapper; the head is not run here.
        batch: input_ids [B, T], labels [B, T], and attention_mask or (packed) position_ids.
        needs: hidden_states and attentions are returned only if named here.
        vocab_size: columns of the head to keep (the tokenizer's), or None for all.

    Returns:
        Outputs with `rows`: HeadRows of the N supervised positions, in batch order.
    """
    base = unwrap(model)
    decoder = base.get_decoder()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        inputs.pop("position_ids", None)
    wanted = {f"output_{signal}": True for signal in (Signal.HIDDEN_STATES, Signal.ATTENTIONS) if signal in needs}
    out = decoder(**inputs, use_cache=False, return_dict=True, **wanted)
    hidden = out.last_hidden_state.flatten(0, 1).index_select(0, supervised_rows(batch))
    scale, softcap = head_settings(base.config)
    rows = HeadRows(hidden, head_of(base), scale=scale, softcap=softcap, vocab_size=vocab_size)
    return Outputs(rows=rows, hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def head_of(base: Any) -> Any:
    """The output head, as something with `.weight` and `.bias`: the active copy or low-rank sum under PEFT."""
    head = base.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        return head.modules_to_save[head.active_adapters[0]]
    if hasattr(head, "get_delta_weight"):
        weight = head.base_layer.weight + sum(head.get_delta_weight(name) for name in head.active_adapters)
        return SimpleNamespace(weight=weight, bias=head.base_layer.bias)
    return head


def head_settings(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap) that the model applies after its head: Cohere, Granite, Falcon-H1 and Gemma kinds."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    scaling = getattr(text, "logits_scaling", None) or 1.0
    factors = (getattr(text, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier"))
    scale = 1.0 / scaling if text.model_type in DIVIDES else scaling
    for factor in factors:
        scale *= factor
    return float(scale), float(softcap) if softcap else None


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare `read` with the model's own logits on three tokens, so that no head is ever read wrongly in silence.

    Raises:
        ConfigError: they differ (an architecture that does more after its head than llmkd knows of).
    """
    base = unwrap(model)
    weight = base.get_output_embeddings().weight
    if weight.device.type == "meta" or weight.numel() == 0 or type(weight.data).__name__ == "DTensor":
        return  # nothing to compare: no weights, or only a shard of them
    was_training = model.training
    model.eval()
    input_ids = torch.arange(1, 4, device=weight.device).unsqueeze(0)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    rows = read(model, batch, ()).rows
    ours = rows.using(rows.tensors()).logits(slice(0, 2))  # type: ignore[union-attr]
    theirs = model(input_ids=input_ids).logits[0, :2]
    model.train(was_training)
    gap, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if gap > 0.03 * size:
        raise ConfigError(
            f"model type '{base.config.model_type}': logits differ by {gap:.3g} of {size:.3g} from the model's own; "
            "its head does more than scale, soft-cap and bias. Please open an issue with the model's name."
        )


def vocabulary(model: nn.Module) -> int:
    """The width of the head, padding rows included."""
    return unwrap(model).config.get_text_config().vocab_size


def freeze(model: nn.Module) -> nn.Module:
    """Switch off gradients and dropout."""
    model.requires_grad_(False)
    return model.eval()
