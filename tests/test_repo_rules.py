"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmkd import build, config
from llmkd.config import known_keys
from llmkd.stages.recipe import StageRecipe

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "llmkd").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
STAGE_RECIPES = [path for path in RECIPES if "output_dir" in yaml.safe_load(path.read_text())]
TRAIN_RECIPES = [path for path in RECIPES if path not in STAGE_RECIPES]


def run_folder(path: Path) -> str:
    return f"runs/{path.relative_to(ROOT / 'recipes').with_suffix('')}"


LAYERS = """
errors
types
data.ids data.manifest
support
divergences schedules reweighting
policies
heads events
combined
fused
rows
mixture
objectives
agreement
distributed zero3 disk versions config students.tiny plots
meters weights vocabulary store
adapters
students teachers data
distiller
callbacks checkpoints mixing
trainer
stages
build
plan catalog sources token_view finished
run table
stages.runner stages.command
evaluation
smoke
hub report
usage
cli
__main__
""".strip().splitlines()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "llmkd").with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    """The layer of the longest name that the module is, or lies in."""
    places = {name: number for number, line in enumerate(LAYERS) for name in line.split()}
    parts = module.split(".")
    found = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(places[name] for name in found if name in places)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of llmkd that are imported anywhere in a file, for type checkers alone excepted."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "llmkd":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkd."):
            inner = [f"{node.module}.{alias.name}".removeprefix("llmkd.") for alias in node.names]
            modules = {name_of(path) for path in SOURCES}
            yield from (name if name in modules else str(node.module).removeprefix("llmkd.") for name in inner)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("llmkd.") for alias in node.names if alias.name.startswith("llmkd."))
        yield from imports(node)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    module = name_of(path)
    if module == "__init__":
        return  # public names, resolved on first use
    for target in imports(TREES[path]):
        inside = module.split(".")[0] == target.split(".")[0]
        assert inside or layer_of(target) < layer_of(module), f"{module} imports {target}"


@pytest.mark.parametrize("module", ["trainer", "distiller", "callbacks", "checkpoints", "mixing"])
def test_the_core_knows_no_concrete_method(module):
    interfaces = {"objectives.base", "teachers.base", "teachers", "students"}
    for target in imports(TREES[ROOT / "llmkd" / f"{module}.py"]):
        concrete = target.split(".")[0] in ("divergences", "objectives", "teachers", "students")
        assert not concrete or target in interfaces, f"{module} imports {target}"


def test_modules_of_tests_have_names_of_their_own():
    """They are imported by their base name, whichever folder they are in."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_divergences_and_drivers_stand_on_torch_alone():
    for path in SOURCES:
        if name_of(path).split(".")[0] in ("divergences", "support", "heads", "events", "fused", "rows", "objectives"):
            named = {n.module or "" for n in ast.walk(TREES[path]) if isinstance(n, ast.ImportFrom)}
            named |= {alias.name for n in ast.walk(TREES[path]) if isinstance(n, ast.Import) for alias in n.names}
            assert not {name.split(".")[0] for name in named} & {"transformers", "peft", "accelerate", "datasets"}, path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_things_have_a_docstring(path):
    tree = TREES[path]
    assert ast.get_docstring(tree) or path.name == "__main__.py"
    inside = [node for outer in tree.body if isinstance(outer, ast.ClassDef) for node in outer.body]
    for node in [*tree.body, *inside]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            private = any(isinstance(c, ast.ClassDef) and c.name.startswith("_") and node in c.body for c in tree.body)
            stub = any("staticmethod" in ast.unparse(d) or "property" in ast.unparse(d) for d in node.decorator_list)
            names = {"forward", "backward", "tensors", "vocab_size"}
            assert private or stub or node.name in names or ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_unsafe_is_called(path):
    for name, call in calls(TREES[path]):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        trusted = keywords.get("trust_remote_code")
        assert not (isinstance(trusted, ast.Constant) and trusted.value is True), (
            "code of strangers runs on request only"
        )
        assert name not in ("yaml.load", "eval", "exec", "os.system"), name
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        shell = keywords.get("shell")
        assert not (isinstance(shell, ast.Constant) and shell.value is True)
    for node in ast.walk(TREES[path]):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in modules} & {"pickle", "dill", "cloudpickle", "marshal"}


def texts() -> list[Path]:
    folders = ("llmkd", "recipes", "tests", "benchmarks", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path for path in found if path.suffix in (".py", ".yaml", ".json", ".md") or path.parent.name == ".ci"]
    return [*kept, *ROOT.glob("*.md"), ROOT / "pyproject.toml"]


def test_nothing_unfinished_and_no_path_of_one_machine():
    unfinished = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X:")))
    machine = re.compile(r"(?<![\w.])/(?:" + "|".join(("wo" + "rk", "tm" + "p", "ho" + "me", "ro" + "ot")) + r")/")
    for path in texts():
        text = path.read_text(errors="ignore")
        assert not unfinished.search(text), path
        assert not machine.search(text), path


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_extends_at_most_one(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("# "), "it begins with what it is for"
    parent = yaml.safe_load(text).get("extends")
    assert parent is None or "extends" not in yaml.safe_load((path.parent / parent).read_text()), "one level"


@pytest.mark.parametrize("path", TRAIN_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds(path, tmp_path):
    recipe = config.load(path)
    build.objective(recipe["objective"])
    build.data_spec(recipe)
    build.peft(recipe.get("peft"))
    arguments = config.training_arguments(recipe["train"], str(tmp_path), use_cpu=True)
    if path.parent.name != "base":
        assert arguments.output_dir == run_folder(path), "a run folder of its own"
    for kind, default in (("model", "pretrained"), ("teacher", "local")):
        spec = recipe.get(kind) or {}
        options = {"path": spec} if isinstance(spec, str) else dict(spec)
        target = build.TABLES[kind][options.pop("name", default)]
        assert set(options) <= set(known_keys(target)), f"{kind} of {path.name}"


@pytest.mark.parametrize("path", STAGE_RECIPES, ids=lambda path: path.stem)
def test_a_stage_recipe_names_what_there_is(path):
    recipe = config.load(path, (), StageRecipe)
    assert recipe["output_dir"] == run_folder(path)
    options = dict(recipe["stage"])
    assert set(options) - {"name"} <= set(known_keys(build.TABLES["stage"][options["name"]]))


def test_launch_configs_are_accelerates(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    found = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
    assert {path.stem for path in found} == {"ddp", "zero2", "zero3", "fsdp2"}
    for path in found:
        load_config_from_file(str(path))


def test_every_divergence_and_objective_has_a_recipe():
    named = " ".join(path.read_text() for path in RECIPES)
    for kind in ("divergence", "objective", "stage"):
        for name in build.TABLES[kind]:
            assert re.search(rf"\b{name}\b", named), f"no recipe names {kind} {name}"
