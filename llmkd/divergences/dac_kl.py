"""DAC-KL: the forward KL on a window of the teacher's distribution, whose two ends a small network learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from llmkd.divergences.numerics import LOG_ZERO, expectation, log_ratio
from llmkd.errors import ConfigError, unknown_name

START = (0.02, 0.98)  # the window before the first step, when the network gives 0
FAINT = -14.0  # nats, about 1e-6: the network sees no smaller probabilities, which would drown the rest
WIDTH = 128  # of the network's hidden layer
RESOLVED = 1024  # events that have a place of their own in the cumulative mass; all others share the last one


class DACKL(nn.Module):
    """KL(p || q) where events outside a learned window (l, u) of p are merged: sum_M p log(p / q) + r_p log(r_p / r_q).

    M are the kept events, r the mass of all others. A network f(log p, log q) of the teacher's best `top_k` events, in
    their order and without a gradient to either model, gives each row its l = sigmoid(a), u = l + (1 - l) sigmoid(b). An
    event is kept by sigmoid((c_k - l) / tau) sigmoid((u - c_k^-) / tau), where c_k is the mass of the events at least as
    probable as k and c_k^- that of the more probable ones; tau -> 0 is the hard window c_k^- < u, c_k > l. A partly kept
    event is kept with that probability, so that `bucket` is 0 at p = q and lies between 0 and KL(p || q) for every window.

    To merge more events always looks better to the loss, so the network alone would shut the window. Hence at least
    `min_mass` of the teacher stays: below, all events are kept a little more. And `window_weight` (1 - (u - l))^2 is added to
    the network's gradient; the value reported is the divergence alone.

    From the paper are the quantiles (l, u) that an MLP gives for each row to clip the teacher's distribution, and its training
    through the loss. Unverified, and ours: what the MLP reads, its size and start, the order of the ends, the quantile of
    what, whether the label stays, whether the rest is merged, renormalised or dropped, the soft ends, and both guards.

    The network trains with the student's optimizer. With V > 1024 events, those beyond the teacher's 1024 best share one
    place in the cumulative mass. A teacher's tail is one event.

    Args:
        mode: `bucket` (above); `renorm`: both models renormalised on M; `raw`: sum_M p log(p / q), which can be negative.
        coordinate: `mass` (above), or `value`: c_k is the quantile of p_k among the V probabilities, from a full sort.
        keep_target: always keep the label's event (without a label at hand, none).
        top_k: events that the network sees of each row; where there are fewer, the others have probability 0.
        tau: softness of the window's ends, > 0. min_mass: in [0, 1). window_weight: at least 0.

    Shapes: log_t, log_s [n, k] nats, label [n] event indices or None -> [n] nats.
    Raises: ConfigError for an unknown choice or a number out of its range.
    Measures: dac_lower, dac_upper, dac_mass (the teacher's kept mass), dac_count (kept events), of each row.

    Reference: Liu et al. 2024 (MGSR), arXiv 2407.10068.
    Fidelity: derived (the learned window is the paper's; all that it is made of is ours).
    """

    def __init__(
        self,
        mode: Literal["bucket", "renorm", "raw"] = "bucket",
        coordinate: Literal["mass", "value"] = "mass",
        keep_target: bool = True,
        top_k: int = 64,
        tau: float = 0.02,
        min_mass: float = 0.5,
        window_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise unknown_name("dac_kl.mode", mode, MODES)
        if coordinate not in ("mass", "value"):
            raise unknown_name("dac_kl.coordinate", coordinate, ("mass", "value"))
        if top_k < 1 or tau <= 0 or not 0 <= min_mass < 1 or window_weight < 0:
            raise ConfigError(
                f"dac_kl: got top_k={top_k}, tau={tau}, min_mass={min_mass}, window_weight={window_weight}; expected "
                "top_k >= 1, tau > 0, 0 <= min_mass < 1 and window_weight >= 0."
            )
        self.mode, self.coordinate, self.reads_label, self.top_k = mode, coordinate, keep_target, top_k
        self.tau, self.min_mass, self.window_weight = tau, min_mass, window_weight
        self.bounds = nn.Sequential(
            nn.LayerNorm(2 * top_k), nn.Linear(2 * top_k, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2)
        )
        for parameter in self.bounds[3].parameters():
            nn.init.zeros_(parameter)
        self._seen: dict[str, Tensor] = {}

    def forward(self, log_t: Tensor, log_s: Tensor, label: Tensor | None = None) -> Tensor:
        """The divergence of every row inside its window, [n] nats."""
        ids, low, high = places(log_t, self.coordinate)
        lower, upper = self.window(log_t, log_s, ids)
        keep = self.kept(log_t, ids, (low, high), (lower, upper), label if self.reads_label else None)
        value = MODES[self.mode](keep, log_t, log_s)
        self._see(lower, upper, keep, log_t)
        guard = self.window_weight * (1 - (upper - lower)).square().squeeze(-1)
        return value + (guard - guard.detach())

    def window(self, log_t: Tensor, log_s: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(l, u) of each row, [n, 1] both, from the teacher's best events `ids` [n, m], the most probable first."""
        ids = ids[:, : self.top_k]
        pad = (0, self.top_k - ids.shape[-1])
        rows = [x.detach().gather(-1, ids).clamp_min(FAINT) for x in (log_t, log_s)]
        seen = torch.cat([nn.functional.pad(row, pad, value=FAINT) for row in rows], dim=-1)
        moved = self.bounds(seen.to(self.bounds[1].weight.dtype)).to(log_t.dtype)  # type: ignore[union-attr]
        lower = (moved[:, :1] + _logit(START[0])).sigmoid()
        return lower, lower + (1 - lower) * (moved[:, 1:] + _logit((START[1] - START[0]) / (1 - START[0]))).sigmoid()

    def kept(
        self,
        log_t: Tensor,
        ids: Tensor,
        place: tuple[Tensor, Tensor],
        window: tuple[Tensor, Tensor],
        label: Tensor | None = None,
    ) -> Tensor:
        """How much of every event is kept, [n, k] in [0, 1]: that of `ids` at their places, and of all others."""
        (low, high), (lower, upper) = place, window
        inside = ((high - lower) / self.tau).sigmoid() * ((upper - low) / self.tau).sigmoid()
        keep = inside[:, -1:].expand_as(log_t).scatter(-1, ids, inside[:, :-1])
        if label is not None:
            keep = keep.scatter(-1, label.unsqueeze(-1), 1.0)
        mass = expectation(log_t.exp(), keep).unsqueeze(-1)
        more = (self.min_mass - mass) / (1 - mass).clamp_min(1 - self.min_mass)
        return keep + (1 - keep) * more.clamp_min(0.0)

    def measures(self) -> dict[str, Callable[..., Tensor]]:
        """The window and what it keeps, of the rows that `forward` saw last: the driver asks right after it."""
        return {name: partial(self._last, name) for name in ("dac_lower", "dac_upper", "dac_mass", "dac_count")}

    def _last(self, name: str, *rows: Tensor) -> Tensor:
        return self._seen[name]

    @torch.no_grad()
    def _see(self, lower: Tensor, upper: Tensor, keep: Tensor, log_t: Tensor) -> None:
        """A few numbers a row, so that measuring costs no second pass over the events."""
        kept = {"dac_mass": expectation(log_t.exp(), keep), "dac_count": keep.sum(-1)}
        self._seen = {"dac_lower": lower.detach().squeeze(-1), "dac_upper": upper.detach().squeeze(-1), **kept}


def places(log_t: Tensor, coordinate: str = "mass") -> tuple[Tensor, Tensor, Tensor]:
    """Where the teacher's events lie on the axis that the window is cut from.

    Equal probabilities share a place, so that the order of events does not matter.

    Returns:
        ids [n, m] of the best events, the most probable first; and the two ends [n, m + 1] of each one's place in [0, 1],
        low and high. The last column is the place of all other events together.
    """
    events = log_t.shape[-1]
    best, ids = log_t.topk(events if coordinate == "value" else min(events, RESOLVED), dim=-1)
    rising = best.neg()
    first, after = torch.searchsorted(rising, rising), torch.searchsorted(rising, rising, right=True)
    if coordinate == "value":
        step = 1 / max(1, events - 1)
        low, high = (nn.functional.pad(x.to(log_t.dtype), (0, 1)) for x in (1 - (after - 1) * step, 1 - first * step))
        return ids, low, high
    mass = nn.functional.pad(best.exp().cumsum(-1), (1, 0))
    low = torch.cat([mass.gather(-1, first), mass[:, -1:]], dim=-1)
    return ids, low, nn.functional.pad(mass.gather(-1, after), (0, 1), value=1.0)


def bucket(keep: Tensor, log_t: Tensor, log_s: Tensor) -> Tensor:
    """sum_v m p log(p / q) + r_p log(r_p / r_q), r = the mass that m leaves: KL after each event is erased with 1 - m."""
    p, q = log_t.exp(), log_s.exp()
    rest_t, rest_s = expectation(1 - keep, p), expectation(1 - keep, q)
    return expectation(keep * p, log_ratio(log_t, log_s)) + rest_t * (_log(rest_t) - _log(rest_s))


def renorm(keep: Tensor, log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(m p / P || m q / Q), P = sum_v m p, Q = sum_v m q."""
    kept = keep * log_t.exp()
    mass_t, mass_s = kept.sum(-1), expectation(keep, log_s.exp())
    ratio = expectation(kept, log_ratio(log_t, log_s)) / mass_t.clamp_min(math.exp(LOG_ZERO))
    return ratio - _log(mass_t) + _log(mass_s)


def raw(keep: Tensor, log_t: Tensor, log_s: Tensor) -> Tensor:
    """sum_v m p log(p / q): no divergence, and negative where q has more than p of the kept mass."""
    return expectation(keep * log_t.exp(), log_ratio(log_t, log_s))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _log(mass: Tensor) -> Tensor:
    return mass.clamp_min(math.exp(LOG_ZERO)).log()


MODES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"bucket": bucket, "renorm": renorm, "raw": raw}
