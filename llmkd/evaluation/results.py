"""RUN/evaluation.json: what was measured, of which models, on which tasks. The only module that knows its layout.

```
{
  "llmkd": {"python": "3.11.9", "llmkd": "0.1.0", "torch": ..., "lm_eval": ..., ...},   installed versions, last writer's
  "device": "CPU, 2 cores (x86_64)", "commit": null or a hash,                            as in metrics.json
  "models": {                           every model by its label, in the order of the table
    "student": {"path": "runs/x/student", "revision": null, "parameters": 134515008, "backend": "hf", "dtype": "float32",
                "chat_template": true},
    "start": {...}, "teacher": {...}    a label is student, start or teacher of a run, else the name that was given
  },
  "tasks": {
    "cola": {
      "source": "lm-eval" | "llmkd",    whose task it is; llmkd's are aime24, aime25, stsb and the classifiers' glue
      "version": 1.0,                   of the task; its results compare with those of the same version and hash only
      "hash": "3f9c...",                SHA-256, 16 digits, of the task's settings and of each example with its target
      "dataset": {"path": "nyu-mll/glue", "name": "cola", "split": "validation", "local": false},
      "n": 1043,                        examples that were scored; "limit" of them were asked for
      "limit": null, "repeats": 1, "seed": 0, "num_fewshot": 0,
      "generation": null or {"max_gen_toks": 32768, "temperature": 0.6, ...},
      "higher_is_better": {"mcc": true},
      "main": ["mcc"],                  the metrics whose mean is the task's score in an average over tasks
      "models": {
        "student": {"mcc": {"value": 0.412, "stderr": 0.027, "interval": [0.36, 0.463]}},     metric -> numbers
        "teacher": {...}
      },
      "runs": {"student": {"prompts": "ab12...", "seconds": 63.1, "model": "77ce..."}, ...}     how each was made
    }
  }
}
```

`value` is on the scale of the task's own metric: a share in [0, 1] for accuracy, F1, mean@n and pass@n, a coefficient in
[-1, 1] for mcc, pearson and spearman, never in per cent. `interval` [low, high] covers 95 % (see `intervals`); `stderr` is the
standard error; both are null where the metric has none. A task whose models lack a label has not been run on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkd.errors import ConfigError
from llmkd.versions import commit, device, versions

FILE = "evaluation.json"
SHARED = ("source", "version", "hash", "dataset", "n", "limit", "repeats", "seed", "num_fewshot", "generation",
          "higher_is_better", "main")  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """The results of a folder; an empty document if there are none.

    Raises:
        ConfigError: a file that is not such a document.
    """
    file = folder / FILE
    if not file.is_file():
        return {"llmkd": {}, "models": {}, "tasks": {}}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found["tasks"], dict) or not isinstance(found["models"], dict):
            raise ValueError("tasks and models are no mappings")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); expected results of llmkd evaluate. Delete it."
        ) from error
    return found


def done(document: Mapping[str, Any], task: Mapping[str, Any], name: str, label: str, model: str) -> bool:
    """Whether a model's results on a task stand already: same settings, same examples, same weights."""
    found = document["tasks"].get(name)
    return found is not None and not differing(found, task) and found["runs"].get(label, {}).get("model") == model


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two results of a task, which then do not compare."""
    return [key for key in SHARED if key in new and old.get(key) != new[key]]


def add(
    folder: Path,
    name: str,
    task: Mapping[str, Any],
    label: str,
    model: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Write one model's results on one task into the folder's file, and return the whole document.

    Args:
        name, task: the task and what its models share (the keys of SHARED).
        label, model: the model's label and its line of `models`.
        metrics: name -> {value, stderr, interval}. run: prompts, seconds and the model's fingerprint.

    Results of other models that were made with other settings do not compare any more and are dropped.
    """
    document = read(folder)
    old = document["tasks"].get(name)
    kept = {"models": {}, "runs": {}} if old is None or differing(old, task) else old
    document["tasks"][name] = {
        **{key: task.get(key) for key in SHARED},
        "models": {**kept["models"], label: dict(metrics)},
        "runs": {**kept["runs"], label: dict(run)},
    }
    document["models"] = {**document["models"], label: dict(model)}
    document = {"llmkd": versions(), "device": device(), "commit": commit(),
                "models": document["models"], "tasks": document["tasks"]}  # fmt: skip
    write(folder, document)
    return document


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """The whole file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(folder / FILE)
