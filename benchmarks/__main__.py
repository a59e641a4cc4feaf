"""`python -m benchmarks NAME [options]`."""

import sys

import typer

from benchmarks.docs import docs
from benchmarks.glue import glue
from benchmarks.head import head
from benchmarks.picture import picture
from benchmarks.quality import EXAMPLES, quality
from benchmarks.quickstart import quickstart
from benchmarks.refine import command as refining
from benchmarks.step import step
from benchmarks.store import store
from llmkd.errors import LlmkdError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(quickstart)
app.command()(docs)
app.command()(head)
app.command(epilog=EXAMPLES)(quality)
app.command(epilog=refining.EXAMPLES)(refining.refine)
app.command()(picture)
app.command()(step)
app.command()(glue)
app.command()(store)


@app.callback()
def _main() -> None:
    """Measure llmkd; each command writes a JSON under benchmarks/results/."""


if __name__ == "__main__":
    try:
        app()
    except LlmkdError as error:
        sys.exit(f"error: {error}")
