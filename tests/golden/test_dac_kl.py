"""DAC-KL against the hand-computed windows, its identities and its guards; no official code is known."""

from __future__ import annotations

import math
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmkd.divergences import DACKL, forward_kl
from llmkd.divergences.dac_kl import MODES, places
from llmkd.errors import ConfigError
from llmkd.objectives import Mix, TokenDistill
from llmkd.rows import DenseRows, TopKRows, weighted_sum
from llmkd.types import Outputs

F64 = torch.float64
# Fixture B of the method notes
P = torch.tensor([[0.55, 0.25, 0.12, 0.05, 0.02, 0.01]], dtype=F64).log()
Q = torch.tensor([[0.30, 0.30, 0.20, 0.10, 0.06, 0.04]], dtype=F64).log()
NEAR = 1e-7  # an end that lies on an event's edge is meant to the inside
WINDOWS = [  # l, u, label, coordinate, kept, raw, renorm, bucket
    (-NEAR, 1 + NEAR, None, "mass", "111111", 0.15600268, 0.15600268, 0.15600268),
    (-NEAR, 0.8 - NEAR, None, "mass", "110000", 0.28779430, 0.07206081, 0.14916487),
    (-NEAR, 0.5, None, "mass", "100000", 0.33337469, 0.0, 0.13454995),
    (0.6, 0.95, None, "mass", "011100", -0.14153682, 0.01968251, 0.07397004),
    (0.6, 0.95, 0, "mass", "111100", 0.19183787, 0.12286969, 0.15571868),
    (0.4 - NEAR, 0.9, 0, "value", "111100", 0.19183787, 0.12286969, 0.15571868),
]


def cut(lower: float, upper: float, label: int | None, coordinate: str, tau: float = 1e-10) -> Tensor:
    """What a window keeps of P."""
    ids, low, high = places(P, coordinate)
    window = torch.tensor([[lower]], dtype=F64), torch.tensor([[upper]], dtype=F64)
    target = None if label is None else torch.tensor([label])
    return DACKL(tau=tau, min_mass=0.0).kept(P, ids, (low, high), window, target)


def learned(seed: int = 0, spread: float = 1.0, **knobs) -> DACKL:
    """A divergence whose network says something of its own about each row."""
    torch.manual_seed(seed)
    fn = DACKL(**{"top_k": 9, **knobs}).double()
    torch.nn.init.normal_(fn.bounds[3].weight, std=spread)
    return fn


