"""`perplexit.prepare` beside the tokenizer's own batch encoding, in turns, on one corpus."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import perplexit as px
from sidebyside.figures import turns
from sidebyside.scripts import Job, printed
from sidebyside.texts import speeches

NUM_SPEECHES = 80  # the newest: 4 MB


def measure(job: Job, scratch: Path) -> dict[str, Any]:
    """Seconds of both, and whether the ids are the same."""
    texts = speeches(NUM_SPEECHES // 10 if job.quick else NUM_SPEECHES)
    corpus = scratch / "speeches.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    found: dict[str, Any] = {}

    def prepare() -> None:
        output = scratch / "speeches.safetensors"
        found["prepare"] = px.prepare(corpus, tokenizer=job.model, output=output, max_length=1024)

    def encode() -> None:
        tokenizer = Tokenizer.from_file(str(Path(job.model) / "tokenizer.json"))
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        found["encode"] = [encoding.ids for encoding in encodings]

    ways = {"prepare": prepare, "encode": encode}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(tuple(ways), job.rounds):
        began = time.perf_counter()
        ways[name]()
        seconds[name].append(time.perf_counter() - began)
    return {
        "num_documents": len(texts),
        "num_bytes": sum(len(text.encode()) for text in texts),
        "seconds": seconds,
        "same_ids": bool(
            np.array_equal(found["prepare"].token_ids, np.concatenate(found["encode"]))
        ),
    }


if __name__ == "__main__":
    printed(measure)
