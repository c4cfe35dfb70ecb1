"""The doctor's check that prefill and decode through the cache equal the whole forward pass.

Shape suffix: N = targets of one window.
"""

import numpy as np

from perplexit.diagnosis.doctor_findings import (
    Finding,
    failed,
    passed,
    skipped,
)
from perplexit.diagnosis.doctor_probe import ExaminedModel
from perplexit.diagnosis.doctor_repeats import largest_difference, tolerance
from perplexit.errors import CacheMismatchError, CapabilityError
from perplexit.sessions.base import CachingSession
from perplexit.sessions.prefill_decode import cached_session

# prompt_len, decode_chunk: token by token from the start, and in blocks after a prefill
_WAYS = ((1, 1), (12, 7))
_PLACES = (2, 3)  # of the short windows: decoding is slow
_ADVICE = "the cache is wrong (positions, mask, or an offset): score with --mode full"
_OTHER_KINDS = (
    "a model that keeps a state of another kind, as Mamba does, has nothing wrong with it"
)


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
                f"a prefill of {prompt_len} and a decode of {decode_chunk} ids a call differ from "
                f"the whole forward pass by up to {figure:.3g} nats, from position {first} on",
                figure,
                tolerance(examined),
                advice=_ADVICE,
            )
    sentence = f"prefill and decode differ from the whole forward pass by up to {figure:.3g} nats"
    return passed(sentence, figure, tolerance(examined))
