"""The command line: train, stage, evaluate, card, push, report, list."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkd.errors import LlmkdError
from llmkd.usage import EVALUATE_EXAMPLES, PUSH_EXAMPLES, STAGE_EXAMPLES, TRAIN_EXAMPLES

app = typer.Typer(
    help="Distil large language models into small ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)

GRACE_S = 5.0  # seconds that a launcher takes at most to end the other ranks


@app.callback()
def _main() -> None:
    """Distil large language models into small ones."""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: a.b=value ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build and check everything, load no weights.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps on a tiny random model, no network.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the recipe's folder.")] = False,
) -> None:
    """Distil a student as a recipe says; ends with a table, a run folder and the next command."""
    from llmkd import config as recipes

    config = recipes.load(recipe, overrides or [])
    if smoke:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which is below
    _quiet()
    if dry_run:
        _show_plan(config)
    elif smoke:
        from llmkd.smoke import smoke as run_smoke

        metrics = run_smoke(config, _announce)
        _announce(f"smoke: {metrics['train']['steps']} steps, loss {metrics['train']['loss']:.4g}: the recipe runs.")
    else:
        _train(config, recipe, resume)


@app.command(epilog=STAGE_EXAMPLES)
def stage(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe of a stage.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: a.b=value ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, load no weights.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few rows, tiny random models, no network.")] = False,
    verify: Annotated[Path | None, typer.Option("--verify", help="Check every byte of a stage's folder.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML page about a selection.")] = None,
) -> None:
    """Go over a corpus offline: score it, select from it. Run the same again to go on; add processes as you like."""
    if smoke:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if (recipe is None) == (verify is None):
        raise typer.BadParameter("give a recipe, or --verify FOLDER")
    _quiet()
    from llmkd.stages import command

    if verify is not None:
        _announce(command.verified(verify))
        return
    assert recipe is not None
    try:
        command.stage(recipe, overrides or [], dry_run, smoke, report, _announce)
    except KeyboardInterrupt as interrupt:
        _announce("interrupted; finished shards are kept. Go on with the same command.")
        raise typer.Exit(130) from interrupt


@app.command(epilog=EVALUATE_EXAMPLES)
def evaluate(
    targets: Annotated[list[str], typer.Argument(help="Run folders, models' folders or Hub names.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks, groups and tags, and llmkd's: aime24,aime25,stsb.")] = "",
    baseline: Annotated[
        str | None, typer.Option(help="Models to compare with: start, teacher, names; of a run both if left out.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of datasets laid out as on the Hub; no network.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first examples of each task alone, to try it.")] = None,
    backend: Annotated[str, typer.Option(help="lm-eval's: hf, vllm, ...")] = "hf",
    batch_size: Annotated[
        str, typer.Option(help="A number, or auto: the largest that fits a GPU, 8 on a CPU.")
    ] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of an answer; the task's if left out.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Answers a problem of a task that samples.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling and few-shot examples.")] = 1234,
    chat_template: Annotated[
        bool | None,
        typer.Option(help="Chat prompts or plain ones; chat where the tokenizer has a template if left out."),
    ] = None,
) -> None:
    """Measure a student, its untrained start and its teacher on the same tasks; resumes where it was stopped."""
    from llmkd.evaluation import command

    _quiet()
    options = command.Options(targets, tasks, baseline, data, limit, backend, batch_size, max_tokens, repeats, seed,
                              chat_template)  # fmt: skip
    try:
        command.run(options, _announce)
    except KeyboardInterrupt as interrupt:
        _announce("interrupted; results so far are kept. Go on with the same command.")
        raise typer.Exit(130) from interrupt


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="Such as divergence, objective, stage or teacher; all tables if left out.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the methods as a Markdown table.")] = False,
) -> None:
    """Print every table: names, formulas, papers, how each was checked, knobs."""
    from llmkd import catalog
    from llmkd.errors import unknown_name

    if kind is not None and kind not in catalog.KINDS:
        raise unknown_name("table", kind, catalog.KINDS)
    if markdown:
        print(catalog.markdown())
        return
    for entry in catalog.entries(kind):
        knobs = f"\n    knobs: {entry.knobs}" if entry.knobs else ""
        print(f"{entry.kind} {entry.name}\n    {entry.formula}\n    paper: {entry.paper}{knobs}")


@app.command(epilog="**Example**\n\n    llmkd card runs/quickstart")
def card(run: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write RUN/README.md: the model card, with the results in its model-index. It replaces an earlier one."""
    from llmkd.finished import read_run
    from llmkd.hub.card import FILE, write_card

    finished = read_run(run)
    for warning in write_card(finished, run / FILE, finished.is_adapter):
        _announce(f"warning: {warning}")
    _announce(f"card: {run / FILE}")


