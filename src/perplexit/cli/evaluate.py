"""`perplexit eval`: a model over a token file → a run."""

import shlex
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

import perplexit as px
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.output import people, print_json, stdout_kept_clean, tell
from perplexit.cli.progress import scoring_progress
from perplexit.cli.record_tables import run_table
from perplexit.errors import UsageError
from perplexit.quantization.precisions import precisions_by_engine

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


class OnNonFinite(StrEnum):
    """What to do with a token whose loss is NaN or infinite."""

    ERROR = "error"
    COUNT = "count"


class Mode(StrEnum):
    """How windows go through the model."""

    FULL = "full"
    CACHED = "cached"


class ReferenceDtype(StrEnum):
    """How hidden states are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


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
        Path, typer.Argument(metavar="INPUT", help="A token file made by `perplexit prepare`.")
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run's folder; one that holds an interrupted run is continued. "
            "\\[default: a new one under runs/]",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. \\[default: float32]")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help=f"The weights' precision. {precisions_by_engine()}.")
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(metavar="auto|N", help="Windows in one forward pass."),
    ] = "auto",
    mode: Annotated[
        Mode,
        typer.Option(help="Whole windows, or prefill and decode against a key/value cache."),
    ] = Mode.FULL,
    prompt_len: Annotated[
        int | None,
        typer.Option(min=1, help="Ids of the prefill, with --mode cached. \\[default: 1]"),
    ] = None,
    decode_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Ids a decode call, with --mode cached. \\[default: 1]"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="PyTorch: cpu, cuda, cuda:N, mps, or auto (layers spread over all there is). ONNX "
            "Runtime: an execution provider. Others: what the program or library was built for. "
            "\\[default: of PyTorch cuda where there is one, else cpu]"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. \\[default: the engine's own]")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A PEFT adapter (LoRA and its like) on the model."),
    ] = None,
    merge_adapter: Annotated[
        bool,
        typer.Option("--merge-adapter", help="Add the adapter into the weights before scoring."),
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(help=r"PyTorch: sdpa, eager or flash_attention_2. \[default: sdpa]"),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="PyTorch: how hidden states become losses: chunked; compiled (torch.compile); on "
            r"CUDA also liger and cce, which give the loss alone. \[default: chunked]"
        ),
    ] = None,
    compile_mode: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="default|reduce-overhead",
            help="PyTorch: compile the layers; reduce-overhead replays CUDA graphs.",
        ),
    ] = None,
    device_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PyTorch: a JSON object of modules and their devices (cuda:0, cpu, disk). "
            "--device auto makes one.",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="PyTorch: split every layer over N processes, one a GPU."
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=0, help="Keep the K most likely tokens of every position.")
    ] = 0,
    confidence: Annotated[float, typer.Option(help="Coverage of the interval, in (0, 1).")] = 0.95,
    on_non_finite: Annotated[
        OnNonFinite,
        typer.Option(help="A NaN or infinite loss stops the run, or is counted and left out."),
    ] = OnNonFinite.ERROR,
    save_reference: Annotated[
        bool,
        typer.Option(
            "--save-reference",
            help="Keep the final hidden states, so that candidates can be held against this run.",
        ),
    ] = False,
    reference_dtype: Annotated[
        ReferenceDtype, typer.Option(help="How the hidden states are stored.")
    ] = ReferenceDtype.FLOAT32,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|MODEL|FILE",
            help="A run made with --save-reference (or --top-k), a model to score in step, or "
            "llama.cpp's --kl-divergence-base file: every token gets its KL divergence from it.",
        ),
    ] = None,
    measure_noise_floor: Annotated[
        bool,
        typer.Option(
            "--measure-noise-floor",
            help="Score some windows again in batches of another size; to `compare` a difference "
            "that is not larger is too small to matter.",
        ),
    ] = False,
    other_tokenizer: Annotated[
        bool,
        typer.Option(
            "--other-tokenizer",
            help="Go on where the model comes with another tokenizer than the input's.",
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the run's record as JSON on stdout.")
    ] = False,
) -> None:
    """Score a token file with a model: perplexity with its interval, losses, memory and time.

    A run that was stopped (Ctrl-C, kill, a crash) continues when the same command names its --run.

    Fastest on a CPU that has bfloat16: --dtype bf16, with the model itself or with a program made
    by `perplexit compile MODEL --to openvino -o PROGRAM` (its head stays in float32).
    docs/benchmarks.md says by how much, and how near the perplexity stays.
    """
    folder = run or _new_run_folder(tokens)
    again = shlex.join(["perplexit", "eval", model, str(tokens), "--run", str(folder)])
    with (
        continued_by(f"{again} (and the same options)"),
        stdout_kept_clean(),
        scoring_progress(tokens.name) as progress,
    ):
        result = px.evaluate(
            model,
            tokens,
            run=folder,
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
            adapter=adapter,
            merge_adapter=merge_adapter,
            attention=attention,
            head=head,
            compile_mode=compile_mode,
            device_map=device_map,
            tensor_parallel=tensor_parallel,
            batch_size=_batch_size(batch_size),
            mode=mode.value,
            prompt_len=prompt_len,
            decode_chunk=decode_chunk,
            top_k=top_k,
            confidence=confidence,
            on_non_finite=on_non_finite.value,
            save_reference=save_reference,
            reference_dtype=reference_dtype.value,
            reference=reference,
            measure_noise_floor=measure_noise_floor,
            other_tokenizer=other_tokenizer,
            progress=progress,
        )
    people().print(run_table(result.to_json()))
    tell(f"The run is in {folder}")
    if json:
        print_json(result.to_json())


def _new_run_folder(tokens: Path) -> Path:
    """A folder under runs/ that does not exist yet, named by the time (UTC) and the input."""
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
