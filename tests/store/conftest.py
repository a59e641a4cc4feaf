"""One teacher and one corpus for all tests of stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from shelf import save_teacher, save_texts


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return save_texts(tmp_path_factory.mktemp("corpus") / "texts.jsonl")
