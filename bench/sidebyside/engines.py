"""Every engine and precision on one text: one `perplexit eval` each, in a process of its own."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import perplexit as px
from perplexit.cli.demo_files import MODEL_FILE, MODEL_PACKAGE, packaged_file
from sidebyside.alternation import Bench, say
from sidebyside.contenders import TABLES
from sidebyside.records import MIB
from sidebyside.workloads import speeches

ENTRY = "from perplexit.cli.app import main; main()"
FIRST = "PyTorch fp32"
QUICK = (FIRST, "ONNX Runtime int8", "llama.cpp Q4_1, as shipped")


def every_engine(bench: Bench) -> dict[str, Any]:
    """Return perplexity, ratio to the first row, largest difference and cost of each row.

    The text is the address of 2026 in disjoint windows of 512 ids; with `--quick` its first 6,000
    characters, by three engines. A second call keeps the runs of the first.
    """
    folder = bench.subfolder("engines-quick" if bench.quick else "engines")
    tokens, gguf = folder / "address.safetensors", packaged_file(MODEL_PACKAGE, MODEL_FILE)
    part = [speeches(1)[0][: 6_000 if bench.quick else None]]
    px.prepare(part, tokenizer=gguf, output=tokens, protocol="disjoint", max_length=512)
    names = QUICK if bench.quick else TABLES["engines"]
    runs = {name: _run_of(name, gguf, tokens, bench.threads) for name in names}
    return {"rows": [_row(name, run, runs[FIRST]) for name, run in runs.items()]}


def _run_of(name: str, gguf: Path, tokens: Path, threads: int) -> px.Run | None:
    """Return the row's run, whose commands are printed; None where one fails."""
    folder = tokens.parent
    run = folder / "runs" / name.lower().replace(" ", "-").replace(",", "")
    compiled, evaluated = TABLES["engines"][name]
    address = f"{compiled}:{gguf}"
    if compiled.startswith("--"):
        address = str(folder / "programs" / compiled.replace("--", "").replace(" ", "-"))
        command = ("compile", f"hf:{gguf}", *compiled.split(), "-o", address)
        if not Path(address).exists() and not _done(*command):
            return None
    options = ("--threads", str(threads), *evaluated.split(), "--run", str(run))
    if not (run / "run.json").exists() and not _done("eval", address, str(tokens), *options):
        return None
    return px.Run.open(run)


def _done(*arguments: str) -> bool:
    say(f"perplexit {shlex.join(arguments)}")
    command = [sys.executable, "-c", ENTRY, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        say(ended.stderr[-2000:])
    return ended.returncode == 0


def _row(name: str, run: px.Run | None, first: px.Run | None) -> dict[str, Any]:
    """Return the row of a run, or that it failed."""
    if run is None or first is None:
        return {"engine": f"{name}: failed"}
    found = {} if run.folder == first.folder else px.compare(first, run).to_json()
    return {
        "engine": name,
        "perplexity": [run.perplexity_low, run.perplexity, run.perplexity_high],
        "ratio": [found.get(f"ppl_ratio{end}") for end in ("_low", "", "_high")],
        "verdict": found.get("verdict"),
        "largest difference (nats)": found.get("max_abs_nll_difference"),
        "bits per weight": (run.session.get("quantization") or {}).get("effective_bits"),
        "peak memory (MiB)": (run.peak_memory_bytes.get("host_rss") or 0) / MIB,
        "tokens/s": run.tokens_per_second,
    }
