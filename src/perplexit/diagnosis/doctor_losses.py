"""The doctor's checks of the losses themselves: finite, normalised, level, steady over positions.

Shape suffixes: S = ids of the stretch, T = ids of one window, N = targets, V = vocabulary,
R = rows of logits.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.diagnosis.doctor_findings import (
    Finding,
    failed,
    passed,
    skipped,
    warned,
    within_limit,
)
from perplexit.diagnosis.doctor_probe import ExaminedModel
from perplexit.evaluation.input_fit import UNKNOWN_VOCABULARY
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import LogitsSession

_SUM_LIMIT = 1e-3
_MOST_ASKED = 1024  # ids of a vocabulary that is asked one by one
_NUM_CONTEXT = 8
_CHUNK_ROWS = 16
_MASKED = 1e3  # logits below the row's median: no trained model gives such a one
_LEVEL_NATS = 0.5
_CONTEXT, _STRIDE = 32, 96
_BLOCK = 64
_JUMP_NATS = 0.5
_STANDARD_ERRORS = 4.0


def finite(examined: ExaminedModel) -> Finding:
    """Tell whether every loss is a finite number."""
    num_tokens = 0
    for window, nll_N in _first_losses(examined):
        bad = np.flatnonzero(~np.isfinite(nll_N))
        if len(bad):
            position = int(window.targets_N[bad[0]])
            return failed(
                f"{len(bad)} of {len(nll_N)} losses of a window of {len(window.ids_T)} ids are not "
                f"finite; the first is {float(nll_N[bad[0]])} at position {position} (id "
                f"{int(window.ids_T[position])})",
                len(bad),
                0,
                advice="load in float32; if it stays, look at that position and id in the engine",
            )
        num_tokens += len(nll_N)
    return passed(f"all of {num_tokens} losses are finite", 0, 0)


def _first_losses(examined: ExaminedModel) -> Iterator[tuple[WindowIds, NDArray[np.float32]]]:
    if not examined.computes:
        windows = examined.recorded_windows
        yield from zip(windows, examined.session.token_nll(windows), strict=True)
        return
    yield from zip(examined.probe.short_windows, examined.repeated[0], strict=True)
    yield examined.probe.long_window, examined.long_losses


def probabilities(examined: ExaminedModel) -> Finding:
    """Tell whether the probabilities of all ids sum to 1, and none is masked."""
    if isinstance(examined.session, LogitsSession):
        return _from_logits(examined, examined.session)
    vocab_size = examined.session.model.vocab_size
    if vocab_size >= UNKNOWN_VOCABULARY:
        return skipped("the engine tells neither distributions nor its vocabulary")
    if vocab_size > _MOST_ASKED:
        return skipped(
            f"the engine gives no distributions, and {vocab_size} ids are too many to ask for"
        )
    context_T = examined.probe.ids_S[:_NUM_CONTEXT]
    target_N = np.array([len(context_T)], dtype=np.int64)
    windows = [
        WindowIds(100 + index, np.append(context_T, np.int32(index)).astype(np.int32), target_N)
        for index in range(vocab_size)
    ]
    size = min(64, examined.session.max_batch_size(len(context_T) + 1))
    parts = (windows[start : start + size] for start in range(0, vocab_size, size))
    losses = [nll_N for part in parts for nll_N in examined.session.token_nll(part)]
    return _judged_sum(float(np.exp(-np.concatenate(losses).astype(np.float64)).sum()), vocab_size)


def _from_logits(examined: ExaminedModel, session: LogitsSession) -> Finding:
    """Return by the normaliser that a loss implies: log Z = nll + logit of the target."""
    window = examined.probe.short_windows[1]
    nll_N = examined.repeated[0][1].astype(np.float64)
    targets = window.ids_T[window.targets_N]
    num_tokens = examined.tokenizer.vocab_size if examined.tokenizer is not None else None
    sums, spare_mass, masked = [], [], None
    for chunk in session.target_logits([window], chunk_rows=_CHUNK_ROWS):
        logits_RV = chunk.logits_NV.astype(np.float64)
        rows = slice(chunk.start, chunk.start + len(logits_RV))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            own_R = logits_RV[np.arange(len(logits_RV)), targets[rows]]
            p_RV = np.exp(logits_RV - (nll_N[rows] + own_R)[:, None])
        sums.append(p_RV.sum(axis=1))
        spare_mass.append(p_RV[:, num_tokens:].sum(axis=1) if num_tokens else 0 * own_R)
        low_V = (logits_RV < np.median(logits_RV, axis=1, keepdims=True) - _MASKED).all(axis=0)
        masked = low_V if masked is None else masked & low_V
    worst = np.concatenate(sums)
    total = float(worst[np.argmax(np.abs(worst - 1))])
    hidden = [] if masked is None else np.flatnonzero(masked[:num_tokens]).tolist()
    vocab_size = session.model.vocab_size
    if hidden:
        return failed(
            f"{len(hidden)} of {vocab_size} ids can never be predicted, as their logits are "
            f"masked: {', '.join(map(str, hidden[:5]))}{', …' if len(hidden) > 5 else ''}",
            len(hidden),
            0,
            advice="the engine hides tokens that a text may hold (padding, end of text): stop that",
        )
    return _judged_sum(total, vocab_size, float(np.concatenate(spare_mass).mean()))


def _judged_sum(total: float, vocab_size: int, spare_mass: float = 0.0) -> Finding:
    sentence = f"the probabilities of {vocab_size} ids sum to {total:.6f}"
    if spare_mass > _SUM_LIMIT:
        return warned(
            f"{sentence}, {spare_mass:.4f} of it on rows without a token",
            spare_mass,
            _SUM_LIMIT,
            advice="the padded rows cost that much; is the tokenizer the model's?",
        )
    return within_limit(
        abs(total - 1),
        _SUM_LIMIT,
        sentence,
        advice="losses are normalised over other ids than the model's vocabulary: masked or "
        "missing rows",
    )


def position(examined: ExaminedModel) -> Finding:
    """Tell whether the loss jumps at long context: the same ids after much text, and after little.

    More context makes text easier, so a stretch that is much harder behind the long context than
    behind 32 ids of it points at the engine: attention, positions, a cache.
    """
    probe = examined.probe
    room = probe.room
    if room < _CONTEXT + _STRIDE + _BLOCK // 2:
        return skipped(f"windows of {room} ids are too short to tell")
    near_N = np.concatenate(
        [
            examined.session.token_nll(
                [probe.window(start, min(_CONTEXT + _STRIDE, room - start), first_target=_CONTEXT)]
            )[0]
            for start in range(0, room - _CONTEXT, _STRIDE)
        ]
    )
    far_N = examined.long_losses[_CONTEXT - 1 :]
    harder_N = far_N.astype(np.float64) - near_N
    blocks = np.array_split(harder_N, max(1, len(harder_N) // _BLOCK))
    starts = _CONTEXT + np.cumsum([0, *map(len, blocks[:-1])])
    means = np.array([block.mean() for block in blocks])
    errors = np.array([block.std() / math.sqrt(len(block)) for block in blocks])
    jumps = np.flatnonzero((means > _JUMP_NATS) & (means > _STANDARD_ERRORS * errors))
    worst = float(means.max())
    if not len(jumps):
        return passed(
            f"over {room} ids, long context never makes {len(blocks[0])} ids in a row much harder "
            f"(at most {worst:+.3f} nats)",
            worst,
            _JUMP_NATS,
        )
    first = int(starts[jumps[0]])
    return failed(
        f"from about position {first} on, long context makes the text harder by up to {worst:.3g} "
        f"nats per token",
        worst,
        _JUMP_NATS,
        advice=f"the engine is wrong beyond that length: use windows below {first} ids, or another "
        "attention implementation",
    )


def level(examined: ExaminedModel) -> Finding:
    """Tell whether real text is far more likely than the same ids shuffled, and than chance."""
    windows = examined.probe.short_windows
    generator = np.random.default_rng(0)
    kept = int(examined.probe.prefix_id is not None)
    shuffled = []
    for window in windows:
        ids_T = window.ids_T.copy()
        ids_T[kept:] = generator.permutation(ids_T[kept:])
        shuffled.append(WindowIds(window.index + 40, ids_T, window.targets_N))
    real = float(np.concatenate(examined.repeated[0]).mean(dtype=np.float64))
    losses = [examined.session.token_nll([window])[0] for window in shuffled]
    gain = float(np.concatenate(losses).mean(dtype=np.float64)) - real
    vocab_size = examined.session.model.vocab_size
    chance = math.log(vocab_size) if vocab_size < UNKNOWN_VOCABULARY else math.inf
    sentence = f"{real:.3f} nats per token of real text, {real + gain:.3f} with its ids shuffled"
    if math.isfinite(chance):
        sentence += f", {chance:.3f} by chance"
    if gain >= _LEVEL_NATS and real < chance:
        return passed(sentence, gain, _LEVEL_NATS)
    trained = _is_trained(examined.session)
    advice = "is this the model's own tokenizer, and is the text of a kind that it was trained on?"
    if trained is False:
        sentence += "; the model's weights are untrained"
    return Finding(
        "level",
        "fail" if trained else "warn",
        sentence,
        gain,
        _LEVEL_NATS,
        advice if trained is not False else "train the model, or take the figures for a test",
    )


def _is_trained(session: Any) -> bool | None:
    """Tell whether normalisation weights have left the constants that they start from.

    None where the session shows no module, or one without such weights.
    """
    module = getattr(session, "module", None)
    if module is None:
        return None
    norms = [
        weight
        for name, weight in module.named_parameters()
        if weight.ndim == 1 and any(part in name.lower() for part in ("norm", "ln_", "layernorm"))
    ]
    if not norms:
        return None
    return any(float(weight.detach().std()) > 0 for weight in norms)
