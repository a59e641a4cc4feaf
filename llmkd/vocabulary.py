"""Two models of one tokenizer: which columns of their heads mean the same tokens."""

from __future__ import annotations

from typing import Any

from llmkd.errors import ConfigError

INSTEAD = "Use a teacher of the student's family, or train on text that the teacher wrote (objective: cross_entropy)"


def common_columns(student_size: int, teacher_size: int | None, tokenizer: Any, teacher_tokenizer: Any) -> int | None:
    """How many leading columns of both heads are real tokens; None for all of them.

    Heads of one family differ in padding rows (151936 against 152064 for 151665 tokens): both are cut to the
    tokenizer, whichever is wider, so padding has no probability and no gradient.

    Args:
        student_size, teacher_size: widths of the heads; None without a teacher.
        tokenizer, teacher_tokenizer: either may be None if unknown.

    Raises:
        ConfigError: the tokenizers differ (the first differing id is named), or a head is too small for them.
    """
    if tokenizer is not None and teacher_tokenizer is not None:
        same_tokens(tokenizer, teacher_tokenizer)
    sizes = [size for size in (student_size, teacher_size) if size is not None]
    if tokenizer is None:
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"vocabulary: the student has {student_size} columns, the teacher {teacher_size}; expected the same tokenizer. "
                "Pass processing_class (the tokenizer) so that padding rows can be told from tokens."
            )
        return None
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > min(sizes):
        if len(set(sizes)) == 1:
            return None  # the tokenizer knows tokens that neither model has: nothing to cut
        raise ConfigError(
            f"vocabulary: the tokenizer has {tokens} tokens, but the heads have {student_size} (student) and {teacher_size} "
            f"(teacher) columns; expected both to cover the tokenizer. {INSTEAD}."
        )
    return None if tokens == max(sizes) else tokens


def same_tokens(ours: Any, theirs: Any, instead: str = INSTEAD) -> None:
    """Raise a ConfigError, which names the first id that differs and what to do `instead`, unless two tokenizers are one."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine == other:
        return
    by_id, other_by_id = ({index: token for token, index in vocab.items()} for vocab in (mine, other))
    first = min(index for index in by_id.keys() | other_by_id.keys() if by_id.get(index) != other_by_id.get(index))
    raise ConfigError(
        f"tokenizers differ: id {first} is {by_id.get(first)!r} for the student and {other_by_id.get(first)!r} for the "
        f"teacher; expected the same token for every id. {instead}."
    )
