"""`perplexit demo`: a real model, a real text, two engines, three precisions, one table."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import perplexit as px
from perplexit.cli import demo_files
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.demo_files import packaged_file
from perplexit.cli.output import (
    in_mib,
    people,
    print_json,
    stdout_kept_clean,
    tell,
    tell_wrapped,
    with_interval,
)
from perplexit.protected_outputs import Kind, OutputFile

EXAMPLES = examples("perplexit demo", "perplexit demo --out elsewhere/ --json")
TEXT_CHARACTERS = 30_000  # of the speech's beginning: enough for an interval, minutes on two cores
MAX_LENGTH, STRIDE = 512, 256
PARAGRAPH = "\n\n"
ENTRY = "from perplexit.cli.app import main; main()"


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is put.")] = Path(
        "demo"
    ),
    json: Annotated[
        bool, typer.Option("--json", help="Print runs and comparisons as JSON on stdout.")
    ] = False,
) -> None:
    """Score a State of the Union address with SmolLM2-135M four ways, and compare.

    PyTorch fp32 is the reference; PyTorch bf16, ONNX Runtime fp32 and ONNX Runtime with 4-bit
    weights are the candidates. It takes two to eight minutes on two cores, most of them for the
    compilation, and needs no network.
    """
    with continued_by(f"perplexit demo --out {out}"), stdout_kept_clean():
        scored = score_four_ways(out)
    people().print(table(scored))
    tell_wrapped("\n" + explanation(scored, out))
    if json:
        print_json(document(scored))


@dataclass(frozen=True)
class Way:
    """One way of running the model: which program, in which dtype, recorded where in `out`."""

    name: str
    program: str | None  # folder of a compiled program; None: PyTorch and the checkpoint itself
    options: tuple[str, ...]
    run: str


WAYS = (
    Way("PyTorch fp32 (reference)", None, ("--dtype", "float32"), "runs/pytorch-fp32"),
    Way("PyTorch bf16", None, ("--dtype", "bfloat16"), "runs/pytorch-bf16"),
    Way("ONNX Runtime fp32", "onnx-fp32", (), "runs/onnx-fp32"),
    Way("ONNX Runtime 4-bit", "onnx-int4", (), "runs/onnx-int4"),
)


@dataclass(frozen=True)
class Scored:
    """One way's run, and how it compares with the reference (None for the reference itself)."""

    name: str
    run: "px.Run"
    comparison: "px.Comparison | None"


def score_four_ways(out: Path) -> list[Scored]:
    """Return the reference (PyTorch fp32) first, then PyTorch bf16, ONNX Runtime fp32 and 4-bit.

    Every step is a command in a process of its own, so that one step's memory and time are not
    another's. What an earlier demo finished in `out` is used again. Raises MissingPackageError
    where the model's or the text's package is not installed, typer.Exit where a step failed.
    """
    model = packaged_file(demo_files.MODEL_PACKAGE, demo_files.MODEL_FILE)
    speech, tokens = out / "speech.txt", out / "speech.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    text = beginning(packaged_file(demo_files.TEXT_PACKAGE, demo_files.TEXT_FILE))
    kind = Kind("the demo's text", lambda path: path.read_bytes() == text.encode())
    OutputFile(speech, kind).write_text(text)
    sizes = ("--max-length", str(MAX_LENGTH), "--stride", str(STRIDE))
    _step("prepare", str(speech), "--tokenizer", str(model), *sizes, "-o", str(tokens))
    for name, options in (("onnx-fp32", ()), ("onnx-int4", ("--quantization", "int4"))):
        if (out / name / "program.json").exists():
            tell(f"The compiled program in {out / name} is used again.")
        else:
            _step("compile", f"hf:{model}", "--to", "onnx", *options, "-o", str(out / name))
    for way in WAYS:
        address = f"onnx:{out / way.program}" if way.program else f"hf:{model}"
        _step("eval", address, str(tokens), "--run", str(out / way.run), *way.options)
    runs = [px.Run.open(out / way.run) for way in WAYS]
    comparisons = [None, *(px.compare(runs[0], run) for run in runs[1:])]
    return [Scored(w.name, r, c) for w, r, c in zip(WAYS, runs, comparisons, strict=True)]


