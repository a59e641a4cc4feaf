"""Which models are compared: a run's student with its start and teacher, or models by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from llmkd import build
from llmkd import config as recipes
from llmkd.errors import ConfigError, did_you_mean
from llmkd.evaluation.suite import fingerprint
from llmkd.run import read_metrics
from llmkd.weights import Source, load_model, load_tokenizer, locate

OF_A_RUN = ("start", "teacher")
WEIGHTS = ("*.safetensors", "*.gguf", "*.json")
Made = tuple[Any, Any]


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        label: student, start, teacher, or the name that was given. path: what to show and where it lies.
        source: what from_pretrained takes, or None if `make` must build it. make: -> (model, tokenizer).
        fingerprint: changes when the weights do.
    """

    label: str
    path: str
    source: Source | None
    make: Callable[[], Made]
    fingerprint: str

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A folder or Hub name that any backend loads: what has no such thing is written to a temporary one."""
        if self.source is not None and self.source.gguf_file is None and not _is_adapter(self.source):
            yield self.source.path
            return
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = self.make()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            del model
            yield folder


def is_run(target: str) -> bool:
    """Whether a name is a run folder."""
    return (Path(target) / "config.yaml").is_file()


def find(target: str, baselines: Sequence[str] | None) -> tuple[Path, list[Target]]:
    """The folder that results go to, and the models, the one of interest first.

    Args:
        target: a run folder, a model's folder or a Hub name. baselines: start, teacher or models; None: all that a run has.

    Raises:
        ConfigError: a run that is not finished, a baseline that it has not, a name that is none.
    """
    if not is_run(target):
        wrong = next((name for name in baselines or () if name in OF_A_RUN), None)
        if wrong:
            raise ConfigError(
                f"--baseline: got '{wrong}' for '{target}', which is no run folder; expected a model. Name a Hub model or "
                "a folder, or evaluate the run."
            )
        models = [_named(target, "model"), *(_named(name, name) for name in baselines or ())]
        return Path("evaluations") / target.strip("./").replace("/", "--"), models
    run = Path(target)
    config = recipes.load(run / "config.yaml")
    if read_metrics(run).get("after") is None or not (run / "student").is_dir():
        raise ConfigError(
            f"'{run}' is a run that has not finished; expected its metrics.json and student. Go on with: "
            f"llmkd train {run / 'config.yaml'} train.output_dir={run} --resume"
        )
    wanted = (
        [*(name for name in OF_A_RUN if name == "start" or config.get("teacher"))] if baselines is None else baselines
    )
    return run, [_student(run, config), *(_baseline(name, config) for name in wanted)]


def _student(run: Path, config: Mapping[str, Any]) -> Target:
    """The run's student; an adapter is folded into the start that it was trained on, which may be a cut model."""
    student = _of_spec({"path": str(run / "student")}, "student")
    if not _is_adapter(student.source):
        return student

    def make() -> Made:
        base, tokenizer = _built(config)
        return _merged(base, student.path), tokenizer

    return replace(student, make=make)


def _baseline(name: str, config: Mapping[str, Any]) -> Target:
    if name == "start":
        return _start(config)
    if name != "teacher":
        return _named(name, name)
    spec = build.part(config, "teacher")
    if spec is None:
        raise ConfigError("--baseline: got 'teacher', but the run has none; expected start or a model. Leave it out.")
    if spec["name"] != "local":
        raise ConfigError(
            f"--baseline: the teacher is '{spec['name']}', no single model; expected a local one. Leave it out."
        )
    return _of_spec(spec, "teacher")


def _start(config: Mapping[str, Any]) -> Target:
    """The student as it was before the first step."""
    spec = build.part(config, "model")
    if spec["name"] == "pretrained" and not spec.get("num_labels"):
        return _of_spec(spec, "start")

    relevant = [config.get(key) for key in ("model", "teacher")], config["train"].get("seed", 42)
    return Target("start", f"{spec['name']} of the recipe", None, partial(_built, config), fingerprint(relevant))


def _built(config: Mapping[str, Any]) -> Made:
    """A recipe's student before its first step."""
    set_seed(config["train"].get("seed", 42))  # as before a training: a new head is drawn at random
    parts = build.parts(config)
    return parts.model, parts.tokenizer


def _named(name: str, label: str) -> Target:
    hint = did_you_mean(name, OF_A_RUN) if "/" not in name and not Path(name).exists() else ""
    if hint:
        raise ConfigError(f"--baseline: got '{name}'; expected start, teacher or a model{hint}")
    return _of_spec({"path": name}, label)


def _of_spec(spec: Mapping[str, Any], label: str) -> Target:
    source = locate(spec["path"], spec.get("gguf_file"), spec.get("revision"))

    def make() -> Made:
        if _is_adapter(source):
            return _merged(_base_of(source.path), source.path), load_tokenizer(source)
        return load_model(source, spec.get("dtype", "auto"), spec.get("trust_remote_code", False)), load_tokenizer(
            source
        )

    return Target(
        label, spec["path"], source, make, fingerprint(spec["path"], source.kwargs(), _state(Path(source.path)))
    )


def _state(folder: Path) -> list[Any]:
    """Names, sizes and times of a folder's weights and settings; nothing for a Hub name."""
    if not folder.is_dir():
        return []
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _merged(base: Any, folder: str) -> Any:
    """A model with the adapter of a folder in it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).merge_and_unload()  # type: ignore[operator]


def _base_of(folder: str) -> Any:
    from peft import PeftConfig

    return load_model(locate(PeftConfig.from_pretrained(folder).base_model_name_or_path or ""))


def _is_adapter(source: Source | None) -> bool:
    return source is not None and (Path(source.path) / "adapter_config.json").is_file()
