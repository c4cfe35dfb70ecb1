"""Decode of many windows at once against the plain loop of one window and one token a call.

    python bench/cached_decode.py MODEL_FOLDER [--windows 256 1024] [--batch 64]

Each is timed at positions spread evenly over the window (a step's time grows with what is in the
cache, and depends on nothing else), in turns, on one thread. The plain loop is transformers' own
model with its DynamicCache. A JSON line a window length.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from perplexit import PytorchInferenceSession
from perplexit.inputs.windows import WindowIds

POSITIONS, STEPS = 6, 3


def main() -> None:
    """Print tokens per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    session = PytorchInferenceSession(options.model, threads=1)
    session.caching()
    torch.set_num_threads(1)
    for window in options.windows:
        seconds: dict[str, list[float]] = {"loop": [], "batched": []}
        batched = _batched(session, options.batch, window)
        for start in np.linspace(1, window - STEPS - 1, POSITIONS).astype(int).tolist():
            with torch.inference_mode():
                seconds["loop"] += _timed(_loop(session.module, start), STEPS)
            seconds["batched"] += _timed(batched(start), STEPS)
        rates = {"loop": 1 / np.mean(seconds["loop"])}
        rates["batched"] = options.batch / np.mean(seconds["batched"])
        record = {"window": window, "batch": options.batch, "threads": 1}
        record |= {f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()}
        print(json.dumps(record | {"ratio": round(rates["batched"] / rates["loop"], 1)}))


def _timed(steps: Iterator[Any], count: int) -> list[float]:
    next(steps)  # allocates and warms
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - began)
    return seconds


def _loop(model: Any, start: int) -> Iterator[Any]:
    cache = DynamicCache(config=model.config)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        states = torch.randn(1, config.num_key_value_heads, start, size)
        cache.update(states, states.clone(), layer)
    ids = torch.randint(config.vocab_size, (1, 1))
    while True:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        yield -logits[0, -1].float().log_softmax(-1)[int(ids)]


def _batched(
    session: PytorchInferenceSession, batch: int, window: int
) -> Callable[[int], Iterator[Any]]:
    random = np.random.default_rng(0)
    vocab_size = session.model.vocab_size
    windows = [
        WindowIds(i, random.integers(0, vocab_size, window).astype(np.int32), np.arange(1, window))
        for i in range(batch)
    ]
    cache = session.open_cache(windows)
    ids_BT = random.integers(0, vocab_size, (batch, 1))
    picked = np.arange(batch), np.zeros(batch, np.int64)
    cache.feed(ids_BT, first_row=0, start=0, picked=picked)
    with torch.inference_mode():
        layers: Any = cache._layers.layers  # of keys and values, allocated by the feed above
        for layer in layers:
            layer.keys.normal_()
            layer.values.normal_()

    def steps(start: int) -> Iterator[Any]:
        for position in range(start, window):
            rows = cache.feed(ids_BT, first_row=0, start=position, picked=picked)
            yield rows.details(ids_BT[:, 0], with_details=False, top_k=0)

    return steps


if __name__ == "__main__":
    main()
