"""`llmkd stage`: a recipe to a folder, a check of a folder, and `--smoke`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmkd import config as recipes
from llmkd.data.load import SourceSpec
from llmkd.data.manifest import Manifest
from llmkd.data.manifest import verify as check_folder
from llmkd.distributed import is_main
from llmkd.errors import ConfigError, need
from llmkd.stages.base import Stage
from llmkd.stages.files import put
from llmkd.stages.page import selection_page
from llmkd.stages.recipe import StageRecipe
from llmkd.stages.runner import Job, claim, prepare, run
from llmkd.stages.select import Select
from llmkd.stages.source import LoadedRows, Source, open_source
from llmkd.weights import stand_in

SMOKE_ROWS = 8

Announce = Callable[[str], None]


def stage(
    recipe: Path, overrides: Sequence[str], dry_run: bool, smoke: bool, report: Path | None, announce: Announce
) -> None:
    """Run a stage recipe, or only check it (`dry_run`), or a few rows of it on tiny models (`smoke`).

    Args:
        report: where to write a page about a selection, once it is whole.
    """
    config = recipes.load(recipe, overrides, StageRecipe)
    if smoke:
        announce(f"smoke: {_summary(smoke_test(config))}: the recipe runs.")
        return
    job = prepare(config)
    done = claim(job)
    if report is not None:
        need("matplotlib", "pip install 'llmkd[report]'")
        if not isinstance(job.stage, Select):
            raise ConfigError("--report: got a stage that selects nothing; expected select. Leave --report out.")
    if dry_run:
        announce(recipes.dump(config).rstrip())
        announce(f"# {len(job.source):,} rows in {job.count:,} shards, {len(done):,} of them finished")
        announce("# everything checked; no weights were loaded, nothing was written")
        return
    started, makes = time.perf_counter(), len(done) < job.count
    manifest = run(job, announce)
    if manifest is None:
        announce(f"{job.folder}: this process is done, others still write. If one was lost, run the same again.")
    else:
        seconds = time.perf_counter() - started
        say = print if makes else announce  # the rank that is last, whichever it is, has the last word
        say(f"{job.folder}: {_summary(manifest)}; {seconds:.0f} s. Give it to another recipe as {job.stage.given_as}.")
        if isinstance(job.stage, Select) and report is not None and (makes or is_main()):
            _write_page(job.stage, job, report)
            say(f"page: {report}")


def _write_page(select: Select, job: Job, file: Path) -> None:
    select.begin(job.source)
    text = selection_page(select, job.source, f"Selection {job.folder.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, file.with_name(f"{file.name}.part"), lambda partial: partial.write_text(text, encoding="utf-8"))


def verified(folder: Path) -> str:
    """One line about a stage's folder, of which every byte was checked."""
    manifest = check_folder(folder)
    return f"{folder}: {len(manifest.shards):,} shards and their checksums are whole; {_summary(manifest)}."


def smoke_test(config: Mapping[str, Any]) -> Manifest:
    """A few rows of the recipe on tiny random models of the same families, in seconds, without a network."""
    with tempfile.TemporaryDirectory() as folder, stand_in("smoke"):
        small = {**config, "output_dir": str(Path(folder) / "stage"), "rows_per_shard": SMOKE_ROWS // 2}
        job: Job = prepare(small, lambda stage: _few_rows(config, stage))
        manifest = run(job)
    assert manifest is not None
    return manifest


def _few_rows(config: Mapping[str, Any], stage: Stage) -> Source:
    """The recipe's own rows where they lie here, made-up ones elsewhere."""
    spec = recipes.check(SourceSpec, config["data"], "data")
    if ":" in str(spec.path) or Path(str(spec.path)).exists():
        return open_source(spec.model_copy(update={"max_samples": SMOKE_ROWS}))
    return LoadedRows(Dataset.from_dict(stage.made_up(SMOKE_ROWS)))


def _summary(manifest: Manifest) -> str:
    """Rows read, kept and rejected by reason."""
    read = sum(shard.read for shard in manifest.shards)
    why = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
    return f"{read:,} rows read, {manifest.rows:,} written" + (f", rejected: {why}" if why else "")
