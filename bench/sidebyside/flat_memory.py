"""1 GB of documents prepared: seconds, and the process's memory at every tenth of the way."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import perplexit as px
from perplexit.resources.host_memory import HostMemory, rss_bytes
from sidebyside.scripts import Job, printed
from sidebyside.texts import speeches

NUM_BYTES = 10**9


def documents(num_bytes: int) -> Iterator[str]:
    """The addresses over and over, each time numbered, until so many bytes have been given."""
    texts, given, number = speeches(249), 0, 0
    while given < num_bytes:
        text = f"{number}. {texts[number % len(texts)]}"
        given, number = given + len(text.encode()), number + 1
        yield text


def measure(job: Job, scratch: Path) -> dict[str, Any]:
    """Memory beyond the start as documents go by, and the rate."""
    corpus, output = scratch / "large.jsonl", scratch / "large.safetensors"
    size = NUM_BYTES // 10 if job.quick else NUM_BYTES
    with corpus.open("w", encoding="utf-8") as file:
        for text in documents(size):
            file.write(json.dumps({"text": text}) + "\n")
    start = rss_bytes()
    held: list[tuple[int, int]] = []
    with HostMemory() as memory:
        began = time.perf_counter()

        def progress(num_documents: int, num_tokens: int) -> None:
            del num_documents
            held.append((num_tokens, rss_bytes() - start))

        tokens = px.prepare(corpus, tokenizer=job.model, output=output, progress=progress)
        seconds = time.perf_counter() - began
    record = {
        "num_bytes": os.path.getsize(corpus),
        "num_tokens": tokens.num_ids,
        "output_bytes": os.path.getsize(output),
        "seconds": seconds,
        "peak_bytes": memory.peak_bytes - start,
        "held": held[:: max(1, len(held) // 20)],
    }
    for path in (corpus, output):
        path.unlink()
    return record


if __name__ == "__main__":
    printed(measure)
