"""`perplexit eval`: a model over a token file → a run."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import people, print_json, scoring_progress, stdout_kept_clean, tell
from perplexit.cli.record_tables import run_table
from perplexit.declared_options import Option
from perplexit.errors import UsageError
from perplexit.sessions.options import ScoringOptions

EXAMPLES = examples(
    "perplexit eval smollm2/ speech.safetensors --run runs/fp32",
    "perplexit eval hf:model.gguf speech.safetensors --dtype bf16 --run runs/bf16",
    "perplexit eval smollm2/ speech.safetensors --quantization nf4 --run runs/nf4",
    "perplexit eval smollm2/ speech.safetensors --adapter lora/ --run runs/lora",
    "perplexit eval onnx:program/ speech.safetensors --batch-size 4 --json",
    "perplexit eval smollm2/ speech.safetensors --mode cached --prompt-len 128 --json",
    "perplexit eval smollm2/ speech.safetensors --save-reference --run runs/reference",
    "perplexit eval gguf:q4.gguf speech.safetensors --reference runs/reference --run runs/q4",
)


class EvaluationOptions(ScoringOptions, total=False):
    """How a model is scored and what is recorded: the keywords of `evaluate` of these names."""

    top_k: Annotated[int, Option("Keep the K most likely tokens of every position.", 0, lowest=0)]
    confidence: Annotated[float, Option("Coverage of the interval, in (0, 1).", 0.95)]
    on_non_finite: Annotated[
        Literal["error", "count"],
        Option("A NaN or infinite loss stops the run, or is counted and left out.", "error"),
    ]
    save_reference: Annotated[
        bool,
        Option(
            "Keep the final hidden states, so that candidates can be compared with this run.", False
        ),
    ]
    reference: Annotated[
        str | None,
        Option(
            "A run made with --save-reference (or --top-k), a model to score in step, or "
            "llama.cpp's --kl-divergence-base file: every token gets its KL divergence from it.",
            metavar="RUN|MODEL|FILE",
        ),
    ]
    measure_noise_floor: Annotated[
        bool,
        Option(
            "Score some windows again in batches of another size. `compare` then takes a "
            "difference up to the one measured as too small to matter.",
            False,
        ),
    ]
    other_tokenizer: Annotated[
        bool,
        Option("Continue although the model has another tokenizer than the input.", False),
    ]


@takes_options(EvaluationOptions)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="hf:FOLDER, hf:FILE.gguf, hf:ID@REVISION, gguf:FILE, onnx:, openvino:, tvm: or "
            "pt2:FOLDER, completions:URL#MODEL, ngram:FILE, recorded:FILE, or a path.",
        ),
    ],
    tokens: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A token file made by `perplexit prepare`, or a text, which is prepared with the "
            "model's own tokenizer.",
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run's folder; one that holds an interrupted run is continued. "
            "\\[default: a new one under runs/]",
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="auto|N", help="Windows in one forward pass.")
    ] = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print the run's record as JSON on stdout.")
    ] = False,
    **options: Unpack[EvaluationOptions],
) -> None:
    """Score a token file or a text: perplexity with its interval, losses, memory and time.

    A run that was stopped (Ctrl-C, kill, a crash) continues when the same command names its --run.

    Fastest on a CPU that has bfloat16: --dtype bf16, with the model itself or with a program made
    by `perplexit compile MODEL --to openvino -o PROGRAM` (its head stays in float32).
    docs/benchmarks.md says by how much, and how close the perplexity stays.
    """
    folder = run or _new_run_folder(tokens)
    again = shlex.join(["perplexit", "eval", model, str(tokens), "--run", str(folder)])
    with (
        continued_by(f"{again} (and the same options)"),
        stdout_kept_clean(),
        scoring_progress(tokens.name) as progress,
    ):
        size = _batch_size(batch_size)
        result = px.evaluate(
            model, tokens, run=folder, batch_size=size, progress=progress, **options
        )
    people().print(run_table(result.to_json()))
    tell(f"The run is in {folder}")
    if json:
        print_json(result.to_json())


def _new_run_folder(tokens: Path) -> Path:
    """Return a new folder under runs/, named by the time (UTC) and the input."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{stamp}-{tokens.stem}"
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--batch-size expected `auto` or a whole number above 0, got {text!r}")
