"""The same global batch trains the same student, whatever the split, the padding and the framework (fp32, on CPUs)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cases import CASES, Case
from exactness import EXPORT, MERGED, REPORT, STEPS, WEIGHTS, resume, run, write_models
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

RELATIVE = 1e-5
FRAMEWORKS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WRAPS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}  # as accelerate names them
TIMEOUT = 400
PAIRS = [pytest.param(f, case, id=f"{f}-{case.name}") for f in FRAMEWORKS for case in CASES]
NAMED = {case.name: case for case in CASES}


class Launch:
    """One start of `worker.py` on two processes; what it did not write is a failure that shows its log."""

    def __init__(self, framework: str, models: Path, output: Path) -> None:
        self.output, self.log = output, output / "log.txt"
        output.mkdir()
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            arguments = [framework, str(models), str(output)]
            process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment)
            try:
                self.outcome = f"exit code {process.wait(TIMEOUT)}"
            except subprocess.TimeoutExpired:
                self.outcome = f"still running after {TIMEOUT} s"
            finally:
                _end(process)

    def folder(self, name: str) -> Path:
        """A finished result's folder."""
        if not (self.output / name / REPORT).is_file():
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
            pytest.fail(f"{name} was not written ({self.outcome}); the log ends with:\n{tail}", pytrace=False)
        return self.output / name


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and the workers, which have sessions of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case on one process with micro-batches of 8."""
    root, done = tmp_path_factory.mktemp("reference"), set()

    def get(name: str) -> Path:
        if name not in done:
            run(NAMED[name], models, root / name, use_cpu=True)
            done.add(name)
        return root / name

    return get


@pytest.fixture(scope="session")
def launched(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Launch]:
    """All cases of a framework, run once."""
    root, launches = tmp_path_factory.mktemp("launches"), {}

    def get(framework: str) -> Launch:
        if framework not in launches:
            launches[framework] = Launch(framework, models, root / framework)
        return launches[framework]

    return get


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT).read_text())


def assert_same(got: Path, expected: Path, relative: float = RELATIVE) -> None:
    """Losses, gradient norms and metrics of every step; weights after the last, relative to each tensor's largest."""
    mine, theirs = report(got)["steps"], report(expected)["steps"]
    assert len(mine) == len(theirs) == STEPS
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
        assert a == pytest.approx(b, rel=relative), f"step {step}"
    assert_same_tensors(load_file(got / WEIGHTS), load_file(expected / WEIGHTS), relative)


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        gap, size = (got[name] - tensor).abs().max().item(), tensor.abs().max().item()
        assert gap <= relative * size, f"{name}: {gap:.3g} of {size:.3g}"


def untrained(case: Case, models: Path) -> dict[str, torch.Tensor]:
    weights = load_file(models / ("tied" if case.tied else "untied") / "model.safetensors")
    return {f"student.{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("name", ["projector", "tied_clipped", "adamw"])
def test_training_moves_the_weights_by_far_more_than_the_tolerance(name, reference, models):
    trained = load_file(reference(name) / WEIGHTS)
    for key, start in untrained(NAMED[name], models).items():
        assert (trained[key] - start).abs().max() > 100 * RELATIVE * start.abs().max(), key
    norms = [step["grad_norm"] for step in report(reference(name))["steps"]]
    limit = NAMED[name].max_grad_norm
    assert limit == 0 or min(norms) > limit, "clipping has to be active"


@pytest.mark.parametrize("name", ["projector", "tied_clipped", "empty_rank", "learned", "lora"])
@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (2, 4)])
def test_micro_batches_and_accumulation_do_not_matter(name, micro, accumulation, models, reference, tmp_path):
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    run(NAMED[name], models, tmp_path, use_cpu=True, **split)
    assert_same(tmp_path, reference(name))


@pytest.mark.parametrize("collate", [{"padding_side": "left"}, {"pad_to_multiple_of": 32}], ids=["left", "wide"])
def test_padding_does_not_matter(collate, models, reference, tmp_path):
    run(NAMED["tied_clipped"], models, tmp_path, collate, use_cpu=True)
    assert_same(tmp_path, reference("tied_clipped"))


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "case"), PAIRS)
def test_two_processes_train_as_one(framework, case, launched, reference):
    folder = launched(framework).folder(case.name)
    assert report(folder)["framework"] == WRAPS.get(framework, framework)
    assert_same(folder, reference(case.name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "when"),  # FSDP shards the model when training starts: before, evaluating is refused
    [(f, when) for f in FRAMEWORKS for when in ("before", "after") if (f, when) != ("fsdp2", "before")],
)
def test_two_processes_evaluate_as_one(framework, when, launched, reference):
    """11 sequences, batches of 2 on 2 processes: the last are filled up. Training after an evaluation is unharmed."""
    expected = report(reference("projector"))[when]
    assert {"kl", "top1_agreement", "perplexity"} <= expected.keys()
    assert report(launched(framework).folder("projector"))[when] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projector", "tied_clipped"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_exported_student_is_the_one_process_student(framework, name, launched, reference):
    ours, theirs = (folder / EXPORT for folder in (launched(framework).folder(name), reference(name)))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    assert [file.name for file in ours.glob("*.safetensors")] == ["model.safetensors"]
    weights = load_file(ours / "model.safetensors")
    assert_same_tensors(weights, load_file(theirs / "model.safetensors"), RELATIVE)
    assert not [key for key in weights if "projector" in key or "teacher" in key]
    loaded = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    assert_same_tensors({key: loaded[key] for key in weights}, weights, relative=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_exported_adapter_loads_and_merges(framework, launched, reference, models):
    folder = launched(framework).folder("lora")
    ours, theirs = (load_file(root / EXPORT / "adapter_model.safetensors") for root in (folder, reference("lora")))
    assert_same_tensors(ours, theirs, RELATIVE)
    merged = AutoModelForCausalLM.from_pretrained(folder / MERGED).state_dict()
    base = AutoModelForCausalLM.from_pretrained(models / "tied")
    adapted: Any = PeftModel.from_pretrained(base, str(folder / EXPORT))
    assert_same_tensors(merged, adapted.merge_and_unload().state_dict(), RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES if case.resume])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_resumed_run_equals_the_undisturbed_one(framework, name, launched):
    """Bit for bit: AdamW's moments, the objective's parameters and the data order come back."""
    launch = launched(framework)
    undisturbed, resumed = launch.folder(name), launch.folder(f"{name}/resumed")
    assert_same(resumed, undisturbed, relative=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_domains_are_measured_and_moved_as_on_one_process(framework, launched, reference):
    """Perplexities weigh tokens over all ranks: 11 sequences of two domains, filled up to whole batches."""
    mine, theirs = (report(folder)["looks"] for folder in (launched(framework).folder("domains"), reference("domains")))
    assert [look["step"] for look in mine] == [0, 2, 4, 5]
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(launched, reference, models, tmp_path):
    folder = launched("ddp").folder("domains")
    shutil.copytree(folder / "run", tmp_path / "run")
    resume(NAMED["domains"], models, tmp_path, use_cpu=True)
    assert_same(tmp_path / "resumed", reference("domains"))
