"""Read a causal language model: one decoder pass, next-token rows of the supervised positions, never [B, T, V]."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.adapters.base import Adapter, unwrap
from llmkd.agreement import measure, summary
from llmkd.errors import ConfigError
from llmkd.rows import HeadRows
from llmkd.types import Batch, Kind, Outputs, Signal, supervised_rows
from llmkd.vocabulary import common_columns

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
    if not _takes_positions(decoder):
        inputs.pop("position_ids", None)
    wanted = {f"output_{signal}": True for signal in (Signal.HIDDEN_STATES, Signal.ATTENTIONS) if signal in needs}
    out = decoder(**inputs, use_cache=False, return_dict=True, **wanted)
    hidden = out.last_hidden_state.flatten(0, 1).index_select(0, supervised_rows(batch))
    scale, softcap = head_settings(base.config)
    rows = HeadRows(hidden, head_of(base), scale=scale, softcap=softcap, vocab_size=vocab_size)
    return Outputs(rows=rows, hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))


def head_of(base: Any) -> Any:
    """The output head, as something with `.weight` and `.bias`: the active copy or low-rank sum under PEFT."""
    head = base.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        return head.modules_to_save[head.active_adapters[0]]
    if hasattr(head, "base_layer"):
        _check_low_rank(head)
        weight = head.base_layer.weight + sum(head.get_delta_weight(name) for name in head.active_adapters)
        return SimpleNamespace(weight=weight, bias=head.base_layer.bias)
    return head


def _check_low_rank(head: Any) -> None:
    """Raise a ConfigError unless the head's adapters are sums of its weight and a low-rank product, nothing more."""
    for name in head.active_adapters:
        plain = name in getattr(head, "lora_A", ()) and not head.lora_variant.get(name) and not head.lora_bias[name]
        if not plain or isinstance(head.lora_dropout[name], nn.Dropout):
            raise ConfigError(
                f"peft: got {type(head).__name__} on the output head, not a plain low-rank sum; expected LoRA without "
                "DoRA, bias and dropout there. Take lm_head out of target_modules, or train it whole with "
                "modules_to_save: [lm_head]."
            )


def head_settings(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap) that the model applies after its head: Cohere, Granite, Falcon-H1 and Gemma kinds."""
    text = config.get_text_config()
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((getattr(text, name) for name in caps if getattr(text, name, None)), None)
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
    if not _has_weights(base):
        return
    weight = base.get_output_embeddings().weight
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


@torch.no_grad()
def check_packing(model: nn.Module, batch_size: int) -> None:
    """Change the first of two packed documents and see that the second is read as before.

    Args:
        batch_size: rows that the model sees at once.

    Raises:
        ConfigError: the model would let packed documents see each other.
    """
    base = unwrap(model)
    decoder, kind, attention = base.get_decoder(), base.config.model_type, str(base.config._attn_implementation)
    if "flash" in attention and batch_size > 1:
        raise ConfigError(
            f"packing: got {batch_size} rows a batch with {attention}, which keeps packed documents apart in one row "
            "only. Set attn_implementation=sdpa, or per_device_train_batch_size=1 and per_device_eval_batch_size=1."
        )
    leaks = not _takes_positions(decoder)
    if not leaks and _has_weights(base) and "flash" not in attention:
        leaks = _leaks(model, decoder, batch_size)
    if leaks:
        raise ConfigError(
            f"packing: model type '{kind}' lets packed documents see each other ({attention} attention); "
            "expected documents that stay apart. Set data.packing=false."
        )


def _leaks(model: nn.Module, decoder: Any, batch_size: int) -> bool:
    """Whether the second of two packed documents depends on the first."""
    was_training = model.training
    model.eval()
    device = next(decoder.parameters()).device
    first = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [4, 3, 2, 1, 5, 6, 7, 8]], device=device)
    positions = torch.arange(4, device=device).repeat(min(batch_size, 2), 2)
    hidden = [
        decoder(input_ids=ids.expand_as(positions), position_ids=positions, use_cache=False).last_hidden_state[:, 4:]
        for ids in first
    ]
    model.train(was_training)
    noise = max(1e-4, 4 * torch.finfo(hidden[0].dtype).eps)  # experts see other batches, and sum in another order
    return bool((hidden[0] - hidden[1]).abs().max() > noise * hidden[0].abs().max())


def _takes_positions(decoder: Any) -> bool:
    return "position_ids" in inspect.signature(decoder.forward).parameters


def _has_weights(base: Any) -> bool:
    """Whether the weights are here: neither on the meta device nor only a shard of them."""
    weights = (base.get_input_embeddings().weight, base.get_output_embeddings().weight)  # PEFT may copy one, whole
    return not any(w.device.type == "meta" or w.numel() == 0 or type(w.data).__name__ == "DTensor" for w in weights)


def vocabulary(model: nn.Module) -> int:
    """The width of the head, padding rows included."""
    return unwrap(model).config.get_text_config().vocab_size


def columns(student: nn.Module, teacher: Any, tokenizer: Any) -> int | None:
    """`vocabulary.common_columns` of the two models; `teacher` is a Teacher or None."""
    size, theirs = (teacher.vocab_size, teacher.tokenizer) if teacher is not None else (None, None)
    return common_columns(vocabulary(student), size, tokenizer, theirs)


def head_parameters(model: nn.Module) -> list[Tensor]:
    """The output head's weight and bias."""
    return list(head_of(unwrap(model)).parameters())


CAUSAL_LM = Adapter(
    unit="token",
    rows=Kind.DISTRIBUTION,
    backbone=lambda model: unwrap(model).get_decoder(),
    read=read,
    check=check_head,
    check_packing=check_packing,
    width=vocabulary,
    columns=columns,
    head=head_parameters,
    measure=measure,
    summary=summary,
)
