"""What a window of 1024 ids adds to a loaded program's memory: the head inside, and with logits.

On a shallow random Llama with 49,152 ids, so that the logits are what counts. Anonymous memory of
a process of its own, sampled every 2 ms; prints one JSON object, in bytes.

    python bench/program_memory.py tvm
"""

import json
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from sidebyside.sections import SMALL_LLAMA
from sidebyside.workers import in_own_process

import perplexit as px
from perplexit.inputs.windows import WindowIds

LENGTH, VOCAB_SIZE = 1024, 49_152
CONFIG = SMALL_LLAMA | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": 64}
CONFIG |= {"intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG |= {"max_position_embeddings": 2048, "tie_word_embeddings": True}


def main(engine: str) -> None:
    """Print what each of the two programs of the engine adds."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        in_own_process(1, "sidebyside.checkpoints:random_llama", checkpoint, CONFIG)
        found = {}
        for name in ("head_inside", "logits"):
            program, inside = Path(folder) / name, name == "head_inside"
            px.compile(checkpoint, to=engine, output=program, perplexity=inside, max_length=LENGTH)
            found[name] = in_own_process(1, "program_memory:bytes_added", program)
    print(json.dumps({"engine": engine} | found))


def bytes_added(program: Path) -> int:
    """Return the peak of anonymous memory that scoring one window adds."""
    session = px.load_session(program, threads=1)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, LENGTH).astype(np.int32)
    peaks, done = [_anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peaks.append(_anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    session.token_nll([WindowIds(0, ids, np.arange(1, LENGTH))])
    done.set()
    thread.join()
    return max(peaks) - peaks[0]


def _anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("RssAnon"))


if __name__ == "__main__":
    main(sys.argv[1])
