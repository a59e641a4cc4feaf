"""Read a sequence regressor: one row an example, with the one value that the model gives it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from llmkd.adapters.base import unwrap
from llmkd.adapters.classifier import CLASSIFIER, check_pad_token
from llmkd.agreement import measure_values
from llmkd.errors import ConfigError
from llmkd.types import Kind


def check(model: nn.Module) -> None:
    """Raise a ConfigError unless the model gives one value to each example of a padded batch."""
    config = unwrap(model).config
    if config.num_labels != 1 or config.problem_type not in (None, "regression"):
        raise ConfigError(
            f"model: got num_labels={config.num_labels} and problem_type={config.problem_type}; expected one value of a "
            "regression. Set num_labels=1 and no problem_type."
        )
    check_pad_token(model)


REGRESSOR = replace(CLASSIFIER, rows=Kind.VALUE, check=check, measure=measure_values)
