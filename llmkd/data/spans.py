"""Phrases of a text, and which tokens lie in them: what the span loss compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from trl.data_utils import common_prefix_length

from llmkd.errors import ConfigError, DataError, need

Span = tuple[int, int]

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
FUNCTION_WORDS = """
a an the this that these those some any no each every either neither and or but nor so yet if then than because
while although though when where whether as of in on at by for with from to into onto over under about after before
between through during without within against i you he she it we they me him her us them my your his its our their
who whom whose which what is are was were be been being am do does did have has had will would shall should can
could may might must not there
"""
_FUNCTION_WORDS = frozenset(FUNCTION_WORDS.split())
PHRASES = r"""
NP: {<DT|PRP\$>?<JJ.*>*<NN.*>+}
PP: {<IN|TO><NP>}
VP: {<MD>?<RB.*>*<VB.*>+<RB.*>*}
"""


def punctuation(text: str) -> list[Span]:
    """Runs of words between punctuation, line ends and (English) function words; no package is needed."""
    spans: list[Span] = []
    open_end = -1  # where the last word ended, if a run may go on
    for word in WORD.finditer(text):
        if word.group().lower() in _FUNCTION_WORDS:
            open_end = -1
        elif open_end >= 0 and not text[open_end : word.start()].strip(" "):
            spans[-1], open_end = (spans[-1][0], word.end()), word.end()
        else:
            spans.append(word.span())
            open_end = word.end()
    return spans


def spacy(text: str) -> list[Span]:
    """spaCy's noun chunks, by its small English model."""
    return [(chunk.start_char, chunk.end_char) for chunk in _spacy_model()(text).noun_chunks]


@cache
def _spacy_model() -> Any:
    package = need("spacy", "pip install 'llmkd[spans]'")
    try:
        return package.load("en_core_web_sm")
    except OSError as error:
        raise ConfigError(
            "data.spans: got 'spacy' without its model; expected en_core_web_sm. Run: python -m spacy download "
            "en_core_web_sm"
        ) from error


def nltk(text: str) -> list[Span]:
    """Noun, prepositional and verb phrases by NLTK's tagger and a small grammar (`PHRASES`)."""
    package: Any = need("nltk", "pip install 'llmkd[spans]'")
    words = [match.span() for match in re.finditer(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text)]
    try:
        tagged = package.pos_tag([text[start:end] for start, end in words])
    except LookupError as error:
        raise ConfigError(
            "data.spans: got 'nltk' without its tagger; expected its data. Run: python -m nltk.downloader "
            "averaged_perceptron_tagger_eng"
        ) from error
    spans, at = [], 0
    for node in package.RegexpParser(PHRASES).parse(tagged):
        width = 1 if isinstance(node, tuple) else len(node.leaves())
        if not isinstance(node, tuple):
            spans.append((words[at][0], words[at + width - 1][1]))
        at += width
    return spans


CHUNKERS: dict[str, Callable[[str], list[Span]]] = {"punctuation": punctuation, "spacy": spacy, "nltk": nltk}


def mark(ids: Sequence[int], tokenizer: Any, chunker: str) -> list[int]:
    """The number of the span that each token lies in, [T], from 1; 0 outside of all.

    The ids are written out and read again, which gives the place of each token in the text. Where the tokenizer reads
    other ids than it wrote, between the first and the last difference, tokens are in no span.

    Raises:
        DataError: the tokenizer is a slow one and knows no places. ConfigError: the chunker's package is missing.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"data.spans: got {type(tokenizer).__name__}, which does not tell where tokens lie in a text; expected a fast "
            "tokenizer. Use one, or remove data.spans."
        )
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = _align(list(ids), again["input_ids"], again["offset_mapping"])
    spans = CHUNKERS[chunker](text)
    inside, number = [], 0
    for place in places:
        start, end = _bare(text, *place)
        while number < len(spans) and spans[number][1] < end:
            number += 1
        within = start < end and number < len(spans) and spans[number][0] <= start
        inside.append(number + 1 if within else 0)
    return inside


def _align(ids: list[int], again: list[int], places: list[Span]) -> list[Span]:
    """The places of `ids`, from those of `again`: equal at the start and at the end, and (0, 0) between."""
    head = common_prefix_length(ids, again)
    tail = min(common_prefix_length(ids[::-1], again[::-1]), min(len(ids), len(again)) - head)
    lost = [(0, 0)] * (len(ids) - head - tail)
    return [*places[:head], *lost, *places[len(places) - tail :]]


def _bare(text: str, start: int, end: int) -> Span:
    """A token's place without the blanks that it begins or ends with."""
    piece = text[start:end]
    return end - len(piece.lstrip()), start + len(piece.rstrip())
