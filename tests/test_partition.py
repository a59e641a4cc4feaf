"""The teacher's row where it is surer than the student's frozen start, that start's elsewhere, under any divergence."""

from __future__ import annotations

import pytest
import torch
from classes import classifier, data
from oracles import dense_rows, instance
from test_rows_cost import Watch
from test_trainer import Recording, arguments, rows
from torch import Tensor, nn

from llmkd import CrossEntropy, DistillTrainer, LocalTeacher, Mix, TokenDistill
from llmkd.agreement import measure
from llmkd.combined import MeanRows, SurerRows
from llmkd.divergences import DIVERGENCES, reads_label
from llmkd.errors import ConfigError
from llmkd.objectives import DKD, OBJECTIVES, SinKD
from llmkd.rows import DenseRows, HeadRows, TopKRows, pick, reduce
from llmkd.rows import Term as RowTerm
from llmkd.teachers import EMA, Partition
from llmkd.types import Outputs, Signal

N, V, H = 12, 9, 5
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
BATCH = {"labels": torch.cat([torch.tensor([-100]), LABELS])[None]}


class Given:
    """A teacher of fixed rows."""

    provides = frozenset({Signal.LOGITS})
    tokenizer, vocab_size = None, V

    def __init__(self, shown) -> None:
        self.shown = shown

    def prepare(self, accelerator) -> None:
        """Nothing to do."""

    def __call__(self, batch, needs, vocab_size=None) -> Outputs:
        return Outputs(self.shown)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Of teacher, start and student."""
    z = 2 * torch.randn(3, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return z[0], z[1], z[2].requires_grad_()


def partition(theirs, own, by: str = "label") -> Outputs:
    teacher = Partition(Given(theirs), by)
    teacher.start = Given(own)
    return teacher(BATCH, {Signal.LOGITS})


def gate(z_t: Tensor, z_0: Tensor, by: str) -> Tensor:
    """m of every row, from the formula."""
    p, r = z_t.softmax(-1), z_0.softmax(-1)
    if by == "top":
        return p.max(-1).values > r.max(-1).values
    return p[torch.arange(N), LABELS] > r[torch.arange(N), LABELS]


@pytest.mark.parametrize("by", ["label", "top"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_any_divergence_is_that_of_teacher_or_start(logits, name, by):
    """mean of m D(p_t, q) + (1 - m) D(p_0, q); both kinds of rows occur."""
    z_t, z_0, z_s = logits
    fn, m = instance(DIVERGENCES, name), gate(z_t, z_0, by)
    assert 0 < m.sum() < N
    label = (LABELS,) if reads_label(fn) else ()
    both = [dense_rows(fn, z_s, z, *label) for z in (z_t, z_0)]
    expected = torch.where(m, *both).sum()
    total = TokenDistill(fn)(Outputs(DenseRows(z_s)), partition(DenseRows(z_t), DenseRows(z_0), by), BATCH)["total"]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, z_s)[0], torch.autograd.grad(expected, z_s)[0])


@pytest.mark.parametrize("goal", [DKD(temperature=2.0), SinKD(), SinKD(granularity="sample")])
def test_other_objectives_take_its_rows(logits, goal):
    z_t, z_0, z_s = logits
    mixed = torch.where(gate(z_t, z_0, "label").unsqueeze(-1), z_t, z_0)
    student = Outputs(DenseRows(z_s))
    ours = goal(student, partition(DenseRows(z_t), DenseRows(z_0)), BATCH)["total"]
    torch.testing.assert_close(ours, goal(student, Outputs(DenseRows(mixed)), BATCH)["total"])


def test_a_teacher_that_is_better_everywhere_is_all_there_is_and_a_worse_one_nothing(logits):
    _, z_0, z_s = logits
    better = z_0.clone()
    better[torch.arange(N), LABELS] += 1.0
    worse = z_0.clone()
    worse[torch.arange(N), LABELS] -= 1.0
    for theirs, seen in ((better, better), (worse, z_0), (z_0, z_0)):
        ours, plain = (
            TokenDistill()(Outputs(DenseRows(z_s)), shown, BATCH)["total"]
            for shown in (partition(DenseRows(theirs), DenseRows(z_0)), Outputs(DenseRows(seen)))
        )
        assert torch.equal(ours, plain)


def test_a_student_at_its_start_learns_from_the_teacher_s_tokens_alone(logits):
    z_t, z_0, _ = logits
    z_s = z_0.clone().requires_grad_()
    total = TokenDistill()(Outputs(DenseRows(z_s)), partition(DenseRows(z_t), DenseRows(z_0)), BATCH)["total"]
    (grad,) = torch.autograd.grad(total, z_s)
    m = gate(z_t, z_0, "label")
    assert grad[~m].abs().max() < 1e-12
    assert (grad[m].norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("by", ["label", "top"])
@pytest.mark.parametrize("k", [3, V])
def test_a_top_k_teacher(logits, by, k):
    """On the teacher's events and the tail; with all events as ids it is what the dense teacher is."""
    z_t, z_0, z_s = logits
    log_t = z_t.log_softmax(-1)
    kept, ids = log_t.topk(k)
    shown = partition(TopKRows(ids, kept, V), DenseRows(z_0), by)
    assert isinstance(shown.rows, TopKRows)
    m = gate(z_t, z_0, by) & ((ids == LABELS[:, None]).any(-1) if by == "label" else torch.ones(N, dtype=torch.bool))
    torch.testing.assert_close(shown.rows.log_probs[m], kept[m])
    torch.testing.assert_close(shown.rows.log_probs[~m], z_0.log_softmax(-1).gather(-1, ids)[~m])
    if k == V:
        whole = partition(DenseRows(z_t), DenseRows(z_0), by)
        ours, plain = (TokenDistill()(Outputs(DenseRows(z_s)), out, BATCH)["total"] for out in (shown, whole))
        torch.testing.assert_close(ours, plain)


