"""Recipes: YAML files that OmegaConf merges and resolves, turned into checked calls of plain Python callables."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from llmkd.errors import ConfigError, LlmkdError, did_you_mean, unknown_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
NEEDED = (inspect.Parameter.POSITIONAL_ONLY, *NAMED)
REQUIREMENTS = {
    "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "a string",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "missing": "a value, the key is required", "extra_forbidden": "no such key",
}  # fmt: skip
Model = TypeVar("Model", bound=BaseModel)


class _Recipe(BaseModel):
    model: str | dict
    teacher: str | dict | None = None
    objective: str | dict | Annotated[list[str | dict], Field(min_length=1)]
    data: dict
    train: dict
    peft: dict | None = None
    reweighting: str | dict | None = None


def load(path: str | Path, overrides: Sequence[str] = (), schema: type[BaseModel] = _Recipe) -> dict[str, Any]:
    """Read a recipe: its `extends` chain merged parent first, then `a.b=value` overrides, then interpolation.

    Mappings merge deeply, lists replace, and a spec (not `data`) with another `name` replaces the parent's spec as a whole.
    Raises ConfigError for a missing or broken file, an unknown or missing key and a value of the wrong shape.
    """
    config = _read(Path(path), (), schema)
    for text in overrides:
        config = _override(config, text, schema)
    config = _plain(lambda: OmegaConf.create(config), str(path), resolve=True)
    check(schema, config, Path(path).stem)
    if "hub_token" in config.get("train", ()):
        raise ConfigError("train.hub_token: got a value; expected none: config.yaml would keep it. Set HF_TOKEN.")
    return config


def dump(config: Mapping[str, Any]) -> str:
    """Write a resolved recipe as YAML that `load` reads back unchanged, keys in the recipe's order."""

    def escape(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [escape(item) for item in value]
        return value.replace("${", r"\${") if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(escape(config)))


