"""Where student and teacher disagree: the first held-out samples, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkd.divergences.kl import forward_kl
from llmkd.rows import TopKRows
from llmkd.support import log_softmax, pair
from llmkd.types import Signal, supervised_rows

if TYPE_CHECKING:
    from llmkd.trainer import DistillTrainer

SAMPLES, TOKENS, BEST, CHUNK = 4, 256, 5, 64


@torch.no_grad()
def token_view(trainer: DistillTrainer) -> list[list[dict[str, Any]]] | None:
    """The first tokens of the first held-out samples, with what both models expected in their place.

    Returns:
        A list a sample, a dict a token: `text` and, where it was predicted, `kl` = KL(p || q) in nats and `teacher` and
        `student`: their five most likely tokens as [text, probability]. None without teacher or held-out text, for
        classifiers, where models are sharded, where the teacher's rows are draws or of another temperature than 1, and on
        ranks that write nothing.
    """
    dataset: Any = trainer.eval_dataset
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.teacher is None or dataset is None or sharded or not trainer.args.should_save:
        return None
    if not _tells_chances(trainer.teacher):
        return None
    if trainer.distiller.adapter.unit != "token" or trainer.processing_class is None:
        return None
    trainer.distiller.student.eval()
    return [_sample(trainer, dataset[i]) for i in range(min(SAMPLES, len(dataset)))]


def _tells_chances(teacher: Any) -> bool:
    """Whether the teacher's rows say how likely each of their tokens is."""
    return Signal.LOGITS in teacher.provides and getattr(teacher, "temperature", None) in (None, 1.0)


def _sample(trainer: DistillTrainer, example: dict[str, Any]) -> list[dict[str, Any]]:
    batch = trainer._prepare_inputs(trainer.data_collator([example]))
    distiller = trainer.distiller
    with trainer.accelerator.autocast():
        student: Any = distiller.adapter.read(distiller.student, batch, (), distiller.vocab_size).rows
        teacher: Any = trainer.teacher(batch, {Signal.LOGITS}, distiller.vocab_size).rows  # type: ignore[misc]
    tokenizer: Any = trainer.processing_class
    ids = batch["input_ids"][0, :TOKENS].tolist()
    tokens = [{"text": _text(tokenizer, token)} for token in ids]
    places = supervised_rows(batch) + 1
    count = int((places < len(ids)).sum())
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        for place, row in zip(places[rows].tolist(), _expected(student, teacher, rows), strict=True):
            kl, *lists = row
            named = [[[_text(tokenizer, token), probability] for token, probability in best] for best in lists]
            tokens[place] |= {"kl": kl, "teacher": named[0], "student": named[1]}
    return tokens


def _expected(student: Any, teacher: Any, rows: slice) -> list[tuple]:
    """Of each row: KL, and the teacher's and the student's best (id, probability)."""
    logits = student.logits(rows)
    log_t, log_s = pair(logits, teacher, rows)
    kl = [round(value, 4) for value in forward_kl(log_t, log_s).tolist()]
    ids = None
    if isinstance(teacher, TopKRows):
        ids = teacher.ids[rows]
        log_t = log_t[:, : ids.shape[-1]]
    return list(zip(kl, _best(log_t, ids), _best(log_softmax(logits)), strict=True))


def _best(log_p: Tensor, ids: Tensor | None = None) -> list[list[tuple[int, float]]]:
    """The best (id, probability) of each row; an id of -1 is no event."""
    top = log_p.topk(min(BEST, log_p.shape[-1]))
    found = (top.indices if ids is None else ids.gather(-1, top.indices)).tolist()
    pairs = (zip(row, chances, strict=True) for row, chances in zip(found, top.values.exp().tolist(), strict=True))
    return [[(token, round(chance, 4)) for token, chance in row if token >= 0] for row in pairs]


def _text(tokenizer: Any, token: int) -> str:
    """The token as text; as the tokenizer writes it where it is a part of a character."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
