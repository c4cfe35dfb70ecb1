"""`perplexit doctor`: a model on its engine → what is sound, and what is not."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import AsJson, print_json, status_line, stdout_kept_clean, tell
from perplexit.sessions.options import EngineOptions

EXAMPLES = examples(
    "perplexit doctor smollm2/",
    "perplexit doctor onnx:program/ speech.safetensors",
    "perplexit doctor gguf:model.gguf --max-length 2048 --json",
    "perplexit doctor completions:http://127.0.0.1:8000/v1#my-model --tokenizer smollm2/",
)


@takes_options(EngineOptions)
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model address, as in eval.")],
    tokens: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="The token file that you will evaluate; without it, a packaged text, "
            "tokenised by the model's own tokenizer.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="The model's own tokenizer, where it does not come with the model."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Ids of the longest window to try \\[default: INPUT's, or 1024].",
        ),
    ] = None,
    json: AsJson = False,
    **options: Unpack[EngineOptions],
) -> None:
    """Check a model on its engine before you trust its numbers.

    BOS, tokenizer, vocabulary, batches and padding, caches, dropout, long context, and more: each
    check passes, warns, fails, or is skipped and says why; exit code 1 where a check fails.
    """
    with stdout_kept_clean(), status_line("loading the model") as show:
        diagnosis = px.doctor(
            model,
            tokens,
            tokenizer=tokenizer,
            max_length=max_length,
            progress=show and (lambda name, number, total: show(f"{number + 1}/{total} {name}")),
            **options,
        )
    tell(str(diagnosis))
    if json:
        print_json(diagnosis.to_json())
    if diagnosis.status == "fail":
        raise typer.Exit(1)