def _read(path: Path, children: tuple[Path, ...], schema: type[BaseModel]) -> dict[str, Any]:
    """One file merged over its parents, interpolation left alone."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: its 'extends' chain is a cycle; expected one that ends. Remove one 'extends'.")
    if not path.is_file():
        beside = sorted(found.name for found in path.parent.glob("*.yaml"))
        hint = f"; recipes beside it: {', '.join(beside)}{did_you_mean(path.name, beside)}" if beside else ""
        raise ConfigError(f"no recipe at '{path}'{f' (extended by {children[-1]})' if children else ''}{hint}")
    config = _plain(lambda: OmegaConf.load(path), str(path))
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: got a list; expected a mapping with the keys {', '.join(schema.model_fields)}.")
    extends = config.pop("extends", None)
    _check_top(config, str(path), schema)
    if extends is None:
        return config
    if not isinstance(extends, str):
        raise ConfigError(f"{path}: extends: got {extends!r}; expected the name of one recipe.")
    return _merge(_read(path.parent / extends, (*children, path.resolve()), schema), config)


def _plain(make: Callable[[], Any], what: str, resolve: bool = False) -> Any:
    """Plain dicts, lists and scalars of an OmegaConf object, its errors made ours."""
    try:
        plain = OmegaConf.to_container(make(), resolve=resolve, throw_on_missing=resolve)
        json.dumps(plain)  # a TypeError for the paths and bytes that tags make: a recipe holds plain values
        return plain
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{what}: broken YAML{place}: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{what}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error


def _check_top(config: Mapping[str, Any], what: str, schema: type[BaseModel]) -> None:
    for key in config:
        if key not in schema.model_fields:
            raise unknown_name(f"top-level key of {what}:", str(key), schema.model_fields)


def _merge(old: Any, new: Any, specs: bool = True) -> Any:
    """`new` merged into `old`; `specs`: a mapping is what its `name` says, and with another one something else."""
    if not isinstance(old, dict) or not isinstance(new, (dict, str)):
        return new
    if isinstance(new, str):
        return old if specs and old.get("name") == new else new
    if specs and "name" in new and old.get("name", new["name"]) != new["name"]:
        return new
    return old | {key: _merge(old.get(key), value, specs and key != "data") for key, value in new.items()}


def _override(config: dict[str, Any], text: str, schema: type[BaseModel]) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    what = f"override '{text}'"
    if not equals:
        raise ConfigError(f"{what}: got no '='; expected key=value, such as train.seed=1.")
    steps = key.strip().split(".")
    _check_top({steps[0]: None}, what, schema)
    return _put(config, steps, _plain(lambda: OmegaConf.from_dotlist([f"value={value}"]), what)["value"], what)


def _put(node: Any, steps: list[str], new: Any, what: str, specs: bool = True) -> Any:
    """A copy of `node` with `new` merged in at the path `steps`."""
    if not steps:
        return _merge(node, new, specs)
    step, rest = steps[0], steps[1:]
    specs = specs and step != "data"
    if node is None or isinstance(node, dict):
        return {**(node or {}), step: _put((node or {}).get(step), rest, new, what, specs)}
    if isinstance(node, list) and step.isdecimal() and int(step) < len(node):
        return [_put(item, rest, new, what, specs) if index == int(step) else item for index, item in enumerate(node)]
    wanted = f"an item number below {len(node)}" if isinstance(node, list) else "a mapping there. Set it as a whole"
    raise ConfigError(f"{what}: got '{step}' inside {node!r}; expected {wanted}.")


def build(kind: str, spec: str | Mapping[str, Any], tables: Mapping[str, Mapping[str, Callable]], **given: Any) -> Any:
    """Call what `spec` names, a key of `tables[kind]` or `pkg.module:attr`, with the spec's other keys as arguments.

    `given` are the program's arguments, offered at every level and left out where the callable does not name them. A
    parameter named after a kind is built first. A class gives an instance, a function its result; a function that still
    waits for positional arguments (a divergence: its rows) comes back with its keywords bound.
    Raises ConfigError for an unknown name or key, a missing key, a wrong type and a value that the callable refuses.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: got {spec!r}; expected a name or a mapping with 'name'.")
    target, parameters = _target(kind, name, tables[kind])
    rows = kind in ("divergence", "policy") and not isinstance(target, type)
    named = {key: p for key, p in parameters.items() if p.kind in NAMED and not (rows and _positional(p))}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {key: value for key, value in given.items() if key in named}
    for key, value in options.items():
        if key in given:
            raise ConfigError(f"{kind} {name}.{key}: got {value!r}; the program sets this. Remove it from the recipe.")
        if key not in named and not takes_any:
            raise unknown_name(f"key of {kind} {name}:", str(key), named or ["(none)"])
        if key in tables and isinstance(value, (str, Mapping)):
            arguments[key] = build(key, value, tables, **given)
        else:
            arguments[key] = _argument(target, named.get(key), value, f"{kind} {name}.{key}", key in tables)
    missing = [p for key, p in parameters.items() if p.default is p.empty and p.kind in NEEDED and key not in arguments]
    waiting = [] if isinstance(target, type) else [p.name for p in missing if _positional(p)]
    if absent := [p.name for p in missing if p.name not in waiting]:
        raise ConfigError(f"{kind} {name}: missing {', '.join(absent)}; expected a value. Add it to the recipe.")
    if rows or waiting:
        return functools.partial(target, **arguments) if arguments else target
    try:
        return target(**arguments)
    except LlmkdError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind} {name}: {' '.join(str(error).split())}") from error


def known_keys(callable: Callable) -> list[str]:
    """Keys that a recipe may set: named parameters, without a function's required positional ones (its caller's)."""
    parameters = inspect.signature(callable).parameters.values()
    is_class = isinstance(callable, type)
    return [p.name for p in parameters if p.kind in NAMED and (is_class or not _positional(p))]


def _positional(parameter: inspect.Parameter) -> bool:
    """Whether a call must give this parameter and may give it by position."""
    return parameter.default is parameter.empty and parameter.kind in NEEDED[:2]