def test_rows_of_other_widths_are_an_error(logits):
    z_t, z_0, _ = logits
    with pytest.raises(ValueError, match="teacher vocabulary is 8"):
        SurerRows(DenseRows(z_t[:, :-1]), DenseRows(z_0), LABELS).logits(slice(None))


def head_rows(seed: int, vocab: int, count: int, dtype=torch.float32) -> HeadRows:
    torch.manual_seed(seed)
    return HeadRows(torch.randn(count, H).to(dtype), nn.Linear(H, vocab, bias=bool(seed % 2)).to(dtype))


def combined(kind: str, vocab: int = V, count: int = N, dtypes=(torch.float32, torch.float32)):
    parts = [head_rows(seed, vocab, count, dtype) for seed, dtype in zip((1, 2), dtypes, strict=True)]
    label = torch.arange(count) % vocab
    return MeanRows(parts) if kind == "mean" else SurerRows(*parts, label if kind == "label" else None)


@pytest.mark.parametrize("kind", ["mean", "label", "top"])
def test_combined_rows_are_computed_chunk_by_chunk(kind):
    """The same loss for any chunk, and no tensor of rows times columns beyond one."""
    count, vocab = 64, 512
    teacher, student = combined(kind, vocab, count), head_rows(3, vocab, count)
    dense = DenseRows(teacher.logits(slice(None)).detach())
    term = RowTerm(DIVERGENCES["forward_kl"], temperature=2.0)
    whole = reduce([term], student, dense)[0]
    for size in (1, 7, count, count + 1):
        torch.testing.assert_close(reduce([term], student, teacher, chunk_rows=size)[0], whole)
    with Watch() as watch:
        reduce([term], student, teacher, chunk_rows=4)
    assert watch.largest <= vocab * max(H, 4)


@pytest.mark.parametrize("kind", ["mean", "label", "top"])
def test_combined_rows_are_picked_and_measured(kind):
    rows_of, student = combined(kind), head_rows(3, V, N)
    chosen = torch.tensor([4, 0, 4])
    torch.testing.assert_close(pick(rows_of, chosen).logits(slice(None)), rows_of.logits(slice(None))[chosen])
    sums = measure(student, rows_of, LABELS)
    plain = measure(student, DenseRows(rows_of.logits(slice(None)).detach()), LABELS)
    assert sums.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(sums[name], value)


def test_each_part_keeps_its_own_dtype():
    cast = combined("label", dtypes=(torch.bfloat16, torch.float32)).cast(autocast=False)
    assert [t.dtype for t in cast.tensors()] == [torch.bfloat16] * 3 + [torch.float32] * 2


# In training


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(teacher, objective=None, folder="run", **changes) -> DistillTrainer:
        torch.manual_seed(1)
        return DistillTrainer(
            make_model(), teacher, objective or Mix([TokenDistill(), CrossEntropy()], [1.0, 0.1]),
            arguments(tmp_path / folder, **changes), train_dataset=rows(), eval_dataset=rows(seed=4),
            processing_class=tokenizer,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("name", ["token", "nkd", "sinkd"])
def test_teacher_and_frozen_start_run_once_a_batch(make_trainer, make_model, tokenizer, name):
    teacher = Recording(make_model(seed=9), tokenizer)
    trainer = make_trainer(Partition(teacher), Mix([OBJECTIVES[name](), CrossEntropy()]), max_steps=3)
    calls = []
    copied = trainer.teacher.start._copies[0]
    copied.get_decoder().register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(teacher.calls) == len(calls) == 3


def test_a_resumed_run_keeps_the_first_start(make_trainer, make_model, tokenizer, tmp_path):
    def make(folder: str) -> DistillTrainer:
        teacher = Partition(LocalTeacher(make_model(seed=9), tokenizer))
        options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        return make_trainer(teacher, folder=folder, max_steps=4, **options)

    whole, again = make("a"), make("b")
    start = {name: tensor.clone() for name, tensor in whole.distiller.student.state_dict().items()}
    whole.train()
    nn.init.zeros_(again.distiller.student.lm_head.weight)
    nn.init.zeros_(again.teacher.start._copies[0].lm_head.weight)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in again.distiller.student.state_dict().items():
        assert torch.equal(tensor, whole.distiller.student.state_dict()[name]), name
        assert torch.equal(again.teacher.start._copies[0].state_dict()[name], start[name]), name


def test_a_classifier(tokenizer, tmp_path):
    teacher = Partition(LocalTeacher(classifier(seed=9, size=48), tokenizer), by="top")
    trainer = DistillTrainer(
        classifier(), teacher, TokenDistill(), arguments(tmp_path), train_dataset=data(), eval_dataset=data(4),
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.train().training_loss > 0


def test_what_it_refuses(make_model):
    with pytest.raises(ConfigError, match=r"partition\.by.*label"):
        Partition(Given(None), "lable")
    with pytest.raises(ConfigError, match=r"partition\.teacher: got EMA"):
        Partition(EMA())
