"""Put a finished run's student on the Hub: what to send, what never to send, and sending it so that nothing is lost."""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from llmkd.errors import ConfigError, TrainingError
from llmkd.finished import Run
from llmkd.hub import card
from llmkd.sources import is_hub_name

logger = logging.getLogger(__name__)

ATTEMPTS = 5
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".dill", ".th"})
RESULTS = ("metrics.json", "evaluation.json")


@dataclass(frozen=True)
class Upload:
    """One file to send: its name in the repository, where it lies, its size in bytes."""

    name: str
    file: Path
    size: int


def prepare(run: Run, merge: bool = False) -> list[Upload]:
    """Every file that a push sends: the student's folder, card (written if there is none), recipe and results.

    Args:
        merge: fold the adapter into its base model first, into RUN/merged.

    Raises:
        ConfigError: a file that could run code when it is loaded, or one that lies outside the run folder; a card older
            than the results; `merge` without an adapter; an adapter whose base model nobody else has.
    """
    student = run.student
    if merge:
        student = merged(run)
        card.write_card(run, student / card.FILE, adapter=False)
    elif not (run.folder / card.FILE).is_file():
        _check_inside(run.folder / card.FILE, run.folder)
        card.write_card(run, run.folder / card.FILE, run.is_adapter)
    found = sorted(student.rglob("*"))
    for file in found:
        _check_inside(file, run.folder)
    files = {str(file.relative_to(student)): file for file in found if not file.is_dir()}
    files |= {"recipe.yaml": run.folder / "config.yaml"}
    files |= {name: run.folder / name for name in RESULTS if (run.folder / name).is_file()}
    if not merge:
        _check_card(run)
        _check_base(run)
        files[card.FILE] = run.folder / card.FILE
    for file in files.values():
        _check_inside(file, run.folder)
        _check_no_pickle(file)
    return [Upload(name, file, file.stat().st_size) for name, file in sorted(files.items())]


def merged(run: Run) -> Path:
    """RUN/merged: the student's adapter folded into the base model that the recipe builds; made once, whole or not at all.

    Raises:
        ConfigError: the student is no adapter.
    """
    if not run.is_adapter:
        raise ConfigError("--merge: the student is a whole model already; expected an adapter. Remove --merge.")
    folder = run.folder / "merged"
    if folder.is_dir():
        return folder
    from peft import PeftModel
    from transformers import AutoTokenizer

    from llmkd import build

    spec = run.config["model"]
    alone = isinstance(spec, str) or "path" in spec  # else the student was cut from the teacher
    base = build.parts({**run.config, "teacher": None} if alone else run.config).model
    whole: Any = PeftModel.from_pretrained(base, run.student).merge_and_unload()
    with tempfile.TemporaryDirectory(dir=run.folder) as partial:
        whole.save_pretrained(partial)
        AutoTokenizer.from_pretrained(run.student).save_pretrained(partial)
        Path(partial).rename(folder)
        Path(partial).mkdir()  # for the context manager to remove
    return folder


def _check_card(run: Run) -> None:
    written = (run.folder / card.FILE).stat().st_mtime
    for name in RESULTS:
        file = run.folder / name
        if file.is_file() and file.stat().st_mtime > written:
            raise ConfigError(
                f"card: {run.folder / card.FILE} is older than {name}; expected a newer one. Run: llmkd card {run.folder}"
            )


def _check_base(run: Run) -> None:
    spec = run.config["model"]
    options = {"path": spec} if isinstance(spec, str) else spec
    path, kind = options.get("path"), options.get("name", "pretrained")
    if run.is_adapter and (kind != "pretrained" or not is_hub_name(path)):
        raise ConfigError(
            f"push: the adapter's base is {kind} of '{path or 'the teacher'}'; expected a model on the Hub, or nobody else "
            "can load it. Add --merge."
        )


def _check_inside(file: Path, folder: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"push: '{file}' leads out of the run folder; expected files inside it. Remove the link.")


