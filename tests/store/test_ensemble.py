"""An ensemble shows the weighted average of probabilities, whatever its members are."""

from __future__ import annotations

import pytest
import torch
from shelf import opened, samples, save_teacher, stage_of, write
from transformers import TrainingArguments

from llmkd import DistillTrainer, TokenDistill
from llmkd.data import Collator, DataSpec, DocumentCollator
from llmkd.errors import ConfigError, DataError
from llmkd.events import TopKRows
from llmkd.heads import DenseRows
from llmkd.mixture import mix
from llmkd.objectives import DKD, SinKD
from llmkd.support import pair
from llmkd.teachers import EnsembleTeacher, check_data, check_needs, ensemble, local
from llmkd.teachers.cached import check_spec
from llmkd.types import Outputs, Signal, row_labels

N, V = 5, 11
WEIGHTS = [0.7, 0.3]


def z(seed: int) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def average(*logits: torch.Tensor) -> torch.Tensor:
    """log sum_j w_j p_j, [N, V], in float64."""
    return sum(w * z_.double().softmax(-1) for w, z_ in zip(WEIGHTS, logits, strict=True)).log()


def top(logits: torch.Tensor, k: int) -> TopKRows:
    log_p, ids = logits.log_softmax(-1).topk(k)
    return TopKRows(ids, log_p, V)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_rows(temperature):
    rows = mix([DenseRows(z(1)), DenseRows(z(2))], WEIGHTS)
    log_t, log_s = pair(z(3), rows, slice(1, 4), temperature)
    torch.testing.assert_close(log_t, (average(z(1), z(2)) / temperature).log_softmax(-1)[1:4].float())
    torch.testing.assert_close(log_s[0], (z(3)[0] / temperature).log_softmax(-1))
    chosen = torch.tensor([4, 0, 0])
    torch.testing.assert_close(rows.pick(chosen).logits(slice(None)), rows.logits(slice(None))[chosen])


@pytest.mark.parametrize("k", [3, 7, V])
def test_a_top_k_member_sets_the_events(k):
    rows = mix([top(z(1), k), DenseRows(z(2))], WEIGHTS)
    assert isinstance(rows, TopKRows)
    log_t, log_s = pair(z(3), rows, slice(None))
    for row in range(N):
        ids = top(z(1), k).ids[row]
        named = log_t[row][log_t[row].isfinite() & (log_t[row] > -80)]
        truth = average(z(1), z(2))[row]
        rest = truth.exp()[[i for i in range(V) if i not in ids.tolist()]].sum()
        events = torch.cat([truth[ids].exp(), rest[None]]) if k < V else truth[ids].exp()
        torch.testing.assert_close(named.exp().double().sort().values, events.sort().values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(log_s.exp().sum(-1), torch.ones(N))


def test_two_top_k_members_have_the_events_that_both_name():
    one, other = top(z(1), 6), top(z(2), 6)
    rows = mix([one, other], WEIGHTS)
    for row in range(N):
        common = set(one.ids[row].tolist()) & set(other.ids[row].tolist())
        named = {int(i): float(p) for i, p in zip(rows.ids[row], rows.log_probs[row], strict=True) if i >= 0}
        assert set(named) == common
        for token, value in named.items():
            assert value == pytest.approx(average(z(1), z(2))[row, token].item(), abs=1e-5)


def test_draws_are_put_together():
    one = TopKRows(torch.tensor([[3, 5]]), torch.tensor([[0.25, 0.75]]).log(), V, sampled=True)
    other = TopKRows(torch.tensor([[5, -1]]), torch.tensor([[1.0, 0.0]]).log(), V, sampled=True)
    z_s = z(3)[:1].requires_grad_()
    log_t, log_s = pair(z_s, mix([one, other], WEIGHTS), slice(None))
    loss = TokenDistill().fn(log_t, log_s).sum()
    target = torch.zeros(1, V)
    target[0, 3], target[0, 5] = 0.7 * 0.25, 0.7 * 0.75 + 0.3
    torch.testing.assert_close(torch.autograd.grad(loss, z_s)[0], z_s.detach().softmax(-1) - target)


# As a teacher

EXACT = {"name": "topk", "k": 264, "bits": 32}


@pytest.fixture(scope="module")
def places(teacher, corpus, tmp_path_factory):
    """Two teachers on the disk, and the specs of the second: live, and from two stores."""
    second = save_teacher(tmp_path_factory.mktemp("second"), num_hidden_layers=1)
    stores = {}
    for name, store in {"hidden": "hidden", "topk": EXACT}.items():
        folder = write(stage_of(second, corpus, tmp_path_factory.mktemp(name) / "store", store))
        stores[name] = {"name": "cached", "path": str(folder)}
    return {"first": str(teacher), "live": str(second), **stores}


@pytest.mark.parametrize("second", ["live", "hidden", "topk"])
@pytest.mark.parametrize("goal", [TokenDistill("reverse_kl"), TokenDistill("jsd"), DKD(), SinKD(1.0, top_k=264)])
def test_members_live_and_cached_give_one_loss(places, corpus, second, goal):
    data = samples(corpus)
    batch = DocumentCollator(Collator(0))([data[i] for i in range(4)])
    members = [local(path=places["first"]), local(path=places["live"])]
    logits = [member(batch, {Signal.LOGITS}, 259).rows.logits(slice(None)) for member in members]
    truth = DenseRows(average(*logits).float())
    shown = ensemble(teachers=[places["first"], places[second]], weights=[7, 3])
    check_needs(goal, shown)
    losses = []
    for rows in (truth, shown(batch, goal.needs, 259).rows):
        z_s = torch.randn(len(row_labels(batch)), 259, generator=torch.Generator().manual_seed(3)).requires_grad_()
        loss = goal(Outputs(rows=DenseRows(z_s)), Outputs(rows=rows), batch)["total"]
        losses.append((loss.detach(), torch.autograd.grad(loss, z_s)[0]))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-3, atol=1e-5)


