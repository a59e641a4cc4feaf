"""Blocks of a recipe: pydantic models and `transformers.TrainingArguments`, wrong values explained on one line."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from llmkd.config import check, training_arguments
from llmkd.errors import ConfigError


def fails(call, *words: str) -> str:
    """The ConfigError of `call()`: one line with all `words`."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


class Chat(BaseModel):
    template: str = ""


class Data(BaseModel):
    path: str
    max_length: int = Field(64, gt=1)
    split: Literal["train", "test"] = "train"
    ratios: tuple[float, ...] = ()
    chat: Chat | None = None


def test_check_gives_the_model():
    data = check(Data, {"path": "a", "max_length": 3, "ratios": [1, 0.5], "chat": {"template": "x"}}, "data")
    assert data == Data(path="a", max_length=3, ratios=(1.0, 0.5), chat=Chat(template="x"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"path": "a", "max_length": "abc"}, ["data.max_length: got 'abc'; expected an integer."]),
        ({"path": "a", "max_length": 1}, ["data.max_length: got 1; expected a number greater than 1."]),
        ({}, ["data.path: got nothing", "required"]),
        ({"path": "a", "max_lenght": 3}, ["key of data", "'max_lenght'", "did you mean 'max_length'?"]),
        ({"path": "a", "split": "dev"}, ["data.split: got 'dev'; expected 'train' or 'test'."]),
        ({"path": 3, "ratios": ["x"]}, ["data.path: got 3", "a string", "data.ratios.0: got 'x'", "a number"]),
        ({"path": "a", "chat": {"template": 3}}, ["data.chat.template: got 3", "a string"]),
        ({"path": "a", "chat": 3}, ["data.chat: got 3"]),
        ("abc", ["data: got 'abc'", "a mapping"]),
    ],
)
def test_check_names_key_value_and_requirement(value, words):
    fails(lambda: check(Data, value, "data"), *words)


# ---------------------------------------------------------------- training arguments


def test_training_arguments_are_verbatim_with_two_defaults(tmp_path):
    block = {"learning_rate": 1e-3, "logging_steps": 5, "max_grad_norm": 1, "report_to": "none", "use_cpu": True}
    args = training_arguments(block, str(tmp_path / "run"))
    assert (args.learning_rate, args.logging_steps, args.output_dir) == (1e-3, 5, str(tmp_path / "run"))
    assert args.train_sampling_strategy == "group_by_length"


def test_block_beats_defaults_and_forced_beats_the_block(tmp_path):
    block = {"output_dir": str(tmp_path / "mine"), "train_sampling_strategy": "random", "remove_unused_columns": True}
    args = training_arguments(block, "elsewhere", remove_unused_columns=False, use_cpu=True)
    assert args.output_dir == str(tmp_path / "mine")
    assert args.train_sampling_strategy == "random"
    assert args.remove_unused_columns is False
    assert block["remove_unused_columns"] is True


def test_the_block_is_left_as_it_was(tmp_path):
    block = {"lr_scheduler_kwargs": {"num_cycles": 2}, "use_cpu": True}
    training_arguments(block, str(tmp_path)).lr_scheduler_kwargs["num_cycles"] = 3  # type: ignore[index]
    assert block["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_fsdp_takes_true(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it; undone after the test
    assert training_arguments({"fsdp": True, "use_cpu": True}, str(tmp_path)).fsdp is True


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"lerning_rate": 1e-3}, ["'lerning_rate'", "TrainingArguments", "did you mean 'learning_rate'?"]),
        ({"learning_rate": "fast"}, ["train.learning_rate", "got 'fast'", "a number"]),
        ({"learning_rate": "1e-3"}, ["train.learning_rate", "got '1e-3'", "a number"]),
        ({"max_steps": True}, ["train.max_steps", "got True", "an integer"]),
        ({"label_names": [1]}, ["train.label_names.0", "got 1", "a string"]),
        ({"save_strategy": 3}, ["train.save_strategy", "got 3", "a string"]),
        ({"save_strategy": "sometimes"}, ["train:", "sometimes"]),
        ({"logging_strategy": "steps", "logging_steps": 0}, ["train:", "logging_steps"]),
        ({"load_best_model_at_end": True}, ["train:", "load_best_model_at_end"]),
    ],
)
def test_training_argument_errors_are_one_line(tmp_path, block, words):
    fails(lambda: training_arguments({"use_cpu": True, **block}, str(tmp_path)), *words)
