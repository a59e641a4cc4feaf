"""`llmkd push` with the real client against a local server: what is sent, what never is, and faults on the way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKEN = "hf_" + "secret" * 5
REPO = "me/student"
SENT = {"README.md", "recipe.yaml", "metrics.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def adapted_run(adapted, tmp_path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "run"))


@pytest.fixture
def hub(llmkd, monkeypatch):
    """A Hub that this process and its children push to."""
    made = FakeHub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a server of its own, not HTTP alone
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield made
    made.close()


def test_everything_arrives_and_loads(llmkd, hub, run, tmp_path):
    done = llmkd("push", run, REPO)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"pushed: {hub.url}/{REPO}/commit/{1:040d}"
    assert set(hub.files[REPO]) == SENT
    for name, content in hub.files[REPO].items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "got").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(run / "student").state_dict().items():
        assert torch.equal(got[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "got").decode([10]) != ""
    assert hub.files[REPO]["recipe.yaml"] == (run / "config.yaml").read_bytes()


def test_the_token_is_sent_and_never_shown(llmkd, hub, run):
    done = llmkd("push", run, REPO)
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}, "and none where the file goes to its storage"
    for text in (done.out, done.err, *(file.read_text(errors="ignore") for file in run.rglob("*") if file.is_file())):
        assert TOKEN not in text


def test_a_second_push_sends_nothing(llmkd, hub, run):
    llmkd("push", run, REPO)
    again = llmkd("push", run, REPO)
    assert again.code == 0, again.err
    assert (hub.commits, hub.calls["put"]) == (1, 1)


def test_a_dry_run_lists_every_file_and_its_size_and_asks_nobody(llmkd, hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = llmkd("push", run, REPO, "--dry-run")
    assert done.code == 0, done.err
    listed = dict(line.split()[::-1] for line in done.out.splitlines() if len(line.split()) == 2)
    assert set(listed) == SENT
    assert int(listed["model.safetensors"].replace(",", "")) == (run / "student/model.safetensors").stat().st_size
    assert "whole model" in done.out
    assert not hub.calls


@pytest.mark.parametrize(
    ("endpoint", "faults"),
    [
        ("create", [500, 503]),
        ("create", ["drop", 500]),
        ("create", ["lose"]),
        ("preupload", [500, "drop"]),
        ("batch", [502, "drop"]),
        ("put", [500, "drop", "drop"]),
        ("put", ["lose"]),
        ("commit", [500, 504]),
        ("commit", ["drop", 429]),
        ("commit", ["lose"]),
    ],
)
def test_what_passes_is_tried_again(llmkd, hub, run, endpoint, faults):
    hub.faults[endpoint] = list(faults)
    done = llmkd("push", run, REPO)
    assert done.code == 0, done.err
    assert not hub.faults[endpoint], "every fault happened"
    assert set(hub.files[REPO]) == SENT
    assert hub.commits == 1, "one commit, also if the answer to it was lost"


def test_a_push_that_failed_goes_on(llmkd, hub, run):
    hub.faults["commit"] = [500] * 5
    failed = llmkd("push", run, REPO)
    assert failed.code == 1
    assert "Run the same command again" in failed.error
    assert TOKEN not in failed.err + failed.out
    assert (hub.calls["put"], hub.commits) == (1, 0)
    assert llmkd("push", run, REPO).code == 0
    assert (hub.calls["put"], hub.commits) == (1, 1), "the weights had arrived"
    assert set(hub.files[REPO]) == SENT


def test_private(llmkd, hub, run):
    assert llmkd("push", run, REPO, "--private").code == 0
    assert hub.private[REPO]
    assert llmkd("push", run, REPO, "--private").code == 0, "again"


def test_private_and_a_public_repository(llmkd, hub, run):
    hub.create({"organization": "me", "name": "student"})
    refused = llmkd("push", run, REPO, "--private")
    assert "is public" in refused.error
    assert hub.files[REPO] == {}


def test_no_token(llmkd, hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused = llmkd("push", run, REPO)
    assert "HF_TOKEN" in refused.error
    assert not hub.calls


@pytest.mark.parametrize(
    ("status", "words"), [(403, "no permission to write to 'me/student' (403)"), (401, "HF_TOKEN")]
)
@pytest.mark.parametrize("endpoint", ["create", "preupload", "commit"])
def test_a_repository_without_permission(llmkd, hub, run, endpoint, status, words):
    hub.faults = {endpoint: [status], "info": [status]}
    refused = llmkd("push", run, REPO)
    assert refused.code == 2
    assert words in refused.error
    assert hub.calls[endpoint] == 1, "it will not pass"
    assert hub.commits == 0


@pytest.mark.parametrize("name", ["student", "a/b/c", "me/", "me/..", "me/what ever"])
def test_a_name_that_is_no_repository(llmkd, hub, run, name):
    assert "owner/name" in llmkd("push", run, name).error
    assert not hub.calls


def test_a_run_that_has_not_finished(llmkd, hub, run):
    (run / "metrics.json").unlink()
    for command in (("push", run, REPO), ("card", run), ("report", run)):
        error = llmkd(*command).error
        assert "has not finished" in error
        assert "--resume" in error
    assert "config.yaml" in llmkd("push", run / "student", REPO).error
    assert not hub.calls


@pytest.mark.parametrize("name", ["optimizer.pt", "model.bin", "weights.json", "deep/args.txt"])
def test_a_pickle_is_refused(llmkd, hub, run, name):
    file = run / "student" / name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".txt":
        torch.save({"a": torch.ones(1)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": 1}))
    for words in ((), ("--dry-run",)):
        assert f"{file}' is a pickle" in llmkd("push", run, REPO, *words).error
    assert not hub.calls


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_lies_outside_is_refused(llmkd, hub, run, tmp_path, kind):
    secret = tmp_path / "secrets"
    secret.mkdir()
    (secret / "id.json").write_text("{}")
    (run / "student" / "extra.json").symlink_to(secret / "id.json" if kind == "file" else secret)
    assert "leads out of the run folder" in llmkd("push", run, REPO).error
    assert not hub.calls


def test_a_card_is_not_written_through_a_link(llmkd, hub, run, tmp_path):
    (run / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert "leads out of the run folder" in llmkd("push", run, REPO).error
    assert not (tmp_path / "elsewhere.md").exists()


def test_a_card_older_than_the_results(llmkd, hub, run):
    llmkd("card", run)
    (run / "evaluation.json").write_text(json.dumps({"models": {}, "tasks": {}}))
    os.utime(run / "README.md", (1, 1))
    assert f"Run: llmkd card {run}" in llmkd("push", run, REPO).error
    llmkd("card", run)
    assert llmkd("push", run, REPO).code == 0
    assert "evaluation.json" in hub.files[REPO]


def test_an_adapter_whose_base_nobody_has(llmkd, hub, adapted_run):
    refused = llmkd("push", adapted_run, REPO)
    assert "adapter's base" in refused.error
    assert "--merge" in refused.error


def test_an_adapter_on_the_hub(llmkd, hub, adapted_run):
    config = adapted_run / "config.yaml"
    config.write_text("model: org/base\n" + config.read_text().partition("\n")[2])
    done = llmkd("push", adapted_run, REPO)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-2].endswith("adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(hub.files[REPO])
    card = huggingface_hub.ModelCard(hub.files[REPO]["README.md"].decode())
    assert (card.data.library_name, card.data.base_model[0]) == ("peft", "org/base")


def test_an_adapter_merged_into_its_base(llmkd, hub, adapted_run, tmp_path, tokenizer):
    from peft import AutoPeftModelForCausalLM

    for _ in range(2):
        done = llmkd("push", adapted_run, REPO, "--merge")
        assert done.code == 0, done.err
    assert hub.commits == 1
    assert set(hub.files[REPO]) == SENT
    card = huggingface_hub.ModelCard(hub.files[REPO]["README.md"].decode())
    assert card.data.library_name == "transformers"
    ids = torch.tensor([[5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(adapted_run / "merged").eval()
    kept = AutoPeftModelForCausalLM.from_pretrained(adapted_run / "student").eval()
    torch.testing.assert_close(merged(ids).logits, kept(ids).logits)


def test_merging_a_whole_student(llmkd, hub, run):
    assert "--merge" in llmkd("push", run, REPO, "--merge").error


def test_a_process_of_its_own_with_hf_endpoint(hub, run):
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "llmkd", "push", str(run), REPO]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(hub.files[REPO]) == SENT
    assert TOKEN not in done.stdout + done.stderr
