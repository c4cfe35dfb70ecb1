"""What a window of 1024 ids adds to a loaded program's memory: the head inside, and with logits.

On a shallow random Llama with 49,152 ids, so that the logits are what counts. Anonymous memory of
a process of its own, sampled every 2 ms; prints one JSON object, in bytes.

    python bench/program_memory.py tvm
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import perplexit as px

LENGTH, VOCAB_SIZE = 1024, 49_152
MEASURE = f"""
import sys, threading
import numpy as np
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.registry import load_session

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("RssAnon"))

session = load_session(sys.argv[1], threads=1)
ids = np.random.default_rng(0).integers(0, {VOCAB_SIZE}, {LENGTH}).astype(np.int32)
peaks, done = [anonymous_bytes()], threading.Event()
def sample():
    while not done.wait(0.002):
        peaks.append(anonymous_bytes())
thread = threading.Thread(target=sample)
thread.start()
session.token_nll([WindowIds(0, ids, np.arange(1, {LENGTH}))])
done.set()
thread.join()
print(max(peaks) - peaks[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=["onnx", "openvino", "tvm", "pt2"])
    engine = parser.parse_args().engine
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _checkpoint(Path(folder) / "checkpoint")
        inside, logits = (
            _added(checkpoint, engine, Path(folder) / kind, perplexity=kind == "inside")
            for kind in ("inside", "logits")
        )
    print(json.dumps({"engine": engine, "head_inside": inside, "logits": logits}))


def _checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _added(checkpoint: Path, engine: str, output: Path, *, perplexity: bool) -> int:
    px.compile(checkpoint, to=engine, output=output, perplexity=perplexity, max_length=LENGTH)
    command = [sys.executable, "-c", MEASURE, str(output)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
