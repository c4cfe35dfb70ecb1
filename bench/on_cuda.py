"""Perplexit on a CUDA device beside lm-evaluation-harness and the device's own matrix products.

    python bench/on_cuda.py                         where a CUDA device is: the whole measurement
    python bench/on_cuda.py --also liger --also cce with fused heads too
    python bench/on_cuda.py --tiny --device cpu     a minute anywhere: proves the script, no aim

A random Llama (by default of 1.24 billion parameters, with a vocabulary of 128,256) scores random
windows of 4096 ids in bfloat16; Perplexit with `--head compiled`, and with its default. The
contenders take turns, each in a process of its own; a turn is every window.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from run import write_record, write_report
from sidebyside.alternation import Alternation, Bench
from sidebyside.contenders import ON_CUDA_TOO
from sidebyside.sections import CUDA, MODELS

LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
}
TINY = LARGE | {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def main() -> None:
    """Measure the section, and write its record and its page."""
    options = _options()
    sizes = TINY if options.tiny else LARGE
    model = f"{'tiny' if options.tiny else 'large'}-{options.dtype}"
    MODELS[model] = ("sidebyside.checkpoints:random_llama", sizes | {"dtype": options.dtype})
    section = CUDA.of(model, options.max_length, options.windows, dtype=options.dtype)
    contenders = (*section.contenders, *(f"perplexit, {name}" for name in options.also))
    section = replace(
        section, contenders=contenders, device=options.device, batch_size=options.batch_size
    )
    bench = Bench(options.out, torch.get_num_threads(), options.rounds, options.tiny, {}, model)
    conditions = {"threads": bench.threads, "rounds": bench.rounds, "device": _device_name(options)}
    write_record(bench, section, Alternation(bench, section).measure(), conditions)
    shutil.rmtree(options.out / "scratch")
    page = write_report(options.out)
    (options.out / "cuda.md").write_text(page, encoding="utf-8")
    if options.tiny or options.device == "cpu" or options.dtype != "bfloat16":
        print("Not the aims' conditions (CUDA, the large model, bfloat16): this proves the script.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=None, help="32, with --tiny 8")
    parser.add_argument("--max-length", type=int, default=None, help="4096, with --tiny 256")
    parser.add_argument("--batch-size", type=int, default=1, help="of every contender")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--also", choices=sorted(ON_CUDA_TOO), action="append", default=[])
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("-o", "--out", type=Path, default=Path("build/bench-cuda"))
    options = parser.parse_args()
    options.windows = options.windows or (8 if options.tiny else 32)
    options.max_length = options.max_length or (256 if options.tiny else 4096)
    if options.rounds < 5:
        parser.error("a median of fewer than 5 rounds says little: --rounds 5 or more")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --tiny --device cpu proves the script")
    return options


def _device_name(options: argparse.Namespace) -> str:
    on_cuda = torch.device(options.device).type == "cuda"
    return torch.cuda.get_device_name(options.device) if on_cuda else options.device


if __name__ == "__main__":
    main()
