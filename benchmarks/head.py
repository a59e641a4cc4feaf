"""The loss head: dense autograd, TRL's chunked kernel, Liger's chunked JSD and ours, on the same inputs in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.measure import interleave
from benchmarks.record import Against, finish, header
from llmkd.divergences import divergence as named
from llmkd.rows import HeadRows, Term, reduce

SHAPES = {
    "small": (256, 8192, 256, 384),
    "smollm2": (1024, 49152, 576, 960),
    "long": (2048, 49152, 576, 960),
    "qwen2.5": (256, 151936, 896, 1536),
}
EXACT = ("small", "smollm2")  # small enough for float64
DIVERGENCES = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.5}}
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured at once: a shape, a dtype and a divergence."""

    shape: str
    dtype: str
    loss: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.loss}"


CASES = [
    *(Case("small", dtype, loss) for dtype in ("float32", "bfloat16") for loss in DIVERGENCES),
    *(Case("smollm2", "float32", loss) for loss in DIVERGENCES),
    *(Case("smollm2", "bfloat16", loss) for loss in ("forward_kl", "jsd")),
    Case("long", "float32", "forward_kl"),
    *(Case("qwen2.5", "bfloat16", loss) for loss in ("forward_kl", "jsd")),
]


@dataclass
class Inputs:
    """One case: hidden states [n, h] and heads [V, h] of both models; gradients are wanted for the student's."""

    hidden_s: Tensor
    head_s: nn.Linear
    hidden_t: Tensor
    head_t: nn.Linear

    def to(self, dtype: torch.dtype) -> Inputs:
        heads = [nn.Linear(h.in_features, h.out_features, bias=False) for h in (self.head_s, self.head_t)]
        for new, old in zip(heads, (self.head_s, self.head_t), strict=True):
            new.weight = nn.Parameter(old.weight.detach().to(dtype))
        return Inputs(self.hidden_s.detach().to(dtype).requires_grad_(), heads[0], self.hidden_t.to(dtype), heads[1])


def make(rows: int, vocab: int, width_s: int, width_t: int) -> Inputs:
    """Random inputs whose distributions are about as peaked as a language model's."""
    torch.manual_seed(0)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(place):
        heads = [nn.Linear(width, vocab, bias=False) for width in (width_s, width_t)]
        for head, width in zip(heads, (width_s, width_t), strict=True):
            nn.init.normal_(head.weight, std=3.0 / width**0.5)
        return Inputs(torch.randn(rows, width_s), heads[0], torch.randn(rows, width_t), heads[1])


def dense(inputs: Inputs, name: str) -> Callable[[], Gradients]:
    """Both logits in full, log-softmax in float32, autograd."""
    fn = named(name, **DIVERGENCES.get(name, {}))

    def run() -> Gradients:
        z_s, z_t = inputs.head_s(inputs.hidden_s), inputs.head_t(inputs.hidden_t).detach()
        wide = torch.promote_types(z_s.dtype, torch.float32)
        return _back(inputs, fn(z_t.to(wide).log_softmax(-1), z_s.to(wide).log_softmax(-1)).sum())

    return run


def ours(inputs: Inputs, name: str) -> Callable[[], Gradients]:
    """llmkd's driver with its default budget."""
    fn = named(name, **DIVERGENCES.get(name, {}))

    def run() -> Gradients:
        rows_s, rows_t = HeadRows(inputs.hidden_s, inputs.head_s), HeadRows(inputs.hidden_t, inputs.head_t)
        return _back(inputs, reduce([Term(fn)], rows_s, rows_t)[0])

    return run


def trl(inputs: Inputs, name: str) -> Callable[[], Gradients]:
    """TRL's ChunkedDivergenceFunction: Triton on a GPU, its torch path elsewhere."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Gradients:
        arguments = (inputs.hidden_s, inputs.head_s.weight, None, inputs.hidden_t, inputs.head_t.weight.detach(), None)
        return _back(inputs, ChunkedDivergenceFunction.apply(*arguments, TRL_BETA[name])[0].sum())

    return run


def liger_missing() -> str | None:
    """Why Liger's loss cannot run here, or None."""
    try:
        import liger_kernel.chunked_loss.jsd_loss  # noqa: F401
    except Exception as error:  # a kernel package may fail in any way where there is no GPU
        return f"{type(error).__name__}: {error}"
    return None


