"""Conversations to token ids, with a mask of what the assistant says: its text and the token that ends its turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length

from llmkd.errors import DataError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatEncoder:
    """Renders and tokenises conversations with one template.

    `marked`: the template has `{% generation %}` markers that cover the end-of-turn token, so that it can tell what the
    assistant says; otherwise that is found from prefixes: template(messages[:i], generation prompt) must begin
    template(messages[:i+1]), which must begin template(messages).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    marked: bool

    def __call__(self, messages: Messages, first: int = 0, where: str = "messages") -> tuple[list[int], list[bool]]:
        """Return token ids [T] and a mask [T] of the assistant's turns among messages[first:].

        Raises: DataError if the template refuses the conversation or is not prefix-preserving.
        """
        if self.marked:
            return self._from_markers(messages, first, where)
        return self._from_prefixes(messages, first, where)

    def render(self, messages: Messages, where: str, prompt: bool = False) -> str:
        """Return the conversation as text; `prompt` adds the header of the assistant's next turn."""
        try:
            texts = self.tokenizer.apply_chat_template(
                [messages], chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise _refused(where, error) from error
        return str(texts[0])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        out: Any = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return out["input_ids"]

    def _from_markers(self, messages: Messages, first: int, where: str) -> tuple[list[int], list[bool]]:
        try:
            out: Any = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise _refused(where, error) from error
        ids, mask = list(out["input_ids"]), [bool(said) for said in out["assistant_masks"]]
        if first:
            prompt = self.render(messages[:first], where)
            if not self.render(messages, where).startswith(prompt):
                raise _not_prefix_preserving(where, first)
            start = common_prefix_length(ids, self._tokenize([prompt])[0])
            mask[:start] = [False] * start
        return ids, mask

    def _from_prefixes(self, messages: Messages, first: int, where: str) -> tuple[list[int], list[bool]]:
        whole = self.render(messages, where)
        texts = [whole]
        for i, message in enumerate(messages):
            if i < first or message["role"] != "assistant":
                continue
            before = self.render(messages[:i], where, prompt=True)
            after = self.render(messages[: i + 1], where)
            if not (after.startswith(before) and whole.startswith(after)):
                raise _not_prefix_preserving(where, i)
            texts += [before, after]
        ids, *parts = self._tokenize(texts)
        mask = [False] * len(ids)
        for before_ids, after_ids in zip(parts[::2], parts[1::2], strict=True):
            start, end = common_prefix_length(ids, before_ids), common_prefix_length(ids, after_ids)
            mask[start:end] = [True] * (end - start)
        return ids, mask


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """Choose the tokenizer's own template if it marks the assistant's turns, TRL's training variant of it, or prefixes.

    Raises: DataError if the tokenizer has no chat template.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        raise DataError(
            "messages: got a tokenizer without a chat template; expected one that has it. Use an instruct model's "
            "tokenizer, or data with text or prompt and completion strings."
        )
    if tokenizer.is_fast:  # reading markers needs character offsets
        if has_generation_markers(own) and is_chat_template_stop_token_trained(tokenizer, own):
            return ChatEncoder(tokenizer, own, marked=True)
        if variant := _training_variant(tokenizer):
            return ChatEncoder(tokenizer, variant, marked=True)
    return ChatEncoder(tokenizer, own, marked=False)


def check_messages(cell: Any, where: str) -> Messages:
    """Return the cell if it is a list of messages: a role, and content unless the message calls tools.

    Raises: DataError with the place and the value seen.
    """
    if not isinstance(cell, list):
        raise bad_cell(where, cell, "a list of messages {role, content}")
    for i, message in enumerate(cell):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_cell(f"{where}[{i}]", message, "a message {role: str, content: str}")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise bad_cell(f"{where}[{i}].content", content, "a string")
    return cell


def bad_cell(where: str, value: Any, expected: str) -> DataError:
    """Build the error for a cell of the wrong type."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return DataError(
        f"{where}: got {shown} ({type(value).__name__}); expected {expected}. Clean the row or fix data.columns."
    )


def _training_variant(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except (TemplateError, ValueError, TypeError):
        return None  # TRL does not know this template


def _refused(where: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(". ")
    return DataError(
        f"{where}: the chat template refuses this conversation ({reason}); expected roles in an order that it knows. "
        "Fix or drop the row."
    )


def _not_prefix_preserving(where: str, i: int) -> DataError:
    return DataError(
        f"{where}: the chat template renders the turns before message {i} differently once later turns follow; "
        "expected a prefix-preserving template, to tell what the assistant says. Set tokenizer.chat_template to one "
        "with {% generation %} markers."
    )