def _target(kind: str, name: str, table: Mapping[str, Callable]) -> tuple[Callable, Mapping[str, inspect.Parameter]]:
    if name not in table and ":" not in name:
        raise unknown_name(kind, name, table)
    try:
        module, _, attribute = name.partition(":")
        target = table[name] if name in table else operator.attrgetter(attribute)(importlib.import_module(module))
        return target, inspect.signature(target).parameters
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{kind}: got '{name}': {error}; expected pkg.module:attr of a class or function. "
            "Check the spelling and that Python can import the module (PYTHONPATH)."
        ) from error


def _argument(target: Callable, parameter: inspect.Parameter | None, value: Any, where: str, is_kind: bool) -> Any:
    if parameter is None or parameter.annotation is parameter.empty or (value is None and parameter.default is None):
        return value
    function = inspect.unwrap(target.__init__ if isinstance(target, type) else target)
    holder = types.SimpleNamespace(__annotations__={"hint": parameter.annotation})
    try:  # one parameter at a time: a hint that exists for type checkers alone must not hide the others
        hint = typing.get_type_hints(holder, getattr(function, "__globals__", {}), include_extras=True)["hint"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return value
    return value if "Callable" in str(hint) and not is_kind else _checked(hint, value, where)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """Strict check; in JSON mode where needed, in which a list may become a tuple and a string a path or an enum."""
    try:
        adapter = TypeAdapter(hint)
        adapter.rebuild()
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError):
        return value  # nothing that pydantic knows: a tensor, a module
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        failure = error
    try:
        return adapter.validate_json(to_json(value), strict=True)
    except ValidationError as error:
        raise _explain(error, value, where) from error
    except PydanticSerializationError:
        raise _explain(failure, value, where) from failure


def _explain(failure: ValidationError, value: Any, where: str) -> ConfigError:
    found: dict[str, tuple[str, list[str]]] = {}
    for item in failure.errors(include_url=False):
        path, seen = where, value
        for step in item["loc"]:  # steps that are not in the value are names of a union's members
            inside: Any = dict(enumerate(seen)) if isinstance(seen, list | tuple) else seen
            if isinstance(inside, Mapping) and step in inside:
                path, seen = f"{path}.{step}", inside[step]
        missing = item["type"] == "missing"
        path, got = (f"{path}.{item['loc'][-1]}", "nothing") if missing else (path, repr(seen))
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        text = f"a number {text}" if text.startswith(("greater", "less")) else text
        requirements = found.setdefault(path, (got, []))[1]
        requirements.append(REQUIREMENTS.get(item["type"], " ".join(text.split())))
    lines = [f"{path}: got {got}; expected {' or '.join(dict.fromkeys(all_))}." for path, (got, all_) in found.items()]
    return ConfigError(" ".join(lines))


def check(model: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """Validate a block such as `data:` with a pydantic model; all its problems become one line of ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: got {value!r}; expected a mapping.")
    known = [field.alias or name for name, field in model.model_fields.items()]
    for key in value:
        if key not in known and model.model_config.get("extra") != "allow":
            raise unknown_name(f"key of {where}:", str(key), known)
    return _checked(model, value, where)


def training_arguments(block: Mapping[str, Any], output_dir_default: str, **forced: Any) -> TrainingArguments:
    """`transformers.TrainingArguments` from the `train:` block, verbatim; `forced` wins over the block.

    llmkd's only defaults are `output_dir` and `train_sampling_strategy` (group_by_length).
    Raises ConfigError for an unknown key, a wrong type and a value or combination that TrainingArguments refuses.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key, value in block.items():
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"train: unknown key '{key}'; expected a field of transformers.TrainingArguments{hint}")
        if key != "fsdp":  # takes true, which its type hint forbids
            _checked(hints[key], value, f"train.{key}")
    defaults = {"output_dir": output_dir_default, "train_sampling_strategy": "group_by_length"}
    try:
        return TrainingArguments(**{**defaults, **copy.deepcopy(dict(block)), **forced})
    except (TypeError, ValueError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
