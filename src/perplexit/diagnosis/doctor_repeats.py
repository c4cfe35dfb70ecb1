"""The doctor's checks that what must not change a loss does not change it: batch, cache, decode.

Shape suffix: N = targets of one window.
"""

from collections.abc import Sequence

import numpy as np

from perplexit.diagnosis.doctor_findings import Finding, failed, passed, skipped, within_limit
from perplexit.diagnosis.doctor_probe import ExaminedModel, Losses
from perplexit.errors import CacheMismatchError, CapabilityError, ModelError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import CachingSession
from perplexit.sessions.prefill_decode import cached_session

_RANDOM = 1e-3  # nats; sums in another order differ by less
_EXACT = 2e-3  # nats per token, in float32: what engines of one model may differ by
_ROUNDED = 0.5  # nats per token, in fewer bits
# prompt_len, decode_chunk: token by token from the start, and in blocks after a prefill
_WAYS = ((1, 1), (12, 7))
_PLACES = (2, 3)  # of the short windows: decoding is slow
_ADVICE = "the cache is wrong (positions, mask, or an offset): score with --mode full"
_OTHER_KINDS = (
    "a model that keeps a state of another kind, as Mamba does, has nothing wrong with it"
)


def tolerance(examined: ExaminedModel) -> float:
    """Return the largest difference in nats per token that this precision explains."""
    description = examined.session.description
    exact = description.dtype in ("float32", "float64") and description.quantization is None
    return _EXACT if exact else _ROUNDED


def prefix_cache(examined: ExaminedModel) -> Finding:
    """Tell whether a request that was made before gives the same losses, and all of them."""
    wanted = [len(window.targets_N) for window in examined.probe.short_windows]
    for count, losses in zip(("first", "second", "third"), examined.repeated, strict=True):
        got = [len(nll_N) for nll_N in losses]
        if got != wanted:
            missing = sum(wanted) - sum(got)
            return _stale(
                f"the {count} identical request gives {sum(got)} of {sum(wanted)} losses "
                f"({missing} are missing): a prefix cache answers for its part alone",
                missing,
            )
    expected, found = len(examined.probe.long_window.targets_N), len(examined.long_losses)
    if found != expected:
        return _stale(
            f"a window that begins like an earlier one gives {found} of {expected} losses: a "
            "prefix cache answers for its part alone",
            expected - found,
        )
    first, second, third = examined.repeated
    changed, settled = largest_difference(first, second), largest_difference(second, third)
    if changed > tolerance(examined) and settled == 0.0:
        return _stale(
            f"the second identical request differs from the first by {changed:.3g} nats, and the "
            "third repeats the second: it is answered from a cache",
            changed,
        )
    sentence = "an identical request gives every loss again"
    return passed(sentence, 0, 0)


def dropout(examined: ExaminedModel) -> Finding:
    """Tell whether passes differ by more than sums in another order do."""
    figure = _repeat_difference(examined)
    return within_limit(
        figure,
        _RANDOM,
        f"passes over the same windows differ by up to {figure:.3g} nats",
        advice="something random is left on (dropout, sampling): put the model into evaluation "
        "mode, model.eval()",
    )


def determinism(examined: ExaminedModel) -> Finding:
    """Tell whether passes are identical to the last bit."""
    figure = _repeat_difference(examined)
    return within_limit(
        figure,
        0.0,
        f"passes over the same windows differ by up to {figure:.3g} nats",
        advice="differences below this are noise; fix the number of threads, or compare with "
        "--noise-floor",
        above="warn",
    )


def batch(examined: ExaminedModel) -> Finding:
    """Tell whether a window has the same losses alone, in a batch and in a shuffled batch."""
    windows = examined.probe.equal_windows
    if examined.session.max_batch_size(len(windows[0].ids_T)) == 1:
        return skipped("this engine takes one window at a time")
    alone = _alone(examined, windows)
    together = examined.session.token_nll(windows)
    shuffled = list(reversed(examined.session.token_nll(list(reversed(windows)))))
    figure = max(largest_difference(alone, together), largest_difference(alone, shuffled))
    return within_limit(
        figure,
        tolerance(examined),
        f"{len(windows)} windows alone, together and in reverse differ by up to {figure:.3g} nats",
        advice="evaluate with --batch-size 1, and look for what the windows of a batch share "
        "(activation scales, a cache)",
    )


