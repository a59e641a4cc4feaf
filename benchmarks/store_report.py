"""What the benchmark of the teacher store makes of its parts: means, bounds, the other format's bytes, a picture, a table."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LIVE = "live"
DISTILLKIT_VALUES = {128: 56, 50: 14}  # bytes of its values by its k: a few exact ones and a polynomial of the rank
Parts = dict[str, Any]


def distillkit_bytes(k: int, vocab_size: int) -> int:
    """Bytes a token of DistillKit's format: ids of ceil(log2 V) bits in the order of their rank, and coded values."""
    return math.ceil(k * math.ceil(math.log2(vocab_size)) / 8) + DISTILLKIT_VALUES[k]


def summary(runs: list[Parts]) -> Parts:
    """Mean, standard deviation over the seeds and every value."""
    out: Parts = {"seeds": len(runs)}
    for key in ("kl", "top1_agreement", "perplexity"):
        values = [run[key] for run in runs]
        out[key] = {"mean": round(mean(values), 4), "std": round(stdev(values), 4) if len(values) > 1 else None}
        out[key]["values"] = values
    return out


def step_time(seconds: dict[str, float], code: Parts) -> Parts:
    """Live over cached, measured and as FLOPs would have it: no teacher body; top-k rows need no teacher head either."""
    sizes = code["sizes"]
    student, teacher, vocab = sizes["student"], sizes["teacher"], sizes["vocab"]
    body = 6 * student["body"] + 3 * student["attention"]
    head, head_t = 6 * vocab * student["hidden"], 2 * vocab * teacher["hidden"]
    flops = {name: body + head + (head_t if name in (LIVE, "hidden") else 0) for name in seconds}
    flops[LIVE] += 2 * teacher["body"] + teacher["attention"]
    return {
        name: {
            "seconds": round(value, 3),
            "live_over_this": round(seconds[LIVE] / value, 2),
            "flop_bound": round(flops[LIVE] / flops[name], 2),
        }
        for name, value in seconds.items()
    }


def plot(result: Parts, file: Path) -> None:
    """Held-out KL after training against bytes a token, a panel for each batch; live training is a band."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "llmkd"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(result["training"]), figsize=(9.6, 3.6), squeeze=False)
    for axes, (batch, training) in zip(panels[0], result["training"].items(), strict=True):
        live = training[LIVE]["kl"]
        spread = live["std"] or 0.0
        axes.axhspan(live["mean"] - spread, live["mean"] + spread, alpha=0.2, color="grey", label="live, one std. dev.")
        axes.axhline(live["mean"], color="grey", linewidth=1)
        for name, kind in result["kinds"].items():
            found = training[name]["kl"]
            axes.errorbar(kind["bytes_per_token"], found["mean"], yerr=found["std"], fmt="o", capsize=3)
            label = name if found["std"] is not None else f"{name}, one order"
            axes.annotate(label, (kind["bytes_per_token"], found["mean"]), textcoords="offset points", xytext=(6, 6))
        axes.margins(x=0.5)
        axes.set(xscale="log", xlabel="bytes a token", title=f"{batch} samples a step")
    panels[0][0].set_ylabel("held-out KL to the teacher, nats")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def table(result: Parts) -> str:
    """The numbers as a Markdown table, and what they were measured on."""
    training = result["training"]
    trained = "".join(f"| held-out KL, {batch} samples a step " for batch in training)
    lines = [
        f"| store | bytes a token | decode, tokens/s | KL of the codes, nats {trained}"
        "| live / this, step time (FLOP bound) |",
        "|---|--:|--:|--:|" + "--:|" * len(training) + "--:|",
    ]
    for name in (LIVE, *result["kinds"]):
        kind, times = result["kinds"].get(name, {}), result["step_time"][name]
        error = kind.get("kl_error")
        cells = (
            f"`{name}`" if kind else name,
            f"{kind['bytes_per_token']:,.1f}" if kind else "-",
            f"{kind['decode_tokens_per_second']:,}" if kind else "-",
            "-" if error is None else f"{error:.5f}",
            *(_spread(runs[name]["kl"]) for runs in training.values()),
            f"{times['live_over_this']:.2f} ({times['flop_bound']:.2f})" if kind else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    setting, formula, kinds = result["setting"], result["distillkit_formula_bytes"], result["kinds"]
    bits = "the same bits as live training" if result["hidden_is_bit_equal"] else "other bits than live training"
    seeds = next(iter(training.values()))[LIVE]["seeds"]
    gaps = "; ".join(f"{batch} samples a step: {_gaps(runs)}" for batch, runs in training.items())
    lines += [
        "",
        f"SmolLM2-135M-Instruct's rows (V = 49152, float32), a student of {len(setting['layers'])} of its layers, "
        f"{setting['steps']} steps of samples of {setting['max_length']} tokens, each seen once, {seeds} orders of the data "
        f"(± one standard deviation); in float32 hidden states train to {bits}. `topk` draws {kinds['topk']['draws']} times "
        f"from a row, `adaptive` {kinds['adaptive']['draws']} times, and keeps what falls into the tail. Against live, order "
        f"by order, in nats: {gaps}. DistillKit's format takes {formula['49152']['50']} bytes at k = 50 and "
        f"{formula['49152']['128']} at k = 128 by its formula, without label and tail. On {result['device']}; "
        "[store.json](benchmarks/results/store.json) comes again from "
        "`python -m benchmarks store`.",
        "",
        "![Held-out KL after training against bytes a token](benchmarks/results/store.svg)",
    ]
    return "\n".join(lines)


def _spread(found: Parts) -> str:
    return f"{found['mean']:.3f}" + (" (one order)" if found["std"] is None else f" ± {found['std']:.3f}")


def _gaps(training: Parts) -> str:
    """How much farther from the teacher than live training each kind ends, on the orders that both have."""
    live = training[LIVE]["kl"]["values"]
    gaps = {
        name: [value - other for value, other in zip(found["kl"]["values"], live, strict=False)]
        for name, found in training.items()
        if name != LIVE and len(found["kl"]["values"]) > 1
    }
    return ", ".join(f"`{name}` {min(gap):+.3f} to {max(gap):+.3f}" for name, gap in gaps.items())