@app.command(epilog=PUSH_EXAMPLES)
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation see it.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Send an adapter folded into its base model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every file and its size, send nothing.")] = False,
) -> None:
    """Put student, tokenizer, card and recipe on the Hub; the token is taken from HF_TOKEN alone."""
    from llmkd.finished import read_run
    from llmkd.hub import push as hub

    uploads = hub.prepare(read_run(run), merge)
    for upload in uploads:
        _announce(f"{upload.size:>15,}  {upload.name}")
    kind = "adapter" if any(upload.name == "adapter_config.json" for upload in uploads) else "whole model"
    _announce(f"{sum(upload.size for upload in uploads):>15,}  bytes in {len(uploads)} files: {kind}")
    _announce(f"dry run: nothing was sent to {repo}" if dry_run else f"pushed: {hub.push(uploads, repo, private)}")


@app.command(epilog="**Example**\n\n    llmkd report runs/quickstart runs/quickstart_ce -o compare.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Compare runs on one HTML page that needs no network: curves, quality, tokens, configurations."""
    from llmkd.report.page import write_report

    write_report(runs, out)
    _announce(f"report: {out}")


def _train(config: dict[str, Any], recipe: Path, resume: bool) -> None:
    from llmkd.distributed import is_main
    from llmkd.run import Stopped, folder_of
    from llmkd.run import train as run
    from llmkd.table import show

    folder = folder_of(config, recipe.stem)
    try:
        metrics = run(config, folder, resume, _announce)
    except Stopped as stopped:
        _announce(f"stopped; checkpoint: {stopped}. Go on with: {_again()}")
        raise typer.Exit(130) from stopped
    except KeyboardInterrupt as interrupt:
        _announce(f"interrupted. Go on with: {_again()}")
        raise typer.Exit(130) from interrupt
    if is_main():
        show(metrics, folder)


def _show_plan(config: dict[str, Any]) -> None:
    from llmkd import config as recipes
    from llmkd.plan import dry_run

    memory = dry_run(config)
    _announce(recipes.dump(config).rstrip())
    sizes = ", ".join(f"{name} {size:.2f}" for name, size in memory.items())
    _announce(f"# memory of one unsharded device, GiB: {sizes}")
    _announce("# everything checked; no weights were loaded, nothing was written")


def _again() -> str:
    """The command that goes on with this run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same command with --resume"
    return shlex.join(["llmkd", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])


def _announce(text: str) -> None:
    from llmkd.distributed import is_main

    if is_main():
        print(text, flush=True)


def _quiet() -> None:
    """One progress bar, not one for every file; warnings of llmkd itself stay."""
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    logging.basicConfig(format="%(levelname)s %(message)s")
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.getLogger("llmkd").setLevel(logging.INFO if is_main else logging.ERROR)


def main() -> None:
    """Entry point: what the user can fix is one line on stderr and a non-zero exit."""
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that `my_module:attr` in a recipe is found from here
    try:
        app()
    except LlmkdError as error:
        _report(error)
        sys.exit(error.exit_code)


def _report(error: LlmkdError) -> None:
    """One line, once: rank 0 speaks; another rank only if rank 0 goes on, so that nothing is lost."""
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a launcher ends the others once rank 0 has failed
        time.sleep(GRACE_S)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
