"""Rows of a few events: what is kept of a teacher's distribution, its best tokens and a tail, or draws from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.support import coarsen, log_tail, name_all


class TopKRows:
    """A teacher's K events a row; whatever mass they leave is one tail event (none when K = V).

    What is linear in p may learn more of the tail than its mass, from draws of its tokens: see `within`.

    Args:
        ids: [n, K] token ids, distinct in a row; -1 is no event, for rows that have fewer (K = V if every row has all).
        log_probs: [n, K] nats, over the whole vocabulary; -inf where there is no event.
        vocab_size: V. temperature: at which the log-probabilities were recorded.
        sampled: the events are drawn, and their weights an unbiased estimate of all probabilities: there is no tail.
        drawn: n sampled rows of tokens of the tail, their weights an unbiased estimate of these tokens' probabilities.
    """

    def __init__(
        self,
        ids: Tensor,
        log_probs: Tensor,
        vocab_size: int,
        temperature: float = 1.0,
        sampled: bool = False,
        drawn: TopKRows | None = None,
    ) -> None:
        self.ids, self.log_probs, self.vocab_size, self.temperature = ids, log_probs, vocab_size, temperature
        self.sampled, self.drawn = sampled, drawn

    def __len__(self) -> int:
        return self.ids.shape[0]

    def tensors(self) -> list[Tensor]:
        """Nothing that could have a gradient."""
        return []

    def using(self, tensors: Sequence[Tensor]) -> TopKRows:
        """Itself: there is nothing to gather."""
        return self

    def cast(self, autocast: bool) -> TopKRows:
        """Itself: there is nothing to cast."""
        return self

    def space(self, rows: int) -> None:
        """Nothing is projected."""

    def block(self, rows: slice, space: Tensor | None = None) -> TopKRows:
        """Some of the rows."""
        drawn = None if self.drawn is None else self.drawn.block(rows)
        return TopKRows(self.ids[rows], self.log_probs[rows], self.vocab_size, self.temperature, self.sampled, drawn)

    def pick(self, chosen: Tensor) -> TopKRows:
        """The rows of these numbers."""
        ids, log_probs = self.ids.index_select(0, chosen), self.log_probs.index_select(0, chosen)
        drawn = None if self.drawn is None else self.drawn.pick(chosen)
        return TopKRows(ids, log_probs, self.vocab_size, self.temperature, self.sampled, drawn)

    def align(self, rows: slice, log_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities on the same K events and the tail; see `support.pair`."""
        if log_s.shape[-1] != self.vocab_size:
            raise ValueError(
                f"student vocabulary is {log_s.shape[-1]}, the teacher's rows were made with {self.vocab_size}"
            )
        if temperature != self.temperature:
            raise ValueError(f"temperature is {temperature}, the teacher's rows were recorded at {self.temperature}")
        ids, log_t = self.ids[rows], self.log_probs[rows].to(log_s.dtype)
        if self.sampled:
            return log_t, log_s.gather(-1, name_all(ids)).masked_fill(ids < 0, float("-inf"))
        if ids.shape[-1] != self.vocab_size:
            all_named = (ids >= 0).sum(-1, keepdim=True) == self.vocab_size
            log_t = torch.cat([log_t, log_tail(log_t).masked_fill(all_named, float("-inf"))], dim=-1)
        return log_t, coarsen(log_s, ids)

    def within(self, rows: slice, log_s: Tensor, log_tail: Tensor) -> Tensor:
        """sum_v w_v (log(w_v / W) - log(q_v / q_tail)), W = sum_v w_v, of the tail's drawn tokens, [m] nats; 0 without any.

        Its mean has the gradient of p_tail KL(p_v / p_tail || q_v / q_tail), by which the whole vocabulary's forward KL
        exceeds that on the K events and the tail; its value is larger by the entropy that draws lack.

        Args:
            log_s: [m, V], the student's. log_tail: [m], of the mass that it gives the tail.
        """
        if self.drawn is None:
            return torch.zeros_like(log_tail)
        ids, log_w = self.drawn.ids[rows], self.drawn.log_probs[rows].to(log_s.dtype)
        weights = log_w.exp()
        total = weights.sum(-1)
        gap = (log_w - log_s.gather(-1, ids.clamp_min(0))).masked_fill(weights == 0, 0.0)
        value = (weights * gap).sum(-1) - torch.xlogy(total, total) + total * log_tail
        return torch.where(total > 0, value, 0.0)

    def spread(self, rows: slice, slope: Tensor, log_s: Tensor, linear: bool = False) -> Tensor:
        """From the derivative by the events' logits, [m, K] or [m, K + 1], to that by the logits z of log_s, [m, V].

        d/dz_v is that of the event v; what the tail is due goes to its tokens by their share of it. `linear` adds the
        derivative of `within`: W q_v / q_tail - w_v.
        """
        ids, kept = self.ids[rows], slope[:, : self.ids.shape[-1]]
        if kept.shape == slope.shape:
            return slope.new_empty(log_s.shape).scatter_(-1, ids, kept)
        kept, ids, due = kept.masked_fill(ids < 0, 0.0), name_all(ids), slope[:, -1:]
        drawn = self.drawn if linear else None
        weights = None if drawn is None else drawn.log_probs[rows].to(slope.dtype).exp()
        if weights is not None:
            due = due + weights.sum(-1, keepdim=True)
        shares = torch.softmax(log_s.scatter(-1, ids, float("-inf")), -1)  # 0 at the ids
        out = shares.nan_to_num_(0.0).mul_(due).scatter_add_(-1, ids, kept)
        return out if drawn is None else out.scatter_add_(-1, drawn.ids[rows].clamp_min(0), -weights)  # type: ignore[operator]

    def find(self, rows: slice, label: Tensor) -> Tensor:
        """The event [m] of each label: its place among the K ids, or K, the tail."""
        found = self.ids[rows] == label.unsqueeze(-1)
        return torch.where(found.any(-1), found.int().argmax(-1), found.shape[-1])

    def of_labels(self, label: Tensor) -> Tensor:
        """log p of each row's label, [n] nats.

        Raises:
            ConfigError: the events are drawn, of another temperature than 1, or a label is not among its row's.
        """
        events = self.find(slice(None), label)
        if self.sampled or self.temperature != 1.0 or bool((events == self.ids.shape[-1]).any()):
            raise ConfigError(
                f"teacher: got {'draws' if self.sampled else f'events at temperature {self.temperature:g}'}, which do not tell "
                "each label's probability; expected rows that do. Store top-k rows at temperature 1, or hidden states."
            )
        return self.log_probs.gather(-1, events.unsqueeze(-1)).squeeze(-1)
