"""Hidden-state MSE against loops: tokens of texts, examples with padding, layer pairs, models that do not fit."""

from __future__ import annotations

import pytest
import torch
from classes import classifier, examples
from torch import Tensor

from llmkd import LocalTeacher
from llmkd.adapters import adapter_of
from llmkd.data.collate import ExampleCollator
from llmkd.errors import ConfigError
from llmkd.objectives import Mix, TokenDistill
from llmkd.objectives.hidden_mse import HiddenMSE, uniform
from llmkd.students.depth import keep_layers
from llmkd.types import Outputs


def states(layers: int, width: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for _ in range(layers + 1))


def loop(student, teacher, pairs, tokens) -> float:
    """Mean over pairs and dimensions of each of the (row, position) tokens, summed."""
    total = 0.0
    for row, position in tokens:
        for ours, theirs in pairs:
            gap = [
                (a - b) ** 2 for a, b in zip(student[ours][row, position], teacher[theirs][row, position], strict=True)
            ]
            total += float(sum(gap)) / len(gap) / len(pairs)
    return total


def test_a_text_counts_the_tokens_that_predict():
    student, teacher = states(2, 3, 0), states(4, 3, 1)
    labels = torch.full((2, 5), -100)
    labels[0, 2], labels[0, 3], labels[1, 4] = 7, 8, 9
    loss = HiddenMSE()(Outputs(hidden_states=student), Outputs(hidden_states=teacher), {"labels": labels})
    expected = loop(student, teacher, [(1, 2), (2, 4)], [(0, 1), (0, 2), (1, 3)])
    assert loss["total"].item() == pytest.approx(expected)
    assert loss["hidden_mse"].item() == pytest.approx(expected)


def test_an_example_is_the_mean_of_its_own_tokens():
    student, teacher = states(1, 3, 0), states(3, 3, 1)
    batch = {"labels": torch.tensor([1, 0]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    found = HiddenMSE([(0, 0), (1, 2)])(Outputs(hidden_states=student), Outputs(hidden_states=teacher), batch)["total"]
    pairs = [(0, 0), (1, 2)]
    expected = loop(student, teacher, pairs, [(0, 0), (0, 1), (0, 2)]) / 3
    expected += loop(student, teacher, pairs, [(1, 0), (1, 1)]) / 2
    assert found.item() == pytest.approx(expected)
    unknown = {**batch, "labels": torch.tensor([1, -100])}
    part = HiddenMSE(pairs)(Outputs(hidden_states=student), Outputs(hidden_states=teacher), unknown)["total"]
    assert part.item() == pytest.approx(loop(student, teacher, pairs, [(0, 0), (0, 1), (0, 2)]) / 3)


def test_layers_are_spread_evenly():
    assert uniform(2, 6) == [(1, 3), (2, 6)]
    assert uniform(3, 12) == [(1, 4), (2, 8), (3, 12)]
    assert uniform(4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_it_is_0_with_zero_gradient_of_a_model_with_itself(tokenizer):
    model = classifier()
    batch, goal = ExampleCollator(tokenizer)(examples()), HiddenMSE()
    loss = goal(adapter_of(model).read(model, batch, goal.needs), LocalTeacher(classifier())(batch, goal.needs), batch)
    assert loss["total"].item() == 0
    loss["total"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_changes_nothing(tokenizer):
    goal, teacher = HiddenMSE(), LocalTeacher(classifier(seed=9))
    model = keep_layers(teacher.model, [1]).eval()

    def total(rows) -> float:
        batch = ExampleCollator(tokenizer)(rows)
        ours, theirs = adapter_of(model).read(model, batch, goal.needs), teacher(batch, goal.needs)
        return goal(ours, theirs, batch)["total"].item()

    rows = examples()
    assert total(rows) == pytest.approx(sum(total([row]) for row in rows if row["label"] >= 0), rel=1e-4)


def test_what_does_not_fit_is_refused():
    batch = {"labels": torch.tensor([1, 0])}
    student, teacher = Outputs(hidden_states=states(2, 3, 0)), Outputs(hidden_states=states(2, 4, 0))
    with pytest.raises(ConfigError, match=r"the student's width is 3, the teacher's 4; .*model: depth"):
        HiddenMSE()(student, teacher, batch)
    with pytest.raises(ConfigError, match=r"hidden_mse.layers: got 3 for the teacher, which has 0 to 2"):
        HiddenMSE([(1, 3)])(student, student, batch)
    with pytest.raises(ConfigError, match="it needs both models' hidden states"):
        HiddenMSE()(student, None, batch)
    with pytest.raises(ConfigError, match="got an empty list"):
        HiddenMSE([])


def test_it_mixes_with_a_divergence(tokenizer):
    model, teacher = classifier(), LocalTeacher(classifier(seed=9))
    batch, goal = ExampleCollator(tokenizer)(examples()), Mix([TokenDistill(), HiddenMSE()], [1.0, 0.5])
    ours, theirs = adapter_of(model).read(model, batch, goal.needs), teacher(batch, goal.needs)
    parts = [part(ours, theirs, batch)["total"] for part in goal.parts]
    torch.testing.assert_close(goal(ours, theirs, batch)["total"], parts[0] + 0.5 * parts[1])
