"""What a stage recipe holds."""

from __future__ import annotations

from pydantic import BaseModel, Field


class StageRecipe(BaseModel):
    """The keys of a stage recipe: what to do, with which rows, and where the result goes."""

    stage: str | dict
    data: dict
    join: dict | None = Field(None, description="data with the same ids, whose further columns are added")
    output_dir: str = Field(min_length=1)
    rows_per_shard: int = Field(1000, ge=1, description="rows of the source that make one file")
