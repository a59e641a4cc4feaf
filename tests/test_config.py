"""Recipes: files, `extends`, overrides, interpolation, and the way back to YAML."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmkd.config import dump, load
from llmkd.errors import ConfigError

BASE = """
model: tiny
objective: {name: token, divergence: {name: skew_kl, alpha: 0.1}, weight: 1.0}
data: {path: a.jsonl, max_length: 64}
train: {learning_rate: 1e-4, weight_decay: 1.0e-2, seed: 1}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def fails(call, *words: str) -> str:
    """The ConfigError of `call()`: one line with all `words`."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


# ---------------------------------------------------------------- load: files and merging


def test_load_gives_plain_values(recipe):
    config = load(recipe(BASE))
    assert type(config) is dict
    assert type(config["objective"]["divergence"]) is dict
    assert config["train"] == {"learning_rate": 1e-4, "weight_decay": 1e-2, "seed": 1}
    assert isinstance(config["train"]["learning_rate"], float)
    assert list(config) == ["model", "objective", "data", "train"]


def test_load_takes_a_path_as_text(recipe):
    assert load(str(recipe(BASE)))["model"] == "tiny"


def test_extends_is_a_chain_relative_to_each_file(recipe):
    recipe(BASE, "base.yaml")
    recipe("extends: ../base.yaml\ntrain: {seed: 2, bf16: true}\n", "sub/middle.yaml")
    config = load(recipe("extends: sub/middle.yaml\ntrain: {bf16: false}\n"))
    assert config["train"] == {"learning_rate": 1e-4, "weight_decay": 1e-2, "seed": 2, "bf16": False}
    assert "extends" not in config


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        ("{divergence: {name: skew_kl, beta: 2}}", {"name": "skew_kl", "alpha": 0.1, "beta": 2}),
        ("{divergence: {alpha: 0.3}}", {"name": "skew_kl", "alpha": 0.3}),
        ("{divergence: {name: jsd, beta: 2}}", {"name": "jsd", "beta": 2}),
        ("{divergence: jsd}", "jsd"),
        ("{divergence: skew_kl}", {"name": "skew_kl", "alpha": 0.1}),
        ("{divergence: null}", None),
    ],
)
def test_a_spec_with_another_name_replaces_the_parents(recipe, child, expected):
    recipe(BASE, "base.yaml")
    config = load(recipe(f"extends: base.yaml\nobjective: {child}\n"))
    assert config["objective"] == {"name": "token", "divergence": expected, "weight": 1.0}


def test_under_data_a_name_is_a_value_like_others(recipe):
    """The Hub's name of a data set's configuration: another one keeps the path beside it."""
    data = "data: {path: user/texts, name: en, eval: {path: user/more, name: en, split: test}}"
    recipe(re.sub(r"data: .*", data, BASE), "base.yaml")
    config = load(recipe("extends: base.yaml\ndata: {name: de, eval: {name: de}}\n"), ["data.eval={split: dev}"])
    assert config["data"] == {
        "path": "user/texts",
        "name": "de",
        "eval": {"path": "user/more", "name": "de", "split": "dev"},
    }


def test_a_mapping_replaces_a_parents_string_and_a_name_joins_a_nameless_parent(recipe):
    recipe(BASE.replace("model: tiny", "model: tiny\nteacher: {dtype: bfloat16}"), "base.yaml")
    config = load(recipe("extends: base.yaml\nmodel: {name: depth}\nteacher: {name: local}\n"))
    assert config["model"] == {"name": "depth"}
    assert config["teacher"] == {"dtype": "bfloat16", "name": "local"}


def test_lists_replace(recipe):
    recipe(BASE.replace("seed: 1", "seed: 1, label_names: [a, b]"), "base.yaml")
    config = load(recipe("extends: base.yaml\ntrain: {label_names: [c]}\nobjective: [token, {name: jsd}]\n"))
    assert config["train"]["label_names"] == ["c"]
    assert config["objective"] == ["token", {"name": "jsd"}]


def test_an_extends_cycle_is_an_error(recipe):
    recipe("extends: b.yaml\n", "a.yaml")
    path = recipe("extends: a.yaml\n", "b.yaml")
    fails(lambda: load(path), "b.yaml", "cycle", "extends")
    fails(lambda: load(recipe("extends: self.yaml\n", "self.yaml")), "cycle")


def test_extends_must_be_one_name(recipe):
    fails(lambda: load(recipe(BASE + "extends: [a.yaml, b.yaml]\n")), "['a.yaml', 'b.yaml']", "one recipe")


def test_a_missing_file_names_the_recipes_beside_it(recipe, tmp_path):
    recipe(BASE, "quickstart.yaml")
    recipe(BASE, "jsd.yaml")
    missing = tmp_path / "quikstart.yaml"
    fails(lambda: load(missing), str(missing), "jsd.yaml, quickstart.yaml", "did you mean 'quickstart.yaml'?")
    message = fails(lambda: load(tmp_path / "empty" / "a.yaml"), "a.yaml")
    assert "beside" not in message
    fails(lambda: load(recipe("extends: bas.yaml\n")), "bas.yaml", "extended by", "recipe.yaml")
    fails(lambda: load(tmp_path), "no recipe at", str(tmp_path))


def test_broken_yaml_names_line_and_column(recipe):
    fails(lambda: load(recipe("model: a\ntrain: {x: 1\ndata: b\n")), "recipe.yaml", "line 3, column 5")
    fails(lambda: load(recipe("model: a\nmodel: b\n")), "line 2", "duplicate key model")
    fails(lambda: load(recipe("model: \x07\n")), "recipe.yaml", "control characters")


@pytest.mark.parametrize("tag", ["object/apply:os.getcwd []", "object/apply:pathlib.Path [x]", "tuple [1]"])
def test_python_tags_are_errors(recipe, tag):
    fails(lambda: load(recipe(BASE + f"peft: {{r: !!python/{tag}}}\n")), "recipe.yaml")


def test_a_file_that_is_not_text_or_not_a_mapping(recipe, tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    fails(lambda: load(tmp_path / "bytes.yaml"), "bytes.yaml", "utf-8")
    fails(lambda: load(recipe("- a\n")), "got a list", "expected a mapping", "model")
    fails(lambda: load(recipe("5\n")), "recipe.yaml")


# ---------------------------------------------------------------- load: keys, shapes, interpolation


def test_unknown_top_level_keys_get_a_suggestion(recipe):
    fails(lambda: load(recipe(BASE + "tain: {}\n")), "recipe.yaml", "'tain'", "did you mean 'train'?", "peft")
    recipe(BASE + "studnt: x\n", "base.yaml")
    fails(lambda: load(recipe("extends: base.yaml\n")), "base.yaml", "'studnt'")
    fails(lambda: load(recipe(BASE), ["trian.seed=2"]), "override 'trian.seed=2'", "did you mean 'train'?")
    fails(lambda: load(recipe(BASE), ["extends=x.yaml"]), "extends")


@pytest.mark.parametrize("key", ["model", "objective", "data", "train"])
def test_required_keys(recipe, key):
    text = "\n".join(line for line in BASE.splitlines() if not line.startswith(key))
    fails(lambda: load(recipe(text)), f"recipe.{key}", "nothing", "required")


def test_an_empty_file_misses_everything(recipe):
    fails(lambda: load(recipe("")), "model", "objective", "data", "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train=3", ["recipe.train", "got 3", "a mapping"]),
        ("train=null", ["recipe.train", "got None", "a mapping"]),
        ("data=[a]", ["recipe.data", "got ['a']", "a mapping"]),
        ("objective=3", ["recipe.objective", "got 3", "a string or a mapping or a list"]),
        ("objective=[]", ["recipe.objective", "got []"]),
        ("objective=[jsd, 4]", ["recipe.objective.1", "got 4", "a string or a mapping"]),
        ("model=null", ["recipe.model", "got None"]),
        ("teacher=[a]", ["recipe.teacher", "['a']"]),
        ("peft=lora", ["recipe.peft", "'lora'", "a mapping"]),
    ],
)
def test_wrong_shapes(recipe, change, words):
    fails(lambda: load(recipe(BASE), [change]), *words)


def test_teacher_and_peft_may_be_null(recipe):
    config = load(recipe(BASE + "teacher: null\npeft: null\n"))
    assert config["teacher"] is None
    assert config["peft"] is None


def test_interpolation_sees_parents_and_overrides(recipe):
    recipe(BASE + "peft: {r: 8, lora_alpha: '${peft.r}', note: 'r ${.r}'}\n", "base.yaml")
    config = load(recipe("extends: base.yaml\npeft: {r: 16}\n"), ["peft.r=32", "train.run_name='run-${train.seed}'"])
    assert config["peft"] == {"r": 32, "lora_alpha": 32, "note": "r 32"}
    assert config["train"]["run_name"] == "run-1"


@pytest.mark.parametrize("value", ["${nope}", "${train.nope}", "${oc.env:LLMKD_NO_SUCH_VARIABLE}", "${", "${model}${"])
def test_what_cannot_be_resolved_is_an_error(recipe, value):
    fails(lambda: load(recipe(BASE + f"peft: {{r: '{value}'}}\n")), "recipe.yaml", "peft")


def test_interpolation_cycles_and_mandatory_values(recipe):
    fails(lambda: load(recipe(BASE + "peft: {a: '${peft.b}', b: '${peft.a}'}\n")), "peft", "Recursive")
    path = recipe(BASE + "teacher: {path: '???'}\n")
    fails(lambda: load(path), "teacher.path", "mandatory")
    assert load(path, ["teacher.path=x"])["teacher"] == {"path": "x"}


# ---------------------------------------------------------------- load: overrides


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("seed=2", "seed", 2),
        ("learning_rate=3e-5", "learning_rate", 3e-5),
        ("bf16=true", "bf16", True),
        ("seed=null", "seed", None),
        ("report_to=[a, b]", "report_to", ["a", "b"]),
        ("run_name=a=b=c", "run_name", "a=b=c"),
        ("run_name='1'", "run_name", "1"),
        ("lr_scheduler_kwargs.num_cycles=2", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("lr_scheduler_kwargs={num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_override_values_are_yaml(recipe, text, key, expected):
    value = load(recipe(BASE), [f"train.{text}"])["train"][key]
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_apply_in_order_and_keep_the_rest(recipe):
    config = load(recipe(BASE), ["train.seed=2", "train.seed=3", "peft=null", "peft.r=8"])
    assert config["train"] == {"learning_rate": 1e-4, "weight_decay": 1e-2, "seed": 3}
    assert config["peft"] == {"r": 8}


def test_overrides_reach_into_lists(recipe):
    path = recipe(BASE.replace("objective: {", "objective:\n  - jsd\n  - {"))
    config = load(path, ["objective.1.weight=2", "objective.1.divergence.alpha=0.5", "objective.0=ce"])
    assert config["objective"] == [
        "ce",
        {"name": "token", "divergence": {"name": "skew_kl", "alpha": 0.5}, "weight": 2},
    ]
    fails(lambda: load(path, ["objective.2.weight=2"]), "objective.2.weight=2", "got '2'", "below 2")
    fails(lambda: load(path, ["objective.weight=2"]), "got 'weight'", "below 2")
    fails(lambda: load(path, ["objective.0.weight=2"]), "'weight'", "'jsd'", "a mapping", "as a whole")


def test_override_with_a_mapping_follows_the_merge_rule(recipe):
    path = recipe(BASE)
    same = load(path, ["objective.divergence={name: skew_kl, beta: 1}"])["objective"]["divergence"]
    other = load(path, ["objective.divergence={name: jsd}"])["objective"]["divergence"]
    assert same == {"name": "skew_kl", "alpha": 0.1, "beta": 1}
    assert other == {"name": "jsd"}


def test_broken_overrides(recipe):
    path = recipe(BASE)
    fails(lambda: load(path, ["train.seed"]), "'train.seed'", "key=value")
    fails(lambda: load(path, ["train.seed=[1"]), "train.seed=[1", "broken YAML")
    fails(lambda: load(path, ["train.seed=!!python/object/apply:os.getcwd []"]), "override")


# ---------------------------------------------------------------- dump


def test_dump_reads_back_as_the_same_config_in_the_same_order(recipe):
    text = BASE + "peft: {template: '\\${not_an_interpolation} {{ x }}', rate: 1e-5, text: '1e-5', flag: 'yes'}\n"
    config = load(recipe(text), ["objective.weight=2"])
    assert config["peft"]["template"] == "${not_an_interpolation} {{ x }}"
    again = load(recipe(dump(config), "again.yaml"))
    assert again == config
    assert list(again) == list(config)
    assert dump(again) == dump(config)


def test_the_loader_starts_without_torch_and_transformers():
    code = "import sys, llmkd.config; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
