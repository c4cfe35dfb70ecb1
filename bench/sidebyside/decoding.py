"""Decode against a key/value cache: one window and one token a call, and many windows at once.

A step's time depends on how much is in the cache and on nothing else, so long windows are timed at
positions spread evenly over them, on a cache of random keys and values. Short ones (to show that
both give the same losses) are decoded for real, from the first id to the last.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

import perplexit as px
from perplexit.inputs.windows import WindowIds
from sidebyside.contenders import Contender, Scored, Setting
from sidebyside.perplexit_ways import Evaluating
from sidebyside.transformers_loops import load_transformers
from sidebyside.workloads import Workload

LONGEST_REAL = 128
POSITIONS = 6
WINDOWS_TOGETHER = 64
Step = Callable[[], object]


def sampled_positions(max_length: int) -> list[int]:
    """Places in a window, spread evenly."""
    return [int(place) for place in np.linspace(1, max_length - 3, POSITIONS)]


def timed_steps(steps: Iterable[Step], tokens_a_step: int) -> Scored:
    """The second call of each step timed: the first allocates."""
    seconds, count = 0.0, 0
    for step in steps:
        step()
        began = time.perf_counter()
        step()
        seconds += time.perf_counter() - began
        count += tokens_a_step
    return Scored(None, count, seconds=seconds)


@dataclass(frozen=True)
class OneTokenACall:
    """transformers' own model and cache, as a program with a cache of its own is run."""

    model: Any

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """The whole of short windows, steps at sampled positions of long ones."""
        if workload.max_length <= LONGEST_REAL:
            return lambda: self.whole(workload)
        return lambda: timed_steps(self.steps(workload.max_length), 1)

    def whole(self, workload: Workload) -> Scored:
        """Each id fed alone, its successor's loss read off."""
        losses: list[float] = []
        for window_T in workload.windows():
            cache = DynamicCache(config=self.model.config)
            for fed, target in zip(window_T[:-1].tolist(), window_T[1:].tolist(), strict=True):
                losses.append(self.step(cache, fed, target))
        return Scored(sum(losses), len(losses), nll=losses)

    @torch.no_grad()
    def step(self, cache: Any, fed: int, target: int) -> float:
        """The loss of `target` after `fed`."""
        out = self.model(input_ids=torch.tensor([[fed]]), past_key_values=cache, use_cache=True)
        return -float(out.logits[0, -1].float().log_softmax(-1)[target])

    def steps(self, max_length: int) -> Iterator[Step]:
        """A step at each sampled position, on a cache that is as full as it would be there."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = config.hidden_size // config.num_attention_heads
        for position in sampled_positions(max_length):
            cache: Any = DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                states = torch.randn(1, heads, position, size, dtype=self.model.dtype)
                cache.update(states, states.clone(), layer)
            yield partial(self.step, cache, 1, 2)


@dataclass(frozen=True)
class WindowsTogether:
    """Perplexit's cached mode: many windows side by side, one token a call and window."""

    session: px.PytorchInferenceSession
    scratch: str

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """The whole of short windows, steps at sampled positions of long ones."""
        if workload.max_length <= LONGEST_REAL:
            options = {"mode": "cached", "prompt_len": 1, "decode_chunk": 1}
            return Evaluating(self.session, self.scratch, options).prepare(workload)
        feed = self.on_a_full_cache(workload.max_length)
        positions = sampled_positions(workload.max_length)
        return lambda: timed_steps((partial(feed, at) for at in positions), WINDOWS_TOGETHER)

    def on_a_full_cache(self, max_length: int) -> Callable[[int], object]:
        """A step of all windows at a position, on a cache of random keys and values."""
        ids_T = np.arange(max_length, dtype=np.int32) % self.session.model.vocab_size
        windows = [WindowIds(i, ids_T, np.arange(1, max_length)) for i in range(WINDOWS_TOGETHER)]
        cache = self.session.open_cache(windows)
        ids_BT = np.ones((WINDOWS_TOGETHER, 1), dtype=np.int64)
        picked = np.arange(WINDOWS_TOGETHER), np.zeros(WINDOWS_TOGETHER, np.int64)

        def feed(position: int) -> object:
            rows = cache.feed(ids_BT, first_row=0, start=position, picked=picked)
            return rows.details(ids_BT[:, 0], with_details=True, top_k=0)

        feed(0)
        layers: Any = cache._layers.layers  # of keys and values, allocated by the feed above
        with torch.inference_mode():
            for layer in layers:
                layer.keys.normal_()
                layer.values.normal_()
        return feed


def one_token_a_call(setting: Setting) -> Contender:
    """The loop that a compiled program with a retained cache is run by."""
    return OneTokenACall(load_transformers(setting))


def windows_together(setting: Setting) -> Contender:
    """`--mode cached` with 64 windows at a time."""
    session = px.PytorchInferenceSession(
        setting.model, dtype=setting.dtype, threads=setting.threads
    )
    return WindowsTogether(session, setting.scratch)
