"""Several teachers' rows as one: their weighted average, or each row from one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkd.combined import MeanRows, RoutedRows
from llmkd.events import TopKRows
from llmkd.rows import look
from llmkd.support import name_all


def route(members: Sequence[Any], owner: np.ndarray) -> RoutedRows | TopKRows:
    """Rows [n] in the order of `owner` [n], which says whose each is; a member's own come in their order.

    Args:
        members: all dense, all top-k, or all drawn.
    """
    place = np.zeros(len(owner), dtype=np.int64)
    for number in range(len(members)):
        mine = owner == number
        place[mine] = np.arange(mine.sum())
    if not isinstance(members[0], TopKRows):
        return RoutedRows(members, owner, place)
    widths, vocab_size = [member.ids.shape[-1] for member in members if len(member)] or [1], members[0].vocab_size
    width = max(widths) + (max(widths) == vocab_size and min(widths) < vocab_size)  # K = V says that all rows have all
    starts = np.cumsum([0, *(len(member) for member in members)])
    order = torch.from_numpy(starts[owner] + place).to(members[0].ids.device)
    ids = torch.cat([_widened(member.ids, width, -1) for member in members]).index_select(0, order)
    log_probs = torch.cat([_widened(member.log_probs, width, -math.inf) for member in members]).index_select(0, order)
    tails = [member.drawn for member in members]
    drawn: Any = None if any(tail is None for tail in tails) else route(tails, owner)
    return TopKRows(ids, log_probs, vocab_size, members[0].temperature, members[0].sampled, drawn)


def _widened(values: Tensor, width: int, nothing: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=nothing)


def mix(members: Sequence[Any], weights: Sequence[float]) -> MeanRows | TopKRows:
    """sum_j w_j p_j on the finest events that all members have.

    Dense members have all V. Where there are top-k rows, these are the ids that every one of them names (its label is
    among them, if a store wrote it) and one tail; what was drawn from it is left out, as other members know other tails. Draws
    alone are put together: what is linear in p sums over them.

    Args:
        members: dense and top-k rows at temperature 1, or draws alone.
    """
    tops = [member for member in members if isinstance(member, TopKRows)]
    if not tops:
        return MeanRows(members, weights)
    if all(top.sampled for top in tops) and len(tops) == len(members):
        values = [top.log_probs + math.log(weight) for top, weight in zip(tops, weights, strict=True)]
        ids = torch.cat([top.ids for top in tops], dim=-1)
        return TopKRows(ids, torch.cat(values, dim=-1), tops[0].vocab_size, tops[0].temperature, sampled=True)
    ids = tops[0].ids
    for top in tops[1:]:
        ids = torch.where(_find(ids, top)[0], ids, -1)
    if len(tops) > 1 and ids.shape[-1] == tops[0].vocab_size:
        ids = torch.nn.functional.pad(ids, (0, 1), value=-1)  # K = V would say that every row has all tokens
    some = name_all(ids)
    values = [_at(member, some) + math.log(weight) for member, weight in zip(members, weights, strict=True)]
    log_p = torch.stack([value.float() for value in values]).logsumexp(0).masked_fill(ids < 0, float("-inf"))
    return TopKRows(ids, log_p, tops[0].vocab_size)


def _at(member: Any, ids: Tensor) -> Tensor:
    """log p of the ids [n, K], which a top-k member names."""
    if isinstance(member, TopKRows):
        return member.log_probs.gather(-1, _find(ids, member)[1])
    return look(lambda log_p, some: log_p.gather(-1, some), member, ids)


def _find(ids: Tensor, top: TopKRows) -> tuple[Tensor, Tensor]:
    """Whether each id [n, K] is among the row's events of `top`, and where."""
    rising, order = torch.where(top.ids < 0, top.vocab_size, top.ids).sort(-1)
    place = torch.searchsorted(rising, ids.contiguous()).clamp_max(rising.shape[-1] - 1)
    return rising.gather(-1, place) == ids, order.gather(-1, place)
