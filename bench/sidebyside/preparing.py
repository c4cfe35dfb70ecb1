"""`perplexit.prepare` beside the tokenizer's own batch encoding, in turns, on one corpus.

Each turn is a process of its own, as `perplexit prepare` is: in one process for all, the small
blocks that a whole corpus of encodings leaves behind make every later turn slower, up to half.
"""

import json
import time
from collections.abc import Callable
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import perplexit as px
from sidebyside.figures import turns
from sidebyside.scripts import Job, printed
from sidebyside.texts import speeches

NUM_SPEECHES = 400  # all there are: 12 MB


def measure(job: Job, scratch: Path) -> dict[str, Any]:
    """Seconds of both, and whether the ids are the same."""
    texts = speeches(8 if job.quick else NUM_SPEECHES)
    corpus = scratch / "speeches.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    ways: dict[str, Callable[[str, Path], tuple[float, str]]] = {
        "prepare": prepared,
        "encode": encoded,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, str] = {}
    for _, name in turns(tuple(ways), job.rounds):
        with get_context("spawn").Pool(1) as alone:
            took, found[name] = alone.apply(ways[name], (str(job.model), corpus))
        seconds[name].append(took)
    return {
        "num_documents": len(texts),
        "num_bytes": sum(len(text.encode()) for text in texts),
        "seconds": seconds,
        "same_ids": found["prepare"] == found["encode"],
    }


def prepared(model: str, corpus: Path) -> tuple[float, str]:
    """(seconds, digest of the ids) of `prepare`, from a file to a file."""
    began = time.perf_counter()
    output = corpus.with_suffix(".safetensors")
    tokens = px.prepare(corpus, tokenizer=model, output=output, max_length=1024)
    return time.perf_counter() - began, _digest(tokens.token_ids)


def encoded(model: str, corpus: Path) -> tuple[float, str]:
    """(seconds, digest of the ids) of tokenizers alone, with the texts in memory."""
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    began = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    return time.perf_counter() - began, _digest(np.concatenate([np.array(x) for x in ids]))


def _digest(ids: NDArray[Any]) -> str:
    return sha256(ids.astype(np.int64).tobytes()).hexdigest()


if __name__ == "__main__":
    printed(measure)
