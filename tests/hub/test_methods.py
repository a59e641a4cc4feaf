"""Which methods a recipe uses, with all their options, and what is cited for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmkd import catalog, config
from llmkd.hub.methods import Used, bibtex, used

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
ENTRIES = {(entry.kind, entry.name): entry for entry in catalog.entries()}


def names(recipe):
    return [(part.kind, part.name) for part in used(recipe)]


def test_what_is_named_and_what_is_taken_by_default():
    recipe = {
        "model": "org/small",
        "teacher": {"path": "org/large"},
        "objective": [
            {"name": "token", "divergence": {"name": "standardised", "tau": 2.0}, "policy": "confidence_gate"},
            {"name": "token", "temperature": {"name": "linear", "start": 1.0, "end": 2.0}, "weight": 0.5},
            "cross_entropy",
        ],
    }
    assert sorted(names(recipe)) == sorted(
        [
            ("objective", "token"), ("divergence", "standardised"), ("divergence", "forward_kl"),
            ("policy", "confidence_gate"), ("objective", "token"), ("schedule", "linear"),
            ("objective", "cross_entropy"), ("teacher", "local"), ("model", "pretrained"),
        ]
    )  # fmt: skip
    parts = used(recipe)
    assert parts[[(p.kind, p.name) for p in parts].index(("divergence", "standardised"))].options["tau"] == 2.0
    second = [part for part in parts if part.kind == "objective"][1]
    assert (second.weight, second.options["divergence"], second.options["scale_by_t2"]) == (0.5, "forward_kl", False)


def test_the_users_own_code_has_no_entry():
    parts = used({"objective": {"name": "token", "divergence": "my_losses:squared"}})
    own = next(part for part in parts if part.kind == "divergence")
    assert (own.name, own.entry) == ("my_losses:squared", None)
    assert [entry.partition("{")[2].partition(",")[0] for entry in bibtex(parts)] == ["hinton2015"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_described_from_docstrings(path):
    recipe = config.load(path)
    parts = used(recipe)
    assert all(part.entry == ENTRIES[part.kind, part.name] for part in parts)
    objective = recipe["objective"]
    for text in re.findall(r"'name': '(\w+)'", str(objective)):
        assert text in {part.name for part in parts}
    cited = "\n".join(bibtex(parts))
    papers = [part.entry.paper for part in parts if not part.entry.paper.startswith("no paper")]
    for number in re.findall(r"arXiv (\d{4}\.\d{5})", "; ".join(papers)):
        assert cited.count(f"eprint = {{{number}}}") == 1
    others = {number for entry in ENTRIES.values() for number in re.findall(r"\d{4}\.\d{5}", entry.paper)}
    used_numbers = {number for part in parts for number in re.findall(r"\d{4}\.\d{5}", part.entry.paper)}
    assert not [number for number in others - used_numbers if number in cited]


@pytest.mark.parametrize("entry", list(ENTRIES.values()), ids=[f"{kind}-{name}" for kind, name in ENTRIES])
def test_a_citation_says_no_more_than_its_docstring(entry):
    for text in bibtex([Used(entry.kind, entry.name, {}, None, entry)]):
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.MULTILINE))
        assert text.count("{") == text.count("}")
        assert fields["year"] in entry.paper
        assert fields.get("eprint", "") in entry.paper
        for name in fields.get("author", "").replace(" and others", "").split(" and "):
            assert name in entry.paper
        assert fields["title"].strip("{}").removeprefix("arXiv:") in entry.paper
        assert set(fields) <= {"author", "title", "year", "eprint", "archivePrefix", "url", "note"}


def test_two_papers_of_one_docstring_are_two_entries():
    parts = used({"objective": {"name": "token", "divergence": "standardised"}})
    keys = re.findall(r"@misc\{(\w+),", "\n".join(bibtex(parts)))
    assert {"choi2023mixup", "sun2024", "hinton2015"} <= set(keys)
    assert len(set(keys)) == len(keys)
