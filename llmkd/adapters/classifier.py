"""Read a sequence classifier, an encoder or a decoder: one row an example, with as many columns as there are classes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from llmkd.adapters.base import Adapter, unwrap
from llmkd.agreement import measure_classes, summary_of_classes
from llmkd.errors import ConfigError
from llmkd.rows import DenseRows
from llmkd.types import Batch, Kind, Outputs, Signal, supervised_rows
from llmkd.vocabulary import same_tokens

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def read(model: nn.Module, batch: Batch, needs: Collection[Signal], vocab_size: int | None = None) -> Outputs:
    """Run the classifier once and show what is asked for.

    Args:
        model: a Hugging Face `*ForSequenceClassification`, or its PEFT wrapper.
        batch: input_ids, attention_mask and, for models that take them, token_type_ids, position_ids [B, T]; labels [B],
            -100 for examples without one, which have no row.
        needs: hidden_states and attentions are returned only if named here. vocab_size: classes to keep, or None for all.

    Returns:
        Outputs with `rows`: DenseRows [N, classes] of the labelled examples, in batch order.
    """
    base = unwrap(model)
    takes = inspect.signature(base.forward).parameters
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch and name in takes}
    if "use_cache" in takes:
        inputs["use_cache"] = False
    wanted = {f"output_{signal}": True for signal in (Signal.HIDDEN_STATES, Signal.ATTENTIONS) if signal in needs}
    out = base(**inputs, return_dict=True, **wanted)
    logits = out.logits.index_select(0, supervised_rows(batch))
    rows = DenseRows(logits if vocab_size is None else logits[:, :vocab_size])
    return Outputs(rows=rows, hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))


def check(model: nn.Module) -> None:
    """Raise a ConfigError unless the model gives one class of several to each example of a padded batch."""
    config = unwrap(model).config
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ConfigError(
            f"model: got num_labels={config.num_labels} and problem_type={config.problem_type}; expected at least 2 classes "
            "of which one is right: several values or several labels at once have no softmax. Set num_labels=2 or more "
            "and no problem_type."
        )
    check_pad_token(model)


def check_pad_token(model: nn.Module) -> None:
    """Raise a ConfigError if a decoder cannot find the last token of a padded example."""
    config = unwrap(model).config
    if "use_cache" in inspect.signature(unwrap(model).forward).parameters and _pad_token(config) is None:
        raise ConfigError(
            f"model type '{config.model_type}': config.pad_token_id is None; expected the tokenizer's, by which it finds an "
            "example's last token. Set model.config.pad_token_id = tokenizer.pad_token_id."
        )


def check_packing(model: nn.Module, batch_size: int) -> None:
    """Raise a ConfigError: an example fills its row alone."""
    raise ConfigError("packing: got packed rows for a classifier; expected one example a row. Set data.packing=false.")


def width(model: nn.Module) -> int:
    """The number of classes."""
    return unwrap(model).config.num_labels


def columns(student: nn.Module, teacher: Any, tokenizer: Any) -> None:
    """Check that both models tell the same classes of the same tokens; all columns count.

    Raises:
        ConfigError: another number of classes, another order of the same class names, or other tokenizers.
    """
    if teacher is None:
        return
    if teacher.vocab_size not in (None, width(student)):
        raise ConfigError(
            f"classes: the student has {width(student)}, the teacher {teacher.vocab_size}; expected as many. "
            f"Set num_labels={teacher.vocab_size} for the student, or use another teacher."
        )
    if tokenizer is not None and teacher.tokenizer is not None:
        same_tokens(tokenizer, teacher.tokenizer, instead="Use a teacher of the student's family")
    ours, theirs = _names(student), _names(getattr(teacher, "model", None))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ConfigError(
            f"classes: the student's are {ours}, the teacher's {theirs}; expected the same order. "
            "Give the student the teacher's id2label and label2id, and labels in that order."
        )


def head(model: nn.Module) -> Iterable[Tensor]:
    """Nothing: the rows are logits already."""
    return ()


def _names(model: nn.Module | None) -> list[str]:
    """The names of the classes, in order; none where they are not known."""
    names = unwrap(model).config.id2label if model is not None else {}
    return [str(names[index]).lower() for index in sorted(names)]


def _pad_token(config: Any) -> int | None:
    return config.get_text_config().pad_token_id


CLASSIFIER = Adapter(
    unit="example",
    rows=Kind.DISTRIBUTION,
    backbone=unwrap,
    read=read,
    check=check,
    check_packing=check_packing,
    width=width,
    columns=columns,
    head=head,
    measure=measure_classes,
    summary=summary_of_classes,
)
