"""The student's licence follows from its sources', or is left open with a warning."""

from __future__ import annotations

import pytest
from gguf import GGUFWriter

from llmkd.hub.licence import RESTRICTED, inherited, licence_of


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Factory: a folder with a model's config and a card that names a licence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(name: str, header: str | None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if header is not None:
            (folder / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
        return str(folder)

    return make


def test_one_licence_of_both_is_the_students(model):
    found = inherited(
        {"model": model("small", "license: apache-2.0"), "teacher": {"path": model("large", "license: Apache-2.0")}}
    )
    assert (found.licence, found.warnings) == ("apache-2.0", [])


def test_two_permissive_ones_give_the_starts(model):
    found = inherited({"model": model("small", "license: mit"), "teacher": model("large", "license: apache-2.0")})
    assert (found.licence, found.warnings) == ("mit", [])


@pytest.mark.parametrize("name", RESTRICTED)
def test_a_teacher_that_restricts_its_outputs_is_warned_of(model, name):
    found = inherited({"model": model("small", "license: apache-2.0"), "teacher": model("large", f"license: {name}")})
    assert found.licence is None, "left to its author"
    assert len(found.warnings) == 1
    assert f"`{name}`, restricts the student: {RESTRICTED[name]}" in found.warnings[0]
    assert "the teacher" in found.warnings[0]


@pytest.mark.parametrize("header", [None, "tags: [a]", "license: [broken", "license: other"])
def test_an_unknown_licence_is_warned_of(model, header):
    found = inherited({"model": model("small", "license: apache-2.0"), "teacher": model("large", header)})
    assert found.licence is None
    assert len(found.warnings) == 1


def test_a_licence_that_is_not_in_the_table(model):
    large = model("large", "license: other\nlicense_name: Our-Own")
    found = inherited({"model": {"name": "depth", "layers": 2}, "teacher": large})
    assert found.licence == "our-own"
    assert "`our-own`, is not one that llmkd knows" in found.warnings[0]


def test_every_teacher_of_several_counts(model):
    """Also behind the student's own start, which has a part of the say."""
    names = ("apache-2.0", "gemma", "qwen")
    small, large, other = (model(name, f"license: {name}") for name in names)
    several = {"name": "ensemble", "teachers": [large, {"name": "partition", "teacher": {"path": other}}]}
    found = inherited({"model": small, "teacher": several})
    assert found.sources == {small: "apache-2.0", large: "gemma", other: "qwen"}
    assert found.licence is None
    assert [name in text for name, text in zip(names[1:], found.warnings, strict=True)] == [True, True]


def test_a_student_without_teacher_has_its_starts(model):
    found = inherited({"model": model("small", "license: llama3.2"), "teacher": None})
    assert found.licence == "llama3.2"
    assert "Llama" in found.warnings[0]


def test_a_name_on_the_hub_that_cannot_be_reached(model):
    found = inherited({"model": "org/small", "teacher": "org/large"})
    assert found.licence is None
    assert [("org/small" in text, "org/large" in text) for text in found.warnings] == [(True, False), (False, True)]


@pytest.mark.parametrize("named", ["Apache 2.0", None])
def test_a_gguf_file_names_its_own(tmp_path, named):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    if named:
        writer.add_license(named)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert licence_of(str(tmp_path / "model.gguf")) == ("apache-2.0" if named else None)