def pair(n: int = 6, k: int = 9, spread: float = 2.0, seed: int = 1) -> tuple[Tensor, Tensor]:
    z = spread * torch.randn(2, n, k, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return z[0], z[1]


def logs(*logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(z.log_softmax(-1) for z in logits)


# Windows


@pytest.mark.parametrize("case", WINDOWS)
def test_hard_windows_of_the_golden_table(case):
    lower, upper, label, coordinate, kept, *values = case
    keep = cut(lower, upper, label, coordinate)
    assert "".join(str(round(x)) for x in keep[0].tolist()) == kept
    for mode, value in zip(("raw", "renorm", "bucket"), values, strict=True):
        assert MODES[mode](keep, P, Q).item() == pytest.approx(value, abs=1e-8)


def test_the_soft_window_becomes_the_hard_one():
    hard = cut(0.6, 0.95, None, "mass")
    gaps = [(cut(0.6, 0.95, None, "mass", tau) - hard).abs().max().item() for tau in (0.02, 0.005, 0.002, 0.0005)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-12 < gaps[0]


@pytest.mark.parametrize("mode", sorted(MODES))
def test_both_ends_have_a_gradient_at_the_default_softness(mode):
    ids, low, high = places(P)
    ends = torch.tensor([0.6, 0.95], dtype=F64, requires_grad=True)
    keep = DACKL(min_mass=0.0).kept(P, ids, (low, high), (ends[:1, None], ends[1:, None]))
    (grad,) = torch.autograd.grad(MODES[mode](keep, P, Q).sum(), ends)
    assert grad.isfinite().all()
    assert (grad.abs() > 1e-6).all()


def test_bucket_grows_with_the_kept_set_up_to_the_kl():
    log_t, log_s = logs(*pair(50))
    torch.manual_seed(0)
    keep, before = torch.zeros_like(log_t), torch.zeros(50, dtype=F64)
    for event in torch.randperm(9):
        for share in (0.3, 1.0):  # a partly kept event, too
            keep[:, event] = share
            now = MODES["bucket"](keep, log_t, log_s)
            assert (now >= before - 1e-12).all()
            before = now
    torch.testing.assert_close(before, forward_kl(log_t, log_s))


def test_the_default_is_never_negative_and_at_most_the_kl_while_raw_may_be():
    log_t, log_s = logs(*pair(300, spread=1.0))
    for coordinate in ("mass", "value"):
        value = learned(spread=2.0, coordinate=coordinate, min_mass=0.0)(log_t, log_s)
        assert (value >= -1e-12).all()
        assert (value <= forward_kl(log_t, log_s) + 1e-12).all()
    assert (learned(spread=2.0, mode="raw", min_mass=0.0)(log_t, log_s) < -1e-3).any()


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("coordinate", ["mass", "value"])
def test_equal_models_have_no_loss_and_no_gradient_in_any_window(mode, coordinate):
    z, _ = pair(20)
    z_s, label = z.clone().requires_grad_(), torch.arange(20) % 9
    value = learned(spread=3.0, mode=mode, coordinate=coordinate)(*logs(z, z_s), label)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(value.sum(), z_s)
    if mode != "raw":  # which pushes the kept mass up for ever
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_order_of_events_does_not_matter_even_among_equals():
    z_t, z_s = pair()
    z_t = z_t.round()  # many equal ones
    fn, order, label = learned(top_k=1), torch.randperm(9), torch.tensor([0, 3, 8, 2, 2, 5])
    value = fn(*logs(z_t, z_s), label)
    for coordinate in ("mass", "value"):
        ids, *ends = places(z_t.log_softmax(-1), coordinate)
        moved_ids, *moved_ends = places(z_t[:, order].log_softmax(-1), coordinate)
        for one, other in zip(ends, moved_ends, strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(z_t.gather(1, ids), z_t[:, order].gather(1, moved_ids))
    assert value.isfinite().all()
    z_t, _ = pair()
    fn = learned()
    moved = fn(*logs(z_t[:, order], z_s[:, order]), order.argsort()[label])
    torch.testing.assert_close(moved, fn(*logs(z_t, z_s), label))


def test_a_wide_vocabulary_keeps_the_limits():
    """Beyond 1024 events the others share one place: a full window is still the KL, and nothing is lost."""
    log_t, log_s = logs(*pair(3, 3000, 1.0))
    fn = DACKL(tau=1e-10, min_mass=0.0)
    ids, low, high = places(log_t)
    assert ids.shape == (3, 1024)
    full = fn.kept(log_t, ids, (low, high), (torch.full((3, 1), -NEAR), torch.full((3, 1), 1 + NEAR)))
    torch.testing.assert_close(MODES["bucket"](full, log_t, log_s), forward_kl(log_t, log_s))
    without = fn.kept(log_t, ids, (low, high), (torch.full((3, 1), -NEAR), low[:, -1:] - NEAR))
    assert without.sum(-1).tolist() == [1024.0] * 3


# The network and its guards


def test_it_begins_with_the_window_of_the_notes_in_every_row():
    log_t, log_s = logs(*pair(40))
    lower, upper = DACKL().double().window(log_t, log_s, places(log_t)[0])
    torch.testing.assert_close(lower, torch.full_like(lower, 0.02))
    torch.testing.assert_close(upper, torch.full_like(upper, 0.98))
    lower, upper = learned(spread=5.0).window(log_t, log_s, places(log_t)[0])
    assert ((lower >= 0) & (lower <= upper) & (upper <= 1)).all()
    assert lower.std() > 0.1


def test_the_network_reads_without_a_gradient_to_the_student():
    """With the window held fixed the gradient of the student is the same."""
    (z_t, z_s), fn, label = pair(), learned(spread=2.0), torch.arange(6)
    z_s.requires_grad_()
    log_t, log_s = logs(z_t, z_s)
    (grad,) = torch.autograd.grad(fn(log_t, log_s, label).sum(), z_s)
    ids, low, high = places(log_t)
    keep = fn.kept(log_t, ids, (low, high), fn.window(log_t, log_s, ids), label).detach()

    def fixed(z: Tensor) -> Tensor:
        return MODES["bucket"](keep, log_t, z.log_softmax(-1))

    (expected,) = torch.autograd.grad(fixed(z_s).sum(), z_s)
    torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(fixed, z_s)
    kept, rest = keep * log_t.exp(), 1 - keep
    q, p = log_s.exp().detach(), log_t.exp()
    share = ((rest * p).sum(-1) / (rest * q).sum(-1))[:, None]
    torch.testing.assert_close(expected, q - kept - share * rest * q)  # q - the target that the window leaves


def test_the_network_learns_from_the_divergence_and_the_guard():
    """d/d network of bucket + window_weight (1 - (u - l))^2, though only the divergence is reported."""
    (log_t, log_s), label = logs(*pair(4)), torch.arange(4)
    fn, plain = learned(top_k=3, window_weight=0.7), learned(top_k=3, window_weight=0.0)
    value = fn(log_t, log_s, label)
    torch.testing.assert_close(value, plain(log_t, log_s, label))
    inputs = list(fn.parameters())
    grads = torch.autograd.grad(value.sum(), inputs)
    lower, upper = fn.window(log_t, log_s, places(log_t)[0])
    guard = 0.7 * (1 - (upper - lower)).square().sum()
    parts = torch.autograd.grad(plain(log_t, log_s, label).sum(), list(plain.parameters()))
    for grad, part, own in zip(grads, parts, torch.autograd.grad(guard, inputs), strict=True):
        assert grad.abs().sum() > 0
        torch.testing.assert_close(grad, part + own)
    assert torch.autograd.gradcheck(lambda *_: plain(log_t, log_s, label).sum(), tuple(plain.parameters()))


def test_the_teachers_mass_that_stays_is_at_least_the_minimum():
    log_t, log_s = logs(*pair(60, spread=1.0))
    fn, free = learned(spread=4.0), learned(spread=4.0, min_mass=0.0)
    for each in (fn, free):
        each(log_t, log_s)
    kept, freely = (each.measures()["dac_mass"](log_t, log_s) for each in (fn, free))
    low = freely < 0.5
    assert low.any()
    assert (~low).any()
    torch.testing.assert_close(kept[low], torch.full_like(kept[low], 0.5))
    torch.testing.assert_close(kept[~low], freely[~low])


def test_without_guards_the_window_shuts_and_with_them_it_does_not():
    log_t, log_s = logs(*pair(32, spread=1.0))
    mass, width = {}, {}
    for name, knobs in {"free": {"min_mass": 0.0, "window_weight": 0.0}, "guarded": {}}.items():
        torch.manual_seed(0)
        fn = DACKL(keep_target=False, top_k=9, **knobs).double()
        optimizer = torch.optim.Adam(fn.parameters(), lr=0.03)
        for _ in range(150):
            optimizer.zero_grad()
            fn(log_t, log_s).mean().backward()
            optimizer.step()
        seen = {key: measure(log_t, log_s).mean().item() for key, measure in fn.measures().items()}
        mass[name], width[name] = seen["dac_mass"], seen["dac_upper"] - seen["dac_lower"]
    assert mass["free"] < 0.25
    assert mass["guarded"] >= 0.5
    assert width["free"] < 0.1 < 0.4 < width["guarded"]


def test_the_label_is_kept_on_request():
    log_t, log_s = logs(*pair())
    worst = log_t.argmin(-1)
    ids, low, high = places(log_t)
    fn = DACKL().double()
    window = fn.window(log_t, log_s, ids)
    assert (fn.kept(log_t, ids, (low, high), window).gather(1, worst[:, None]) < 0.5).all()
    assert (fn.kept(log_t, ids, (low, high), window, worst).gather(1, worst[:, None]) == 1).all()
    assert DACKL().reads_label
    off = DACKL(keep_target=False).double()
    assert not off.reads_label
    assert torch.equal(off(log_t, log_s, worst), off(log_t, log_s))


@pytest.mark.parametrize(
    "knobs", [{"mode": "buckets"}, {"coordinate": "rank"}, {"tau": 0.0}, {"top_k": 0}, {"min_mass": 1.0}]
)
def test_knobs_out_of_range(knobs):
    with pytest.raises(ConfigError, match="dac_kl"):
        DACKL(**knobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(dtype):
    log_t, log_s = logs(*pair())
    fn, exact = learned(), learned()(log_t, log_s)
    value = fn.to(dtype)(log_t, log_s)
    assert value.dtype == F64
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0.02)


# Through the driver


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_top_k_and_tail_and_the_label_in_it(chunk):
    z_t, z_s = pair(7, 12)
    fn, label, z_s = learned(), torch.tensor([0, 1, 2, 3, 4, 5, 11]), z_s.requires_grad_()
    log_t, log_s = logs(z_t, z_s)
    kept, ids = log_t.topk(4)
    rest = torch.ones_like(log_t, dtype=torch.bool).scatter(1, ids, torch.zeros_like(ids, dtype=torch.bool))
    tails = [x[rest].view(7, -1).logsumexp(-1, keepdim=True) for x in (log_t, log_s)]
    place = [(row == mine).nonzero().flatten().tolist() for row, mine in zip(ids, label, strict=True)]
    event = torch.tensor([found[0] if found else 4 for found in place])
    assert (event == 4).any()
    expected = fn(torch.cat([kept, tails[0]], 1), torch.cat([log_s.gather(1, ids), tails[1]], 1), event).sum()
    batch = {"labels": torch.cat([torch.tensor([-100]), label])[None]}
    rows = DenseRows(z_s), TopKRows(ids, kept, 12)
    loss = TokenDistill(fn)(Outputs(rows=rows[0]), Outputs(rows=rows[1]), batch)
    torch.testing.assert_close(loss["total"], expected)
    wrt = [z_s, *fn.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(loss["total"], wrt), torch.autograd.grad(expected, wrt, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    alone = weighted_sum(fn, *rows, torch.ones(7, dtype=F64), event, chunk_rows=chunk)
    torch.testing.assert_close(alone, expected)


def test_what_is_measured_is_that_of_every_row():
    """Over several tiles, beside another loss, and at a weight of 0."""
    z_t, z_s = pair(30, 12)
    fn, label = learned(), torch.arange(30) % 12
    batch = {"labels": torch.cat([torch.tensor([-100]), label])[None]}
    log_t, log_s = logs(z_t, z_s)
    fn(log_t, log_s, label)
    expected = {name: measure(log_t, log_s, label).sum() for name, measure in fn.measures().items()}
    for weight in (1.0, 0.0):
        parts = [TokenDistill("forward_kl"), TokenDistill(fn)]
        loss = Mix(parts, [1.0, weight])(Outputs(rows=DenseRows(z_s)), Outputs(rows=DenseRows(z_t)), batch)
        for name, value in expected.items():
            torch.testing.assert_close(loss[name], value)
        assert 0.5 * 30 <= loss["dac_mass"] <= 30
    assert math.isclose(loss["dac_kl"].item(), fn(log_t, log_s, label).sum().item(), rel_tol=1e-9)


# Through the trainer


@pytest.fixture
def make_trainer(split_trainer):
    return partial(
        split_trainer, lambda: TokenDistill(DACKL(top_k=8)), uneven=True, **{"max_steps": 4, "save_steps": 2}
    )


def test_the_network_trains_alike_for_every_split_of_the_batch(make_trainer):
    trained = []
    for micro, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(micro, accumulation, optim="sgd", learning_rate=1.0, max_steps=3)
        start = [p.detach().clone() for p in trainer.distiller.objective.parameters()]
        trainer.train()
        trained.append([p.detach() for p in trainer.distiller.parameters()])
        own = list(trainer.distiller.objective.parameters())
        assert all(not torch.equal(one, other) for one, other in zip(start, own, strict=True))
    for other in trained[1:]:
        for one, two in zip(trained[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_resume_keeps_every_bit_of_the_network(make_trainer):
    whole = make_trainer(learning_rate=1e-2)
    whole.train()
    again = make_trainer(learning_rate=1e-2)
    folder = f"{again.args.output_dir}/checkpoint-2"
    again.train(resume_from_checkpoint=folder)
    for ours, theirs in zip(whole.distiller.parameters(), again.distiller.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    saved = safetensors.torch.load_file(f"{folder}/objective.safetensors")
    assert saved["fn.bounds.3.weight"].abs().sum() > 0
    logged = [entry for entry in whole.state.log_history if "dac_mass" in entry]
    assert len(logged) == 4
    assert logged[0]["dac_lower"] == pytest.approx(0.02, abs=1e-6)
    assert logged[0]["dac_upper"] == pytest.approx(0.98, abs=1e-6)
    assert all(0.5 <= entry["dac_mass"] <= 1 and entry["dac_count"] > 1 for entry in logged)
