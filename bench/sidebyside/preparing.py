"""What `perplexit.prepare` costs: beside the tokenizer's own batch encoding, and on 1 GB."""

import json
from collections.abc import Iterable
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import perplexit as px
from perplexit.resources.host_memory import rss_bytes
from sidebyside.alternation import Bench, turns
from sidebyside.records import MIB
from sidebyside.workers import PeakMemory, in_own_process
from sidebyside.workloads import speeches

NUM_BYTES = 10**9


def _write_corpus(path: Path, texts: Iterable[str], num_bytes: int = NUM_BYTES) -> None:
    """Write texts as JSON Lines until there are so many bytes."""
    with path.open("w", encoding="utf-8") as file:
        for text in takewhile(lambda _: file.tell() < num_bytes, texts):
            file.write(json.dumps({"text": text}) + "\n")


def beside_encoding(bench: Bench) -> dict[str, Any]:
    """Return seconds of `prepare` and of the tokenizer's batch encoding, in turns, on one corpus.

    Each turn is a process of its own, as `perplexit prepare` is: in one process for all, the small
    blocks that a whole corpus of encodings leaves behind make every later turn slower, up to half.
    """
    model, corpus = bench.model(bench.first), bench.subfolder("scratch") / "speeches.jsonl"
    texts = speeches(8 if bench.quick else 10_000)  # all there are
    _write_corpus(corpus, texts)
    seconds: dict[str, list[float]] = {"prepared": [], "encoded": []}
    ids: dict[str, Any] = {}
    for _, name in turns(tuple(seconds), bench.rounds):
        took, ids[name] = in_own_process(bench.threads, f"preparing:{name}", model, corpus)
        seconds[name].append(took)
    pairs = zip(seconds["prepared"], seconds["encoded"], strict=True)
    row = {
        "MB": corpus.stat().st_size / 1e6,
        "documents": len(texts),
        "`prepare` (s)": seconds["prepared"],
        "times `encode_batch`": [ours / raw for ours, raw in pairs],
        "the same ids": np.array_equal(ids["prepared"], ids["encoded"]),
    }
    return {"rows": [row]}


def prepared(model: Path, corpus: Path) -> tuple[float, NDArray[Any]]:
    """Return (seconds, all ids) of `prepare`, from a file to a file."""
    output = corpus.with_suffix(".safetensors")
    with px.Timer() as timer:
        tokens = px.prepare(corpus, tokenizer=model, output=output, max_length=1024)
    return timer.seconds, np.array(tokens.token_ids)


def encoded(model: Path, corpus: Path) -> tuple[float, NDArray[Any]]:
    """Return (seconds, all ids) of tokenizers alone, with the texts in memory."""
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    with px.Timer() as timer:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
    return timer.seconds, np.concatenate([np.array(x) for x in ids])


def large_corpus(bench: Bench) -> dict[str, Any]:
    """Return memory beyond the start while 1 GB of documents goes by, and the time it takes.

    The documents are the addresses over and over, each time numbered.
    """
    model, scratch = bench.model(bench.first), bench.subfolder("scratch")
    corpus, output = scratch / "large.jsonl", scratch / "large.safetensors"
    texts = (f"{number}. {text}" for number, text in enumerate(cycle(speeches(249))))
    _write_corpus(corpus, texts, NUM_BYTES // 20 if bench.quick else NUM_BYTES)
    start, held = rss_bytes(), list[float]()
    with PeakMemory() as memory:
        options: dict[str, Any] = {"progress": lambda *_: held.append((rss_bytes() - start) / MIB)}
        tokens = px.prepare(corpus, tokenizer=model, output=output, **options)
    row = {
        "GB": corpus.stat().st_size / 1e9,
        "tokens": tokens.num_ids,
        "seconds": memory.duration_seconds,
        "peak beyond the start (MiB)": (memory.host_rss_total_peak_bytes - start) / MIB,
        "at most in the first half": max(held[: len(held) // 2 + 1]),
        "in the second": max(held[len(held) // 2 :]),
    }
    corpus.unlink()
    output.unlink()
    return {"rows": [row]}
