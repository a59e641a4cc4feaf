"""Specs of a recipe become checked calls of plain functions and classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from llmkd.config import build, known_keys
from llmkd.errors import ConfigError

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]  # a hint that exists for type checkers alone


def fails(call, *words: str) -> str:
    """The ConfigError of `call()`: one line with all `words`."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


def forward_kl(log_t: torch.Tensor, log_s: torch.Tensor):
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def jsd(log_t: torch.Tensor, log_s: torch.Tensor, *, beta: float = 0.5):
    return beta * (log_t - log_s).sum(-1)


def strict_kl(log_t, log_s, *, alpha: float):
    return alpha * (log_t - log_s).sum(-1)


def linear(progress: float, *, start: float = 0.0, end: float = 1.0) -> float:
    return start + (end - start) * progress


def make(path: str, dtype: str = "auto"):
    return {"path": path, "dtype": dtype}


class Learned(torch.nn.Module):
    def __init__(self, vocab_size: int, width: int = 4):
        super().__init__()
        self.size = (vocab_size, width)


class Token:
    def __init__(self, divergence: Callable, schedule: Callable | None = None, weight: float = 1.0, mode: str = "a"):
        if weight < 0:
            raise ValueError(f"weight: got {weight};\nexpected at least 0.")
        self.divergence, self.schedule, self.weight, self.mode = divergence, schedule, weight, mode


@dataclasses.dataclass
class Half:
    """A hint that pydantic starts on and cannot finish."""

    part: Unknown


class Typed:
    def __init__(
        self,
        whole: int = 0,
        real: float = 0.0,
        flag: bool = False,
        text: str = "",
        choice: Literal["a", "b"] = "a",
        maybe: float | None = None,
        layers: list[int] | Literal["all"] = "all",
        pair: tuple[int, int] = (0, 0),
        folder: Path = Path(),
        positive: Annotated[float, Field(gt=0)] = 1.0,
        options: dict[str, float] | None = None,
        tensor: torch.Tensor | None = None,
        scorer: Callable[[str], float] | None = None,
        hidden: Unknown = None,
        half: Half | None = None,
        sloppy: float = None,  # type: ignore[assignment]  # noqa: RUF013
        untyped=None,
    ):
        self.values = {key: value for key, value in locals().items() if key != "self"}


TABLES: dict[str, dict[str, Any]] = {
    "divergence": {"forward_kl": forward_kl, "jsd": jsd, "strict_kl": strict_kl, "learned": Learned},
    "schedule": {"linear": linear},
    "objective": {"token": Token, "typed": Typed},
    "student": {"make": make},
}


def test_a_name_is_short_for_a_mapping_with_a_name():
    assert build("divergence", "forward_kl", TABLES) is forward_kl
    assert build("divergence", {"name": "forward_kl"}, TABLES) is forward_kl


def test_a_function_that_waits_for_rows_gets_its_keywords_bound():
    fn = build("divergence", {"name": "jsd", "beta": 1}, TABLES)
    assert isinstance(fn, functools.partial)
    assert fn.keywords == {"beta": 1.0}
    rows = torch.randn(2, 3)
    assert torch.equal(fn(rows, 0 * rows), rows.sum(-1))
    assert build("schedule", {"name": "linear", "end": 3.0}, TABLES)(0.5) == 1.5


def test_rows_are_no_recipe_keys():
    fails(lambda: build("divergence", {"name": "jsd", "log_t": 1}, TABLES), "'log_t'", "known: beta")
    fails(lambda: build("divergence", {"name": "forward_kl", "beta": 1}, TABLES), "'beta'", "(none)")


def test_a_function_is_called_and_a_class_gives_an_instance():
    assert build("student", {"name": "make", "path": "x"}, TABLES) == {"path": "x", "dtype": "auto"}
    learned = build("divergence", {"name": "learned", "vocab_size": 3}, TABLES)
    assert isinstance(learned, Learned)
    assert learned.size == (3, 4)


def test_parameters_named_after_a_kind_are_built_with_the_given_arguments():
    spec = {"name": "token", "divergence": {"name": "learned", "width": 2}, "schedule": "linear"}
    token = build("objective", spec, TABLES, vocab_size=7, unheard_of=1)
    assert token.divergence.size == (7, 2)
    assert token.schedule is linear
    assert build("objective", {"name": "token", "divergence": "jsd"}, TABLES).divergence is jsd
    ready = build("objective", {"name": "token", "divergence": jsd}, TABLES)
    assert ready.divergence is jsd
    fails(
        lambda: build("objective", {"name": "token", "divergence": "jds"}, TABLES), "divergence", "did you mean 'jsd'?"
    )


def test_a_recipe_may_not_set_what_the_program_gives():
    spec = {"name": "learned", "vocab_size": 3}
    fails(lambda: build("divergence", spec, TABLES, vocab_size=7), "learned.vocab_size", "got 3", "Remove it")


def test_unknown_names_and_keys_get_a_suggestion():
    fails(lambda: build("divergence", "foward_kl", TABLES), "'foward_kl'", "did you mean 'forward_kl'?")
    spec = {"name": "token", "divergence": "jsd", "wieght": 2}
    fails(lambda: build("objective", spec, TABLES), "objective token", "'wieght'", "mode", "did you mean 'weight'?")