def liger(inputs: Inputs, name: str) -> Callable[[], Gradients] | None:
    """Liger's chunked JSD, not compiled; None for other divergences or where it does not run."""
    if name != "jsd" or liger_missing() is not None:
        return None
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    labels = torch.zeros(len(inputs.hidden_s), dtype=torch.long, device=inputs.hidden_s.device)

    def run() -> Gradients:
        value = loss(inputs.hidden_s, inputs.head_s.weight, inputs.hidden_t, inputs.head_t.weight.detach(), labels)
        return _back(inputs, value * len(labels))  # it returns a mean

    return run


def gemms(inputs: Inputs, name: str) -> Callable[[], Gradients]:
    """The four matrix products alone: what no exact method can go below."""

    def run() -> Gradients:
        weight, hidden = inputs.head_s.weight.detach(), inputs.hidden_s.detach()
        z_s, z_t = hidden @ weight.t(), inputs.hidden_t @ inputs.head_t.weight.detach().t()
        return z_t[0, 0], z_s @ weight, z_s.t() @ hidden

    return run


METHODS: dict[str, Any] = {"gemms": gemms, "dense": dense, "trl": trl, "liger": liger, "llmkd": ours}


def head(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}; all if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 and/or bfloat16; both if left out.")] = None,
    divergence: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DIVERGENCES)}.")] = None,
    repeats: int = 3,
    against: Annotated[Path | None, Against] = None,
) -> None:
    """Measure the loss head; writes head.json. All cases take about 15 minutes on two cores, and 8 GB."""
    chosen = {"shape": shape, "dtype": dtype, "loss": divergence}
    cases = [
        case
        for case in CASES
        if all(wanted is None or getattr(case, name) in wanted for name, wanted in chosen.items())
    ]
    if not cases:
        raise typer.BadParameter("no case has this shape, dtype and divergence")
    result = {**header(repeats), "not_run": {} if liger_missing() is None else {"liger": liger_missing()}}
    finish("head", {**result, "cases": [_measure(case, repeats) for case in cases]}, against)


def _measure(case: Case, repeats: int) -> dict[str, Any]:
    base = make(*SHAPES[case.shape])
    truth = _truth(base, case.loss) if case.shape in EXACT else None
    inputs = base.to(getattr(torch, case.dtype))
    del base
    made = {name: method(inputs, case.loss) for name, method in METHODS.items()}
    errors: dict[str, dict[str, float]] = {}

    def seen(name: str, found: Gradients) -> None:
        if truth is not None and name != "gemms":
            errors[name] = _errors(found, truth)

    measured = interleave({name: run for name, run in made.items() if run is not None}, repeats, seen)
    best = measured["llmkd"].seconds
    print(f"{case}: " + ", ".join(f"{name} {value.seconds:.3f} s" for name, value in measured.items()), flush=True)
    return {
        "case": str(case),
        **asdict(case),
        "rows_vocab_hs_ht": SHAPES[case.shape],
        "methods": {name: {**asdict(value), **errors.get(name, {})} for name, value in measured.items()},
        "ratios": {f"{name}_over_llmkd": round(value.seconds / best, 3) for name, value in measured.items()},
    }


def _truth(base: Inputs, loss: str) -> Gradients:
    """Loss and gradients in float64, a few rows at a time."""
    exact = base.to(torch.float64)
    rows = [slice(i, i + 64) for i in range(0, len(exact.hidden_s), 64)]
    total, grads, weight = 0.0, [], 0.0
    for part in rows:
        piece = Inputs(exact.hidden_s[part].detach().requires_grad_(), exact.head_s, exact.hidden_t[part], exact.head_t)
        value, d_hidden, d_weight = dense(piece, loss)()
        total, weight = total + value, weight + d_weight
        grads.append(d_hidden)
    return torch.as_tensor(total), torch.cat(grads), torch.as_tensor(weight)


def _errors(found: Gradients, truth: Gradients) -> dict[str, float]:
    """Relative errors of the loss and, in norm, of both gradients."""
    names = ("loss_error", "hidden_grad_error", "weight_grad_error")
    pairs = zip(names, found, truth, strict=True)
    return {name: float((ours.double() - exact).norm() / exact.norm()) for name, ours, exact in pairs}


def _back(inputs: Inputs, loss: Tensor) -> Gradients:
    grads = torch.autograd.grad(loss, [inputs.hidden_s, inputs.head_s.weight])
    return loss.detach(), grads[0], grads[1]
