"""What a model or a tokenizer is, told in a few bytes: a stage's result depends on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmkd.versions import versions
from llmkd.weights import Source, load_config, standing_in

DEPENDS = ("llmkd", "torch", "transformers", "datasets")
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "config.json", "adapter_config.json")
BLOCK = 2**16
BLOCKS = 64


def software() -> dict[str, str]:
    """Versions of the packages that make a stage's bytes."""
    found = versions()
    return {name: found[name] for name in DEPENDS if name in found}


def model_revision(source: Source) -> str:
    """The Hub's commit of a model, or a digest of a folder's weights and config.

    Of a large file the digest takes its size and 64 evenly spaced blocks: a training step changes them all.
    """
    if standing_in():
        return "stand-in"
    folder = Path(source.path)
    if not folder.is_dir():
        commit = getattr(load_config(source), "_commit_hash", None)
        return str(commit or source.revision or "unknown")
    names = [source.gguf_file] if source.gguf_file else WEIGHTS
    digest = hashlib.sha256()
    for file in sorted(path for name in names for path in folder.glob(name)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(_sample(file))
    return digest.hexdigest()


def _sample(file: Path) -> bytes:
    """SHA-256 of a small file, or of evenly spaced blocks of a large one."""
    size, digest = file.stat().st_size, hashlib.sha256()
    step = max(BLOCK, (size - BLOCK) // (BLOCKS - 1))
    with file.open("rb") as opened:
        for start in range(0, size, step):
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that a fast tokenizer does to a text, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