@pytest.mark.parametrize("spec", [{"beta": 1}, {"name": 3}, 3, None, ["jsd"]])
def test_a_spec_needs_a_name(spec):
    fails(lambda: build("divergence", spec, TABLES), "divergence", repr(spec), "a name")


def test_missing_keys_are_named():
    fails(lambda: build("objective", "token", TABLES), "objective token", "missing divergence")
    fails(lambda: build("divergence", "strict_kl", TABLES), "divergence strict_kl", "missing alpha")
    fails(lambda: build("divergence", "learned", TABLES), "missing vocab_size")


def test_what_the_callable_refuses_is_one_line():
    spec = {"name": "token", "divergence": "jsd", "weight": -1}
    fails(lambda: build("objective", spec, TABLES), "objective token", "got -1.0", "expected at least 0")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("whole", 3, 3),
        ("real", 1, 1.0),
        ("flag", True, True),
        ("choice", "b", "b"),
        ("maybe", None, None),
        ("maybe", 2, 2.0),
        ("layers", "all", "all"),
        ("layers", [1, 2], [1, 2]),
        ("pair", [1, 2], (1, 2)),
        ("folder", "a/b", Path("a/b")),
        ("positive", 0.5, 0.5),
        ("options", {"a": 1}, {"a": 1.0}),
        ("tensor", "anything", "anything"),
        ("scorer", "anything", "anything"),
        ("hidden", [object], [object]),
        ("half", "anything", "anything"),
        ("sloppy", None, None),
        ("untyped", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_of_the_right_type(key, value, expected):
    got = build("objective", {"name": "typed", key: value}, TABLES).values[key]
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("whole", True, ["got True", "an integer"]),
        ("whole", 1.5, ["got 1.5", "an integer"]),
        ("whole", "3", ["got '3'", "an integer"]),
        ("real", True, ["got True", "a number"]),
        ("real", "abc", ["got 'abc'", "a number"]),
        ("real", "1.0", ["got '1.0'", "a number"]),
        ("real", None, ["got None", "a number"]),
        ("flag", 1, ["got 1", "true or false"]),
        ("flag", "yes", ["got 'yes'", "true or false"]),
        ("text", 3, ["got 3", "a string"]),
        ("choice", "c", ["got 'c'", "'a' or 'b'"]),
        ("maybe", "x", ["got 'x'", "a number"]),
        ("layers", "some", ["got 'some'", "a list or 'all'"]),
        ("layers", [1, "x"], ["typed.layers.1", "got 'x'", "an integer"]),
        ("pair", [1], ["typed.pair"]),
        ("pair", 1, ["got 1", "a list"]),
        ("positive", 0, ["got 0", "a number greater than 0"]),
        ("options", {"a": "x"}, ["typed.options.a", "got 'x'", "a number"]),
        ("options", 3, ["got 3", "a mapping"]),
        ("sloppy", "x", ["got 'x'", "a number"]),
    ],
)
def test_values_of_the_wrong_type(key, value, words):
    fails(lambda: build("objective", {"name": "typed", key: value}, TABLES), f"objective typed.{key}", *words)


def test_a_kind_that_is_neither_spec_nor_callable_is_an_error():
    fails(
        lambda: build("objective", {"name": "token", "divergence": 3}, TABLES), "token.divergence", "got 3", "callable"
    )
    fails(lambda: build("objective", {"name": "token", "divergence": None}, TABLES), "got None")


# ---------------------------------------------------------------- build: the user's own code


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from __future__ import annotations\n"
        "class Box:\n    @staticmethod\n    def focal(log_t, log_s, *, gamma: float = 2.0):\n        return gamma\n"
        "class Loose:\n    def __init__(self, **options):\n        self.options = options\n"
        "VALUE = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    (tmp_path / "my_imports.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_own_code_is_named_by_module_and_attribute(own_code):
    fn = build("divergence", {"name": "my_losses:Box.focal", "gamma": 3}, TABLES)
    assert fn(None, None) == 3.0
    fails(lambda: build("divergence", {"name": "my_losses:Box.focal", "gama": 3}, TABLES), "did you mean 'gamma'?")
    fails(lambda: build("divergence", {"name": "my_losses:Box.focal", "gamma": "x"}, TABLES), "got 'x'", "a number")


def test_own_code_with_open_keywords_takes_any_key_but_no_unnamed_given_argument(own_code):
    loose = build("objective", {"name": "my_losses:Loose", "a": 1, "b": "x"}, TABLES, vocab_size=3)
    assert loose.options == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("no_such_module:f", "no_such_module"),
        ("my_losses:nothing", "nothing"),
        ("my_losses:", "my_losses:"),
        (":f", ":f"),
        ("my_losses:VALUE", "not a callable"),
        ("my_broken:f", "invalid syntax"),
        ("my_imports:f", "no_such_package_at_all"),
        ("torch:relu", "signature"),
    ],
)
def test_own_code_that_cannot_be_used(own_code, name, word):
    fails(lambda: build("divergence", name, TABLES), f"'{name}'", word, "pkg.module:attr")


def test_known_keys():
    assert known_keys(jsd) == ["beta"]
    assert known_keys(forward_kl) == []
    assert known_keys(make) == ["dtype"]
    assert known_keys(Learned) == ["vocab_size", "width"]
    assert known_keys(Token) == ["divergence", "schedule", "weight", "mode"]