def _check_no_pickle(file: Path) -> None:
    if file.suffix.lower() in PICKLES or _is_pickle(file):
        raise ConfigError(
            f"push: '{file}' is a pickle, which runs code when it is loaded; expected safetensors. Remove it."
        )


def _is_pickle(file: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does, or is a zip archive with one (torch.save)."""
    with file.open("rb") as opened:
        start = opened.read(2)
    if start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return (
        start == b"PK"
        and zipfile.is_zipfile(file)
        and any(n.endswith(".pkl") for n in zipfile.ZipFile(file).namelist())
    )


def token() -> str:
    """HF_TOKEN of the environment; never read from a file, never shown.

    Raises:
        ConfigError: it is not set.
    """
    found = os.environ.get("HF_TOKEN", "").strip()
    if not found:
        raise ConfigError(
            "HF_TOKEN: not set; expected a token that may write. Make one at huggingface.co/settings/tokens."
        )
    return found


def push(uploads: list[Upload], repo: str, private: bool = False) -> str:
    """Create the repository if it is not there, and send what it lacks in one commit.

    Files that are there unchanged are not sent again, and a file that was sent before a failure is not sent twice, so a
    push that failed goes on when it is run again. Passing errors are tried five times.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: a wrong repository name, no permission, a public repository with `private`.
        TrainingError: the Hub cannot be reached.
    """
    _check_name(repo)
    api = HfApi(token=token(), library_name="llmkd")
    _trying(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo)
    if private and not _trying(lambda: api.repo_info(repo), repo).private:
        raise ConfigError(
            f"--private: '{repo}' exists and is public; nothing was sent. Make it private in its settings."
        )
    return _trying(lambda: _commit(api, uploads, repo), repo).commit_url


def _commit(api: HfApi, uploads: list[Upload], repo: str) -> Any:
    """One commit of what differs; asked anew each time, as a commit may have arrived though its answer was lost."""
    operations = [CommitOperationAdd(upload.name, upload.file) for upload in uploads]
    return api.create_commit(repo, operations, commit_message="Upload a distilled student")


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"repo: got '{repo}'; expected owner/name. {str(error).splitlines()[0]}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"repo: got '{repo}'; expected owner/name, such as your-name/{repo.rsplit('/', 1)[-1]}.")


def _trying(call: Callable[[], Any], repo: str) -> Any:
    """Call until it succeeds, fails for good, or has failed ATTEMPTS times."""
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=1, max=30),
        before_sleep=lambda state: logger.warning("the Hub did not answer, try %d follows", state.attempt_number + 1),
        reraise=True,
    )
    try:
        return attempts(call)
    except Exception as error:
        raise _explained(error, repo) from error


def _passes(error: BaseException) -> bool:
    """Whether an error may be gone the next time: the Hub's own (5xx), too many requests, a lost connection."""
    status = _status(error)
    return status in (408, 429) or status >= 500 if status else _lost(error)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in a chain of errors."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _lost(error: BaseException | None) -> bool:
    """Whether a connection failed, anywhere in a chain of errors: the HTTP library's errors share a base class."""
    transport = HfHubHTTPError.__bases__[0]
    while error is not None:
        if isinstance(error, transport | ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False


def _explained(error: Exception, repo: str) -> Exception:
    status, text = _status(error), " ".join(str(error).split())[:200]
    if status == 401:
        return ConfigError("HF_TOKEN: the Hub does not accept it (401); expected a valid token. Make a new one.")
    if status == 403:
        return ConfigError(
            f"repo: no permission to write to '{repo}' (403); expected a token that may. Check owner and scope."
        )
    if isinstance(error, ValueError):
        return ConfigError(f"push: {text}")
    if status is not None and status < 500:
        return ConfigError(f"repo: the Hub refused '{repo}' ({status}): {text}")
    return TrainingError(
        f"push: not finished ({text}). Run the same command again: what has arrived is not sent twice."
    )
