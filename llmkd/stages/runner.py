"""Run a stage: cut the rows into numbered shards, make those of this rank that are missing, and write a manifest.

    folder/shard-00000.parquet ...    whole files, in the order of the corpus
    folder/manifest.json              written last; a folder that has one is complete
    folder/progress/                  until then: identity.json, and a record of each finished shard

Rank r of W makes the shards r, r + W, ...; ranks share nothing but the folder, and whoever is last writes the manifest.
Running again goes on: the bytes are those of an undisturbed run on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Features, Value

from llmkd import config as recipes
from llmkd.data.load import SourceSpec
from llmkd.data.manifest import EXAMPLE_ID, MANIFEST, PROGRESS, Manifest, Shard, is_stage, read_manifest
from llmkd.errors import ConfigError, DataError
from llmkd.run import first_difference
from llmkd.stages import TABLES
from llmkd.stages.bar import Bar
from llmkd.stages.base import REJECTED, Stage
from llmkd.stages.files import put, put_json
from llmkd.stages.identity import software
from llmkd.stages.recipe import StageRecipe
from llmkd.stages.source import Joined, Source, open_source
from llmkd.weights import reading_once

ID_BITS = 32  # a row that a stage makes has the id: shard << 32 | its place there


@dataclass(frozen=True)
class Job:
    """A stage with all that it needs, checked; nothing is written yet."""

    stage: Stage
    source: Source
    folder: Path
    rows_per_shard: int
    features: Features
    identity: dict[str, Any]

    @property
    def count(self) -> int:
        """How many shards it has."""
        return -(-len(self.source) // self.rows_per_shard)

    def rows(self, number: int) -> range:
        """The rows of the source that a shard is made of."""
        start = number * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, len(self.source)))


def prepare(config: Mapping[str, Any], source_of: Callable[[Stage], Source] | None = None) -> Job:
    """Build and check a stage recipe; no weights are loaded.

    Args:
        config: a resolved recipe. source_of: what to read instead of the recipe's data.

    Raises:
        LlmkdError: whatever is wrong with the recipe, the data or their combination.
    """
    recipe = recipes.check(StageRecipe, config, "stage recipe")
    spec = recipes.check(SourceSpec, config["data"], "data")
    with reading_once():
        stage = recipes.build("stage", recipe.stage, TABLES)
        if not isinstance(stage, Stage):
            raise ConfigError(f"stage: got {type(stage).__name__}; expected a llmkd.stages.Stage. Subclass it.")
        source = source_of(stage) if source_of else open_source(spec)
        if recipe.join is not None and not source_of:
            source = Joined(source, open_source(recipes.check(SourceSpec, recipe.join, "join")))
        features = Features({EXAMPLE_ID: Value("int64"), **stage.features(source.features)})
        identity = {
            "recipe": recipe.model_dump(exclude={"output_dir"}),
            "data": source.revision,
            **stage.identity(),
            "versions": software(),
        }
    return Job(
        stage, source, Path(recipe.output_dir), recipe.rows_per_shard, features, json.loads(json.dumps(identity))
    )


def run(job: Job, announce: Callable[[str], None] = print) -> Manifest | None:
    """Make what is missing of a stage.

    Returns:
        The manifest, or None while other ranks still have shards to make.

    Raises:
        ConfigError: the folder belongs to another stage (the first differing key is named). DataError: bad rows.
        TrainingError: the disk is full.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    done = claim(job)
    todo = [number for number in range(rank, job.count, world) if number not in done]
    if todo:
        (job.folder / PROGRESS).mkdir(parents=True, exist_ok=True)
        _put_json(job.folder, "identity.json", job.identity)
        job.stage.begin(job.source)
        with Bar(job.folder.name, sum(len(job.rows(number)) for number in todo), rank) as bar:
            for number in todo:
                bar.advance(_make(job, number))
    elif (job.folder / MANIFEST).is_file() and not (job.folder / PROGRESS).exists():
        announce(f"{job.folder} is complete already; nothing to do.")
        return read_manifest(job.folder)
    return _finish(job)


def claim(job: Job) -> dict[int, Shard]:
    """The finished shards, by number, of a folder that is new or this very job's. Nothing is written.

    Raises:
        ConfigError: it belongs to something else.
    """
    folder = job.folder
    if not is_stage(folder):
        if folder.exists() and (not folder.is_dir() or {*os.listdir(folder)} - {PROGRESS}):
            raise ConfigError(f"output_dir: '{folder}' is not empty and no stage; expected a new folder. Set another.")
        return {}
    difference = first_difference(_identity(folder), job.identity)
    if difference:
        raise ConfigError(f"output_dir: {difference} in '{folder}'; expected the stage it was begun with. Set another.")
    return _records(folder)