def beginning(speech: Path) -> str:
    """Return the first whole paragraphs of the text, up to TEXT_CHARACTERS."""
    text = speech.read_text(encoding="utf-8")
    return text[: text.rfind(PARAGRAPH, 0, TEXT_CHARACTERS)] + "\n"


def _step(*words: str) -> None:
    """Say a command and run it; raises typer.Exit with its exit code where it fails."""
    tell(f"\n$ perplexit {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-c", ENTRY, *words], check=False)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)


def table(scored: list[Scored]) -> Table:
    """Return one line per run; perplexity and ratio with their 95 % intervals."""
    reference = scored[0].run
    title = f"{reference.num_tokens:,} scored tokens of the State of the Union address of 2026"
    result = Table(title=title, box=None, padding=(0, 1, 1, 0), pad_edge=False)
    result.add_column("run", overflow="fold", min_width=12)
    for name in ("perplexity", "ratio", "verdict", "bits\n/byte", "memory,\ntokens/s"):
        result.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for way in scored:
        run, comparison = way.run, way.comparison
        speed = "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}/s"
        result.add_row(
            way.name,
            _on_two_lines(with_interval(run.perplexity, run.perplexity_low, run.perplexity_high)),
            "1" if comparison is None else _ratio(comparison),
            "-" if comparison is None else comparison.verdict,
            with_interval(run.bits_per_byte, None, None),  # an interval does not fit 80 columns
            f"{in_mib(run.peak_memory_bytes.get('host_rss'))}\n{speed}",
        )
    return result


def _ratio(comparison: "px.Comparison") -> str:
    low, high = comparison.ppl_ratio_low, comparison.ppl_ratio_high
    if low is None or high is None:
        return f"{comparison.ppl_ratio:.5f}"
    return _on_two_lines(f"{comparison.ppl_ratio:.5f} [{low:.5f}, {high:.5f}]")


def _on_two_lines(figure: str) -> str:
    """Return the figure above its interval, so that the table is not wider than most terminals."""
    return figure.replace(" [", "\n[")


def explanation(scored: list[Scored], out: Path) -> str:
    """Return what the table says, in plain words, paragraph by paragraph."""
    found = [(way.name, way.comparison.judged) for way in scored if way.comparison is not None]
    words = [f"{name} {j.predicate('the reference')}. {j.detail()}" for name, j in found]
    next_steps = (
        f"Everything is in {out}. See which tokens changed most:\n"
        f"  perplexit compare {out}/runs/pytorch-fp32 {out}/runs/onnx-int4 --most-changed 20"
    )
    return "\n\n".join([*words, *NOTES, next_steps])


NOTES = (
    "The interval of a perplexity is wide, because another part of the speech would have given "
    "another figure. The interval of a ratio is narrow, because both runs scored the same tokens, "
    "and what makes a passage hard makes it hard for both.",
    "The text is the beginning of the State of the Union address of 2026. It is newer than the "
    "model, so the model cannot have learned it by heart. Older addresses were probably among its "
    "training texts.",
    "The model is SmolLM2-135M-Instruct. It was tuned to answer, not to continue speeches: compare "
    "these figures with each other, not with published ones.",
    "Its weights are shipped at 4 bits already (Q4_1). The reference computes in fp32, but with "
    "those weights. A further 4-bit quantization adds an error of its own, and costs more on "
    "weights that were rounded before than on weights that were not.",
    "Memory is the largest resident size of the process that made the run, weights included.",
)


def document(scored: list[Scored]) -> Mapping[str, Any]:
    """Return one JSON document: the reference's run, then each candidate's run and comparison."""
    return {
        "reference": {"name": scored[0].name, "run": scored[0].run.to_json()},
        "candidates": [
            {"name": s.name, "run": s.run.to_json(), "comparison": s.comparison.to_json()}
            for s in scored
            if s.comparison is not None
        ],
    }
