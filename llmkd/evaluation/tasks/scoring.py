"""The functions that the task files beside this name: AIME's prompt and answers, STS-B's score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkd.errors import need

PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
INSTALL = "pip install 'llmkd[evaluate]'"


def aime_prompt(doc: Mapping[str, Any]) -> str:
    """The problem, and where the answer goes."""
    return PROMPT.format(problem=_field(doc, "problem"))


def aime_answer(doc: Mapping[str, Any]) -> str:
    """The answer, an integer from 0 to 999, without leading zeros."""
    return str(int(_field(doc, "answer")))


def aime_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """mean@n = share of right responses of the n to this problem; pass@n = 1 if any is right."""
    right = [is_right(response, aime_answer(doc)) for response in results[0]]
    return {"mean@n": sum(right) / len(right), "pass@n": float(any(right))}


def is_right(response: str, answer: str) -> bool:
    """Whether a response's final answer equals the known one: the last box if there is one, else its last expression."""
    verify = need("math_verify", INSTALL)
    last = response[max(response.rfind("\\boxed"), 0) :]  # several boxes are a set to math-verify
    return bool(verify.verify(verify.parse(f"${answer}$"), verify.parse(last)))


def every_response(responses: Iterable[list[str]], docs: Any) -> list[list[str]]:
    """All n responses of each problem, as one answer."""
    return list(responses)


def stsb_target(doc: Mapping[str, Any]) -> int:
    """The score rounded, 0 to 5."""
    return round(float(doc["label"]))


def stsb_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, float]]:
    """(known score, sum_k k p(k)), p = softmax of the log-likelihoods of "0" to "5"."""
    best = max(log_p for log_p, _ in results)
    shares = [math.exp(log_p - best) for log_p, _ in results]
    expected = sum(score * share for score, share in enumerate(shares)) / sum(shares)
    pair = (float(doc["label"]), expected)
    return {"pearson": pair, "spearman": pair}


def pearson(items: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation of known and expected scores; 0 where either is constant."""
    return _correlation("pearsonr", items)


def spearman(items: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation; 0 where either is constant."""
    return _correlation("spearmanr", items)


def _correlation(name: str, items: Sequence[tuple[float, float]]) -> float:
    known, expected = zip(*items, strict=True)
    if min(known) == max(known) or min(expected) == max(expected):
        return 0.0
    return float(getattr(need("scipy.stats", INSTALL), name)(known, expected).statistic)


def _field(doc: Mapping[str, Any], name: str) -> str:
    """A column, however it is capitalised."""
    return str(next(value for key, value in doc.items() if key.lower() == name))