def _identity(folder: Path) -> dict[str, Any]:
    """What the stage of a folder was begun with."""
    try:
        return json.loads((folder / PROGRESS / "identity.json").read_bytes())
    except FileNotFoundError:
        return read_manifest(folder).identity


def _records(folder: Path) -> dict[int, Shard]:
    """Shards that stand in the manifest or among the finished ones, and whose file is there and as long as told."""
    found: dict[int, Shard] = {}
    for file in (folder / PROGRESS).glob("[0-9]*.json"):
        with suppress(FileNotFoundError):  # the manifest has been written meanwhile: it is read next
            found[int(file.stem)] = Shard.model_validate_json(file.read_bytes())
    if (folder / MANIFEST).is_file():
        found = {**dict(enumerate(read_manifest(folder).shards)), **found}
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
    return {number: shard for number, shard in sorted(found.items()) if sizes.get(shard.file) == shard.bytes}


def _make(job: Job, number: int) -> int:
    """Make one shard: the file first, then the record that it is finished. Returns how many rows it was made of."""
    rows = job.rows(number)
    given = job.source.read(rows.start, rows.stop)
    columns, rejected = _sift(job, number, job.stage.process(given))
    target = job.folder / f"shard-{number:05d}{job.stage.suffix}"
    put(target, _partial(job.folder, target.name), lambda file: job.stage.write(file, columns, job.features))
    ids = columns[EXAMPLE_ID]
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    ends: dict[str, Any] = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    sizes: dict[str, Any] = {"read": len(rows), "rows": len(ids), "bytes": target.stat().st_size}
    shard = Shard(file=target.name, sha256=digest, rejected=dict(sorted(rejected.items())), **sizes, **ends)
    _put_json(job.folder, f"{number:05d}.json", shard.model_dump())
    return len(rows)


def _sift(job: Job, number: int, out: dict[str, list]) -> tuple[dict[str, list], Counter[str]]:
    """The kept rows with their ids, and the rejected ones by reason."""
    lengths = {name: len(values) for name, values in out.items()}
    wanted = [name for name in job.features if name != EXAMPLE_ID]
    if set(out) - {REJECTED, EXAMPLE_ID} != set(wanted) or len(set(lengths.values())) > 1:
        raise ConfigError(
            f"stage: got columns {lengths}; expected {', '.join(wanted)}, all of one length. Fix process."
        )
    rows = next(iter(lengths.values()), 0)
    ids = out.get(EXAMPLE_ID) or [number << ID_BITS | place for place in range(rows)]
    if any(after <= before for before, after in pairwise(ids)):
        raise DataError(
            f"stage: got an {EXAMPLE_ID} twice or out of order in shard {number}; expected them to increase."
        )
    reasons = out.get(REJECTED) or [""] * rows
    kept = [place for place, reason in enumerate(reasons) if not reason]
    columns = {**{name: out[name] for name in wanted}, EXAMPLE_ID: ids}
    if len(kept) < rows:
        columns = {name: [values[place] for place in kept] for name, values in columns.items()}
    return columns, Counter(reason for reason in reasons if reason)


def _finish(job: Job) -> Manifest | None:
    """Write the manifest if every shard is there; several ranks may do so at once, with the same bytes."""
    records = _records(job.folder)
    if len(records) < job.count:
        return None
    if (job.folder / PROGRESS).is_dir():
        manifest = Manifest(identity=job.identity, shards=list(records.values()))
        with suppress(FileNotFoundError):  # another rank was faster, and has removed the folder of progress
            put_json(job.folder / MANIFEST, _partial(job.folder, MANIFEST), manifest.model_dump())
        shutil.rmtree(job.folder / PROGRESS, ignore_errors=True)
    return read_manifest(job.folder)


def _put_json(folder: Path, name: str, value: Any) -> None:
    put_json(folder / PROGRESS / name, _partial(folder, name), value)


def _partial(folder: Path, name: str) -> Path:
    """Where a file is written until it is whole: no other rank writes there."""
    return folder / PROGRESS / f"{name}.{os.environ.get('RANK', '0')}.part"
