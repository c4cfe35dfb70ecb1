"""Decode against a key/value cache: one window and one token per call, and many windows at once.

A step's time depends on how much is in the cache and on nothing else, so long windows are timed at
positions spread evenly over them, on a cache of random keys and values. Short ones (to show that
both give the same losses) are decoded for real, from the first id to the last.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

import perplexit as px
from perplexit.inputs.windows import WindowIds
from sidebyside.contenders import Score, Scored, Setting, Workload
from sidebyside.perplexit_contenders import evaluation_in, open_session
from sidebyside.transformers_loops import load_transformers

LONGEST_REAL = 128
POSITIONS = 6
WINDOWS_TOGETHER = 64
Step = Callable[[], object]


def one_token_a_call(setting: Setting) -> Score:
    """Open transformers' own model and cache, as a program with a cache of its own is run."""
    model = load_transformers(setting)
    return _by_length(partial(_decoded, model), partial(_steps, model), 1)


def windows_together(setting: Setting) -> Score:
    """Open `--mode cached` with 64 windows side by side, one token per call and window."""
    session = open_session(setting)
    whole = evaluation_in(session, mode="cached", prompt_len=1, decode_chunk=1)
    feed_of = cache(partial(_feed_of_windows, session))

    def steps(max_length: int) -> Iterator[Step]:
        return (partial(feed_of(max_length), at) for at in _sampled_positions(max_length))

    return _by_length(whole, steps, WINDOWS_TOGETHER)


def _by_length(whole: Score, steps: Callable[[int], Iterator[Step]], per_step: int) -> Score:
    """Return a way to decode short windows whole, and to time steps of long ones, by their length.

    The second call of each step is timed: the first one allocates. per_step: tokens.
    """

    def score(workload: Workload) -> Scored:
        if workload.max_length <= LONGEST_REAL:
            return whole(workload)
        seconds = []
        for step in steps(workload.max_length):
            step()
            with px.Timer() as timer:
                step()
            seconds.append(timer.seconds)
        return Scored(None, per_step * len(seconds), seconds=sum(seconds))

    return score


def _sampled_positions(max_length: int) -> list[int]:
    """Return places in a window, spread evenly."""
    return [int(place) for place in np.linspace(1, max_length - 3, POSITIONS)]


def _decoded(model: Any, workload: Workload) -> Scored:
    """Feed each id alone and take its successor's loss."""
    losses: list[float] = []
    for window in workload.windows():
        cache, ids = DynamicCache(config=model.config), window.ids_T.tolist()
        for fed, target in pairwise(ids):
            losses.append(_step(model, cache, fed, target))
    return Scored(sum(losses), len(losses), nll=losses)


@torch.no_grad()
def _step(model: Any, cache: Any, fed: int, target: int) -> float:
    """Return the loss of `target` after `fed`."""
    out = model(input_ids=torch.tensor([[fed]]), past_key_values=cache, use_cache=True)
    return -float(out.logits[0, -1].float().log_softmax(-1)[target])


def _steps(model: Any, max_length: int) -> Iterator[Step]:
    """Yield a step at each sampled position, on a cache that is as full as it would be there."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    for position in _sampled_positions(max_length):
        cache: Any = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            states = torch.randn(1, heads, position, size, dtype=model.dtype)
            cache.update(states, states.clone(), layer)
        yield partial(_step, model, cache, 1, 2)


def _feed_of_windows(
    session: px.PytorchInferenceSession, max_length: int
) -> Callable[[int], object]:
    """Return a step of all windows at a position, on a cache of random keys and values."""
    ids_T = np.arange(max_length, dtype=np.int32) % session.model.vocab_size
    windows = [WindowIds(i, ids_T, np.arange(1, max_length)) for i in range(WINDOWS_TOGETHER)]
    cache = session.open_cache(windows)
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
