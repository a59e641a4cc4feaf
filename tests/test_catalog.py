"""Every table entry says what it computes and from which paper; README's table is what the code says."""

from __future__ import annotations

import inspect

import pytest

from benchmarks import docs
from llmkd import catalog
from llmkd.build import TABLES

ENTRIES = catalog.entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.kind}-{entry.name}" for entry in ENTRIES])
def test_an_entry_has_a_formula_and_a_paper(entry):
    assert entry.formula
    assert len(entry.formula) <= 200, "one line"
    assert entry.paper
    if entry.kind in ("divergence", "objective", "policy", "stage", "score"):
        assert entry.fidelity, "how it was checked, or 'derived'"
        assert "=" in entry.formula or "sum" in entry.formula


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.kind}-{entry.name}" for entry in ENTRIES])
def test_an_entry_documents_every_knob(entry):
    target = TABLES[entry.kind][entry.name]
    text = inspect.getdoc(target) or ""
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.default is not parameter.empty and not name.endswith("_model"):
            assert name in text, f"{name} is not in the docstring"


def test_every_entry_of_every_table_is_listed():
    assert {(entry.kind, entry.name) for entry in ENTRIES} == {(kind, name) for kind in TABLES for name in TABLES[kind]}
    assert {entry.kind for entry in catalog.entries("divergence")} == {"divergence"}


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.kind}-{entry.name}" for entry in ENTRIES])
def test_what_is_read_from_source_is_what_python_says(entry):
    target = TABLES[entry.kind][entry.name]
    parameters = inspect.signature(target).parameters.values()
    shown = [p for p in parameters if p.default is not p.empty and p.default is not None]
    assert entry.knobs == ", ".join(f"{p.name}={getattr(p.default, '__name__', repr(p.default))}" for p in shown)
    assert " ".join((inspect.getdoc(target) or "").split()).startswith(entry.formula)


def test_a_field_is_read_to_its_end():
    jsd = next(entry for entry in ENTRIES if entry.name == "jsd")
    assert jsd.formula.startswith("JSD_b(p, q) = b KL(p || m)")
    assert jsd.paper == "Agarwal et al. 2024 (GKD), arXiv 2306.13649, eq. 1"
    assert jsd.knobs == "beta=0.5"


def test_the_markdown_is_a_table_with_a_line_for_each_method():
    lines = catalog.markdown().splitlines()
    assert len(lines) == 2 + sum(len(catalog.entries(kind)) for kind in catalog.METHODS)
    columns = {line.replace(r"\|", "").count("|") for line in lines}
    assert columns == {6}


def test_generated_pages_are_what_code_recipes_and_results_say():
    for file, text in docs.pages().items():
        assert file.read_text() == text, f"{file.name} is stale; run: python -m benchmarks docs"
