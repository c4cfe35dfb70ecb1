"""What `perplexit.prepare` costs: beside the tokenizer, on 1 GB, and on ever more documents."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import perplexit as px
from perplexit.inputs.windows import WindowIds
from perplexit.resources.host_memory import rss_bytes
from perplexit.session_descriptions import ModelDescription, SessionDescription
from sidebyside.alternation import Bench
from sidebyside.paired_ratios import turns
from sidebyside.workers import PeakMemory, in_own_process
from sidebyside.workloads import speeches

NUM_SPEECHES = 400  # all there are: 12 MB
NUM_BYTES = 10**9
NUM_DOCUMENTS = (1_000, 4_000, 16_000, 64_000)
WORDS_PER_DOCUMENT = 40


def measure_beside_encoding(bench: Bench) -> dict[str, Any]:
    """Return seconds of `prepare` and of the tokenizer's batch encoding, in turns, on one corpus.

    Each turn is a process of its own, as `perplexit prepare` is: in one process for all, the small
    blocks that a whole corpus of encodings leaves behind make every later turn slower, up to half.
    """
    texts = speeches(8 if bench.quick else NUM_SPEECHES)
    model, corpus = bench.model(bench.first), bench.subfolder("scratch") / "speeches.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    ways = {"prepare": "sidebyside.preparing:prepared", "encode": "sidebyside.preparing:encoded"}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, str] = {}
    for _, name in turns(tuple(ways), bench.rounds):
        took, found[name] = in_own_process(bench.threads, ways[name], model, corpus)
        seconds[name].append(took)
    return {
        "num_documents": len(texts),
        "num_bytes": sum(len(text.encode()) for text in texts),
        "seconds": seconds,
        "same_ids": found["prepare"] == found["encode"],
    }


def prepared(model: Path, corpus: Path) -> tuple[float, str]:
    """Return (seconds, digest of the ids) of `prepare`, from a file to a file."""
    began = time.perf_counter()
    output = corpus.with_suffix(".safetensors")
    tokens = px.prepare(corpus, tokenizer=model, output=output, max_length=1024)
    return time.perf_counter() - began, _digest(tokens.token_ids)


def encoded(model: Path, corpus: Path) -> tuple[float, str]:
    """Return (seconds, digest of the ids) of tokenizers alone, with the texts in memory."""
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    began = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    return time.perf_counter() - began, _digest(np.concatenate([np.array(x) for x in ids]))


def _digest(ids: NDArray[Any]) -> str:
    return sha256(ids.astype(np.int64).tobytes()).hexdigest()


def measure_large_corpus(bench: Bench) -> dict[str, Any]:
    """Return memory beyond the start while 1 GB of documents goes by, and the time it takes."""
    model, scratch = bench.model(bench.first), bench.subfolder("scratch")
    corpus, output = scratch / "large.jsonl", scratch / "large.safetensors"
    size = NUM_BYTES // 10 if bench.quick else NUM_BYTES
    with corpus.open("w", encoding="utf-8") as file:
        for text in _documents(size):
            file.write(json.dumps({"text": text}) + "\n")
    start, began = rss_bytes(), time.perf_counter()
    held: list[tuple[int, int]] = []

    def progress(num_documents: int, num_tokens: int) -> None:
        del num_documents
        held.append((num_tokens, rss_bytes() - start))

    with PeakMemory() as memory:
        tokens = px.prepare(corpus, tokenizer=model, output=output, progress=progress)
        seconds = time.perf_counter() - began
    record = {
        "num_bytes": corpus.stat().st_size,
        "num_tokens": tokens.num_ids,
        "output_bytes": output.stat().st_size,
        "seconds": seconds,
        "peak_bytes": memory.host_rss_total_peak_bytes - start,
        "held": held[:: max(1, len(held) // 20)],
    }
    for path in (corpus, output):
        path.unlink()
    return record


def _documents(num_bytes: int) -> Iterator[str]:
    """Yield the addresses over and over, each time numbered, until so many bytes are given."""
    texts, given, number = speeches(249), 0, 0
    while given < num_bytes:
        text = f"{number}. {texts[number % len(texts)]}"
        given, number = given + len(text.encode()), number + 1
        yield text


class UniformSession:
    """A session in which every token costs log V: what is left is everything but a model."""

    model = ModelDescription("uniform", "Uniform", 0, "0" * 64, 2**20)
    description = SessionDescription("uniform", "1", "float32", "cpu")

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return log V for each target."""
        return [np.full(len(window.targets_N), np.log(2**20), np.float32) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """Return as many as anybody would want."""
        del window_length
        return 256

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def measure_many_documents(bench: Bench) -> dict[str, Any]:
    """Return processor seconds and peak bytes of both verbs at each number of documents.

    The texts are of a few dozen words, cut from the addresses, each with a number of its own.
    """
    points: dict[str, list[dict[str, float]]] = {"prepare": [], "evaluate": []}
    path, model = bench.subfolder("scratch") / "many.safetensors", bench.model(bench.first)
    words = " ".join(speeches(40)).split()
    session = UniformSession()
    for size in (50, *NUM_DOCUMENTS[: 2 if bench.quick else None]):
        starts = (np.arange(size) * 17) % (len(words) - WORDS_PER_DOCUMENT)
        texts = [f"{i} " + " ".join(words[s:][:WORDS_PER_DOCUMENT]) for i, s in enumerate(starts)]
        prepare = partial(px.prepare, texts, tokenizer=model, output=path)
        points["prepare"].append({"size": size, **_cost(prepare)})
        evaluate = partial(px.evaluate, session, px.TokenFile.open(path))
        points["evaluate"].append({"size": size, **_cost(evaluate)})
    return {"label": "documents", "points": {way: rows[1:] for way, rows in points.items()}}


def _cost(work: Callable[[], object]) -> dict[str, float]:
    """Do the work, and return processor seconds and peak bytes beyond what was held before."""
    with PeakMemory() as memory:
        began = time.process_time()
        work()
        seconds = time.process_time() - began
    return {"seconds": seconds, "peak_bytes": memory.host_rss_peak_bytes}
