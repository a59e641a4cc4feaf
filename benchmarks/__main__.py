"""`python -m benchmarks NAME [options]`."""

import typer

from benchmarks.docs import docs
from benchmarks.head import head
from benchmarks.quickstart import quickstart

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(quickstart)
app.command()(docs)
app.command()(head)


@app.callback()
def _main() -> None:
    """Measure llmkd; each command writes a JSON under benchmarks/results/."""


if __name__ == "__main__":
    app()
