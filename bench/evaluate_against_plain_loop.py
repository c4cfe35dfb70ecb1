"""Perplexit's evaluation beside the loop that everybody writes, in turn, on the demo's model.

The plain loop is `model(ids, labels=ids).loss`, one disjoint window after the other. Both sides
load the model before the clock starts, see the same windows with the same number of threads, and
take turns, so that a slow minute of the machine hits both. Prints a line a round and the medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.cli.demo_story import MODEL_FILE, MODEL_PACKAGE, TEXT_FILE, TEXT_PACKAGE
from perplexit.cli.packaged import packaged_file
from perplexit.sessions.base import InferenceSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    gguf = packaged_file(MODEL_PACKAGE, MODEL_FILE)
    text = packaged_file(TEXT_PACKAGE, TEXT_FILE).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        tokens = _first_windows(text, gguf, Path(folder), options)
        session = px.load_session(f"hf:{gguf}", threads=options.threads)
        torch.set_num_threads(options.threads)
        plain: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        _report(plain, session, tokens, options.rounds)


def _first_windows(
    text: str, gguf: Path, folder: Path, options: argparse.Namespace
) -> px.TokenFile:
    """A token file of the first windows of the text, all full."""
    whole = px.prepare(
        [text],
        tokenizer=gguf,
        output=folder / "whole.safetensors",
        protocol="disjoint",
        max_length=options.max_length,
    )
    lines = folder / "ids.txt"
    px.export_id_lines(whole, lines)
    kept = lines.read_text().splitlines()[: options.windows]
    lines.write_text("\n".join(kept) + "\n")
    return px.import_id_lines(lines, output=folder / "tokens.safetensors")


def _report(plain: Any, session: InferenceSession, tokens: px.TokenFile, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"plain loop": [], "perplexit": []}
    for number in range(rounds):
        began = time.perf_counter()
        plain_nll = _plain_loop(plain, tokens)
        seconds["plain loop"].append(time.perf_counter() - began)
        began = time.perf_counter()
        run = px.evaluate(session, tokens)
        seconds["perplexit"].append(time.perf_counter() - began)
        last = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        print(f"round {number + 1}: {last}")
    assert run.nll_sum is not None  # no loss of this model is NaN
    assert run.num_tokens
    difference = abs(run.nll_sum - plain_nll) / run.num_tokens
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name}: median {median:.2f} s, {run.num_tokens / median:.0f} tokens/s")
    print(f"mean nll differs by {difference:.1e} nats (perplexit also records entropy and rank)")


@torch.inference_mode()
def _plain_loop(model: Any, tokens: px.TokenFile) -> float:
    """The summed nll in nats over every window's targets."""
    total = 0.0
    for index in range(tokens.num_windows):
        ids = torch.from_numpy(tokens.window_ids(index).ids_T.astype("int64"))[None]
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return total


if __name__ == "__main__":
    main()