def padding(examined: ExaminedModel) -> Finding:
    """Tell whether a window has the same losses alone and padded to a longer neighbour's length."""
    windows = examined.probe.short_windows
    if examined.session.max_batch_size(len(windows[0].ids_T)) == 1:
        return skipped("this engine takes one window at a time: nothing is padded")
    figure = largest_difference(examined.repeated[0], examined.session.token_nll(windows))
    return within_limit(
        figure,
        tolerance(examined),
        f"windows of {', '.join(str(len(w.ids_T)) for w in windows)} ids alone and "
        f"padded differ by up to {figure:.3g} nats",
        advice="padding is attended to, or moves positions: give the model an attention mask, or "
        "evaluate with --batch-size 1",
    )


def alignment(examined: ExaminedModel) -> Finding:
    """Tell whether one id changed in the middle changes its own loss, and none before it."""
    window = examined.probe.equal_windows[0]
    place = len(window.ids_T) // 2
    others = examined.probe.ids_S[examined.probe.ids_S != window.ids_T[place]]
    if not len(others):
        return skipped("the probe is one id repeated")
    changed_T = window.ids_T.copy()
    changed_T[place] = others[0]
    changed = WindowIds(window.index + 5, changed_T, window.targets_N)
    before, after = _alone(examined, (window, changed))
    _check_lengths([before], [after])
    earlier_N = window.targets_N < place
    figure = float(np.abs(before - after)[earlier_N].max(initial=0.0))
    own = int(np.flatnonzero(window.targets_N == place)[0])
    sentence = f"an id changed at position {place} changes earlier losses by up to {figure:.3g}"
    advice = (
        "losses are scored against the wrong ids (off by one), or the model sees the future: "
        "compare with another engine"
    )
    finding = within_limit(figure, tolerance(examined), sentence, advice=advice)
    if finding.status == "pass" and before[own] == after[own] and np.ptp(before) > 0:
        return failed(
            f"an id changed at position {place} does not change its own loss",
            0.0,
            None,
            advice=advice,
        )
    return finding


def decode(examined: ExaminedModel) -> Finding:
    """Tell whether prefill and decode give the losses of the whole forward pass."""
    session = examined.session
    if not isinstance(session, CachingSession):
        return skipped("this engine, or this program, scores whole windows and keeps no cache")
    try:
        session.caching()  # the engine's own probe of its cache
    except CacheMismatchError as error:
        return failed(str(error), advice=f"{_ADVICE} ({_OTHER_KINDS})")
    except CapabilityError as error:
        return skipped(str(error))
    windows = [examined.probe.short_windows[place] for place in _PLACES]
    whole = [examined.repeated[0][place] for place in _PLACES]
    figure = 0.0
    for prompt_len, decode_chunk in _WAYS:
        cached = cached_session(session, prompt_len=prompt_len, decode_chunk=decode_chunk)
        decoded = cached.token_nll(windows)
        figure = max(figure, largest_difference(whole, decoded))
        if not figure <= tolerance(examined):
            far_N = ~(np.abs(whole[0] - decoded[0]) <= tolerance(examined))
            first = int(windows[0].targets_N[np.argmax(far_N)])
            return failed(
                f"a prefill of {prompt_len} and a decode of {decode_chunk} ids per call differ "
                f"from the whole forward pass by up to {figure:.3g} nats, from position {first} on",
                figure,
                tolerance(examined),
                advice=_ADVICE,
            )
    sentence = f"prefill and decode differ from the whole forward pass by up to {figure:.3g} nats"
    return passed(sentence, figure, tolerance(examined))


def largest_difference(first: Losses, second: Losses) -> float:
    """Return the largest difference in nats, or NaN. Raises ModelError for missing losses."""
    _check_lengths(first, second)
    differences = [float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True) if len(a)]
    return max(differences, default=0.0)


def _check_lengths(first: Losses, second: Losses) -> None:
    counts = [[len(nll_N) for nll_N in losses] for losses in (first, second)]
    if counts[0] != counts[1]:
        raise ModelError(f"expected {counts[0]} losses per window as before, got {counts[1]}")


def _alone(examined: ExaminedModel, windows: Sequence[WindowIds]) -> Losses:
    return [examined.session.token_nll([window])[0] for window in windows]


def _repeat_difference(examined: ExaminedModel) -> float:
    first, second, third = examined.repeated
    return max(largest_difference(first, second), largest_difference(second, third))


def _stale(sentence: str, figure: float) -> Finding:
    return failed(
        sentence, figure, 0, advice="switch the engine's prefix cache off, and evaluate again"
    )
