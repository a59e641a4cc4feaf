"""What a stage is: columns in, columns out. It knows no files and no ranks; `runner.py` does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features

from llmkd.stages.files import write_parquet

if TYPE_CHECKING:
    from llmkd.stages.source import Source

REJECTED = "rejected"


class Stage(ABC):
    """One offline step over a corpus, shard by shard.

    The constructor checks its arguments and reads neither rows nor weights: `--dry-run` stops after it. A result must
    depend on the shard's rows and on `identity` alone, never on the rank, the order of shards or the time.

    Attributes:
        suffix: of the files that `write` makes. given_as: the key of another recipe that takes the folder.
    """

    suffix, given_as = ".parquet", "data.path"

    def identity(self) -> dict[str, Any]:
        """What the result depends on beside recipe and data: revisions of models, tokenizers. Plain JSON values."""
        return {}

    @abstractmethod
    def features(self, given: Features) -> Features:
        """The columns that `process` returns, of the columns it gets; DataError if one that it needs is not there."""

    def begin(self, source: Source) -> None:
        """Called once on each rank that has work: load weights, or look at all rows of the source in advance."""
        return

    @abstractmethod
    def process(self, columns: dict[str, list]) -> dict[str, list]:
        """One shard's rows to its result.

        Args:
            columns: the source's, all of one length; `example_id` among them increases through the whole source.

        Returns:
            The columns of `features`, of one length. Beside them may be `rejected`: a reason, or "" for rows that
            are kept; and `example_id`, increasing, where a row is still the row it was: else the runner numbers them.
        """

    def write(self, file: Path, columns: dict[str, list], features: Features) -> None:
        """Write a shard: the same columns must give the same bytes."""
        write_parquet(file, columns, features)

    def made_up(self, count: int) -> dict[str, list]:
        """Rows for `--smoke`, where the recipe's data are not here."""
        return {"text": [f"Row {row}. " + "A small model learns what a large one knows. " * 3 for row in range(count)]}