def test_it_trains_and_evaluates(places, corpus, make_model, tokenizer, tmp_path):
    data = samples(corpus)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, save_strategy="no", report_to="none")
    mixed = ensemble(teachers=[places["first"], places["hidden"]])
    trainer = DistillTrainer(make_model(), mixed, TokenDistill("jsd"), args, data, data, tokenizer)
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 0


def test_what_does_not_go_together(places, teacher, corpus, tmp_path, make_model):
    drawn = opened(write(stage_of(teacher, corpus, tmp_path / "drawn", "sampled")))
    hot = opened(write(stage_of(teacher, corpus, tmp_path / "hot", {"name": "topk", "temperature": 2.0})))
    live = local(path=places["first"])
    assert EnsembleTeacher([drawn, drawn]).provides == {Signal.SAMPLES}
    for members, weights, said in (
        ([live, drawn], None, "expected logits of all, or samples of all"),
        ([live, hot], None, r"stored at temperature 2; expected 1"),
        ([live, live], [1.0], r"got \[1.0\] for 2 teachers"),
        ([live, live], [1.0, 0.0], "above 0 for each"),
        ([], None, "got no teachers"),
    ):
        with pytest.raises(ConfigError, match=said):
            EnsembleTeacher(members, weights)
    from llmkd.students.tiny import byte_tokenizer

    other = local(path=places["live"])
    other.tokenizer = byte_tokenizer(("new",))
    with pytest.raises(ConfigError, match="tokenizers differ"):
        EnsembleTeacher([live, other])


def test_members_that_lack_an_example_say_so(places, tmp_path):
    from shelf import save_texts

    mixed = ensemble(teachers=[places["first"], places["hidden"]])
    with pytest.raises(DataError, match="is not in"):
        check_data(mixed, samples(save_texts(tmp_path / "other.jsonl", ["Nobody has seen this."])))
    with pytest.raises(ConfigError, match=r"data.max_length: got 25, but .* was written with 24"):
        check_spec(mixed, DataSpec(path="other.jsonl", max_length=25))
