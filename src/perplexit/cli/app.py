"""`perplexit`: the group of commands and its entry point.

Nothing here or in a command's module imports numpy, torch or an engine: commands call the library
through the package's lazy names, and that is how `--help` stays quick.
"""

from typing import Annotated

import typer

import perplexit as px
from perplexit.cli import (
    compare,
    compile_model,
    demo,
    doctor,
    evaluate,
    explain,
    igf,
    prepare,
    report,
    runs,
)
from perplexit.cli.command_group import StatedErrors, examples

app = typer.Typer(
    name="perplexit",
    cls=StatedErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"perplexit {px.__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "perplexit demo",
        "perplexit prepare speech.txt --tokenizer smollm2/ -o speech.safetensors",
        "perplexit eval smollm2/ speech.safetensors --run runs/fp32",
        "perplexit compare runs/fp32 runs/bf16",
    )
)
def perplexit(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Measure a language model's perplexity as a number that can be trusted, compared and used.

    Text for people goes to stderr; with --json a command puts one JSON document on stdout.
    Exit codes: 0 done, 1 a stated error, 2 usage, 3 a gate failed, 130 interrupted.
    """


app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("prepare", epilog=prepare.EXAMPLES)(prepare.prepare)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("compile", epilog=compile_model.EXAMPLES)(compile_model.compile_model)
app.add_typer(runs.app, name="runs")
app.add_typer(igf.app, name="igf")


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    app()
