"""The table of docs/engines.md: one model through every engine and precision, one text.

    python bench/engines_table.py -o build/engines             every row; a second call goes on
    python bench/engines_table.py -o build/engines --only tvm   rows whose name holds "tvm"

Each row is one `perplexit eval` in a process of its own (after one `perplexit compile` where the
engine wants a program), over one token file; its ratio is paired with the first row's. Prints the
commands, then the table in Markdown.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import perplexit as px
from perplexit.cli.demo_files import (
    MODEL_FILE,
    MODEL_PACKAGE,
    TEXT_FILE,
    TEXT_PACKAGE,
    packaged_file,
)

MIB = 2**20
ENTRY = "from perplexit.cli.app import main; main()"


@dataclass(frozen=True)
class Row:
    """One way to run the model: how it is compiled (empty: not at all), how it is evaluated."""

    name: str
    engine: str
    compiled: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()


FIXED = ("--max-length", "512", "--batch-size", "1")
ROWS = (
    Row("PyTorch fp32", "hf"),
    Row("PyTorch bf16", "hf", evaluated=("--dtype", "bf16")),
    Row("PyTorch nf4", "hf", evaluated=("--quantization", "nf4")),
    Row("PyTorch int8", "hf", evaluated=("--quantization", "int8")),
    Row("PyTorch q4f16_0", "hf", evaluated=("--quantization", "q4f16_0")),
    Row("PyTorch mxfp6", "hf", evaluated=("--quantization", "mxfp6")),
    Row("PyTorch mxint8", "hf", evaluated=("--quantization", "mxint8")),
    Row("ONNX Runtime fp32", "onnx", ("--to", "onnx")),
    Row("ONNX Runtime int8", "onnx", ("--to", "onnx", "--quantization", "int8")),
    Row("ONNX Runtime int4", "onnx", ("--to", "onnx", "--quantization", "int4")),
    Row("OpenVINO fp32", "openvino", ("--to", "openvino")),
    Row("OpenVINO bf16", "openvino", ("--to", "openvino"), ("--dtype", "bf16")),
    Row("OpenVINO int8", "openvino", ("--to", "openvino", "--quantization", "int8")),
    Row("OpenVINO int4", "openvino", ("--to", "openvino", "--quantization", "int4")),
    Row("TVM fp32", "tvm", ("--to", "tvm", *FIXED)),
    Row("TVM q4f16_0", "tvm", ("--to", "tvm", "--quantization", "q4f16_0", *FIXED)),
    Row("AOTInductor fp32", "pt2", ("--to", "pt2")),
    Row("llama.cpp Q4_1, as shipped", "gguf"),
    Row("llama.cpp Q8_0", "gguf", ("--to", "gguf", "--quantization", "q8_0")),
    Row("llama.cpp Q4_K_M", "gguf", ("--to", "gguf", "--quantization", "q4_k_m")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/engines"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this, beside the first")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    tokens = _token_file(options.output)
    rows = [row for row in ROWS if row is ROWS[0] or options.only.lower() in row.name.lower()]
    done = {row: _run_of(row, tokens, options.output, options.threads) for row in rows}
    print(_table(done))


def _token_file(output: Path) -> Path:
    """The address of 2026 in disjoint windows of 512 ids."""
    path = output / "address.safetensors"
    if not path.exists():
        px.prepare(
            packaged_file(TEXT_PACKAGE, TEXT_FILE),
            tokenizer=packaged_file(MODEL_PACKAGE, MODEL_FILE),
            output=path,
            protocol="disjoint",
            max_length=512,
        )
    return path


def _run_of(row: Row, tokens: Path, output: Path, threads: int) -> Path | None:
    """The folder of the row's run; None where the row could not be made (the error is printed)."""
    name = row.name.lower().replace(" ", "-").replace(",", "")
    run = output / "runs" / name
    gguf = packaged_file(MODEL_PACKAGE, MODEL_FILE)
    if (run / "run.json").exists():
        return run
    address = f"{row.engine}:{gguf}"
    if row.compiled:
        program = output / "programs" / name.replace("openvino-bf16", "openvino-fp32")
        address = str(program)
        compiled = ("compile", f"hf:{gguf}", *row.compiled, "-o", str(program))
        if not program.exists() and not _ran(compiled):
            return None
    evaluated = ("eval", address, str(tokens), "--threads", str(threads), *row.evaluated)
    return run if _ran((*evaluated, "--run", str(run))) else None


def _ran(arguments: tuple[str, ...]) -> bool:
    print("perplexit", shlex.join(arguments), flush=True)
    command = [sys.executable, "-c", ENTRY, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True)
    if ended.returncode != 0:
        print(ended.stderr.decode()[-2000:], flush=True)
    return ended.returncode == 0


def _table(done: dict[Row, Path | None]) -> str:
    """Return one line per row: perplexity and ratio with intervals, largest difference, cost."""
    first = done[ROWS[0]]
    if first is None:
        raise SystemExit(f"{ROWS[0].name}, which the others are held against, failed")
    reference = px.Run.open(first)
    lines = [
        f"{reference.num_tokens:,} tokens scored, {reference.threads} threads",
        "",
        "| | perplexity | ratio to the first | verdict | largest difference (nats) "
        "| bits per weight | peak memory (MiB) | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, folder in done.items():
        if folder is None:
            lines.append(f"| {row.name} | failed | | | | | | |")
            continue
        run = px.Run.open(folder)
        lines.append(_line(row, run, None if run.folder == reference.folder else reference))
    return "\n".join(lines)


def _line(row: Row, run: px.Run, reference: px.Run | None) -> str:
    """Return the row's line. An interval that a text is too short for is left out."""
    ratio, verdict, largest = "1", "", ""
    if reference is not None:
        found = px.compare(reference, run).to_json()
        ends = found["ppl_ratio_low"], found["ppl_ratio_high"]
        ratio = _with_interval(found["ppl_ratio"], *ends, 5, 5)
        verdict = found["verdict"]
        largest = f"{found['max_abs_nll_difference']:.1e}"
    quantization = run.session.get("quantization")
    bits = f"{quantization['effective_bits']:.1f}" if quantization else ""
    peak = (run.peak_memory_bytes.get("host_rss") or 0) / MIB
    ends = run.perplexity_low, run.perplexity_high
    perplexity = _with_interval(run.perplexity, *ends, 3, 2)
    speed = f"{run.tokens_per_second or 0:,.0f}"
    cells = (row.name, perplexity, ratio, verdict, largest, bits, f"{peak:,.0f}", speed)
    return f"| {' | '.join(cells)} |"


def _with_interval(
    value: float | None, low: float | None, high: float | None, decimals: int, ends: int
) -> str:
    text = "" if value is None else f"{value:.{decimals}f}"
    return text if low is None or high is None else f"{text} [{low:.{ends}f}, {high:.{ends}f}]"


if __name__ == "__main__":
    main()
