"""Errors a user sees: one line with the value seen, the requirement and the one change that fixes it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LlmkdError(Exception):
    """Base of every error that is the user's to fix; the command line prints it on one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(LlmkdError, ValueError):
    """A recipe, argument or combination of parts that cannot work."""


class DataError(LlmkdError, ValueError):
    """Data that is missing, unreadable, empty or has nothing to learn from."""


class TrainingError(LlmkdError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, a disk that is full."""

    exit_code = 1


def did_you_mean(seen: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(seen), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown_name(kind: str, seen: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is in no table."""
    names = sorted(known)
    return ConfigError(f"unknown {kind} '{seen}'; known: {', '.join(names)}{did_you_mean(seen, names)}")


def need(module: str, install: str) -> ModuleType:
    """Import an optional dependency, or raise a ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs the package '{module}', which is not installed. Run: {install}") from error
