"""The perplexity of a data loader's rows, by the names that two of the seed documents use."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError, EngineOutOfMemoryError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.metrics.intervals import clusters_for, mean_interval
from perplexit.metrics.likelihood import exp_or_inf, mean_nll, perplexity
from perplexit.metrics.totals import NllTotals, require_finite
from perplexit.protected_outputs import Kind, OutputFile, begins_with_mark
from perplexit.resources.timer import Timer
from perplexit.seed_api.loader_batches import window_batches
from perplexit.sessions.base import CachingSession, InferenceSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.registry import opened_session

ENGINES_OF = {
    "torch": ("pytorch", "torch"),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "gguf": ("llama.cpp",),
    "tvm": ("tvm",),
    "pt2": ("aotinductor",),
}
LOG = Kind("the log of calculate_perplexity", lambda path: begins_with_mark(path, b"sample_no: "))
ACCEPTANCE = {"FP16": 1.001, "MXFP6/MXINT8": 1.01}  # QEfficient's bounds on the torch perplexity


def calculate_perplexity(  # noqa: PLR0917 - the seed's parameters in the seed's order
    data_loader: Iterable[Any],
    inference_session: Any,
    ctx_len: int,
    prompt_len: int,
    model_type: str,
    batch_size: int,
    log_file: str | Path | None,
    model_name: str,
) -> tuple[float, float]:
    """Return `(perplexity, avg_loss)`; avg_loss is the mean over all scored tokens, in nats.

    data_loader: batches as `window_batches` reads them; each row is one window, its second id the
        first target. Rows that overlap are scored as they are, overlap twice, as in QEfficient.
    inference_session: a session, a model's address, or a torch.nn.Module.
    ctx_len: no row may hold more tokens.
    prompt_len: ids of the one prefill, the rest is decoded id by id, where the session is one that
        keeps a cache and model_type is not "torch", which scores whole windows. The same targets
        are scored for every prompt_len, those inside the prompt too.
    model_type: "torch", "onnx", "openvino", "gguf", "tvm" or "pt2": the session's engine.
    batch_size: rows per call.
    log_file: written anew, in the place of an older log (OutputError for another file): a line for
        each sample, then the conditions and the figures; None for no log.

    Raises UsageError for arguments out of range, EmptyScoreError where no token is scored, and
    NonFiniteError for a loss that is NaN or infinite.
    """
    _check_arguments(ctx_len, prompt_len, model_type)
    if log_file is not None:
        OutputFile(Path(log_file), LOG, force=True).path.write_text("", encoding="utf-8")
    with Timer("calculate_perplexity") as timer, opened_session(inference_session) as session:
        _check_engine(session, model_type)
        scored = session
        if model_type != "torch" and isinstance(session, CachingSession):
            scored = cached_session(session, prompt_len=prompt_len)
        losses = torch_perplexity(data_loader, scored, ctx_len, prompt_len, batch_size, log_file)
        totals = _totals(losses)
    if log_file is not None:
        conditions = {
            "model_name": model_name,
            "model_type": model_type,
            "ctx_len": ctx_len,
            "prompt_len": prompt_len,
            "batch_size": batch_size,
            "mode": scored.description.mode,
        }
        _append(log_file, _final_block(losses, conditions, timer.seconds))
    return perplexity(totals), mean_nll(totals)


def torch_perplexity(  # noqa: PLR0917 - as in calculate_perplexity
    data_loader: Iterable[Any],
    inference_session: Any,
    ctx_len: int,
    prompt_len: int = 1,
    batch_size: int = 1,
    log_file: str | Path | None = None,
) -> list[NDArray[np.float32]]:
    """Return the losses of each row's targets, nats, one array per row.

    The arguments are those of `calculate_perplexity`; one line per row is appended to `log_file`.
    """
    _check_arguments(ctx_len, prompt_len, "torch")
    losses = []
    with opened_session(inference_session) as session:
        batches = _regrouped(window_batches(data_loader, ctx_len=ctx_len), batch_size)
        for window, nll_N in _row_losses(session, batches):
            losses.append(nll_N)
            if log_file is not None:
                mean = f"{mean_nll(NllTotals.of(nll_N)):.6f}" if len(nll_N) else "-"
                line = f"sample_no: {window.index}\tavg_loss: {mean}\tnum_tokens: {len(nll_N)}\n"
                _append(log_file, line)
    return losses


def compute_perplexity(
    model: Any, data_loader: Iterable[Any], device: Any = None, pad_id: int = 0
) -> float:
    """Return `exp((1/N) Σ -log p(token))` over the N scored tokens of the loader's rows.

    model: any torch.nn.Module that gives logits for every position (its training mode is left as
        it was), a session, or a model's address. device: where the module is; an address is
        loaded there.
    pad_id: targets equal to it are not scored, unless a batch has a mask or labels: then those
        decide alone, and a real token with the pad's id counts.

    Infinite only past the limit of exp, a mean loss of 709.78. Raises EmptyScoreError where no
    token is scored, NonFiniteError for a loss that is NaN or infinite.
    """
    with opened_session(model, device=None if device is None else str(device)) as session:
        batches = window_batches(data_loader, pad_id=pad_id)
        losses = [nll_N for _, nll_N in _row_losses(session, batches)]
    return perplexity(_totals(losses))


def _totals(losses: list[NDArray[np.float32]]) -> NllTotals:
    """Return the sums over all rows. Raises EmptyScoreError where no token is scored."""
    totals = NllTotals.of(np.concatenate([*losses, np.empty(0, dtype=np.float32)]))
    if totals.num_tokens == 0:
        raise EmptyScoreError(
            f"expected at least one scored token, got 0 in {len(losses)} rows: give rows of at "
            "least two tokens, and windows no longer than the text"
        )
    return totals


def _regrouped(batches: Iterable[Sequence[WindowIds]], size: int) -> Iterator[list[WindowIds]]:
    """Yield the same windows in batches of `size`, the last one shorter."""
    if size < 1:
        raise UsageError(f"batch_size must be at least 1, got {size}: give a number of rows")
    windows = chain.from_iterable(batches)
    while batch := list(islice(windows, size)):
        yield batch


def _row_losses(
    session: InferenceSession, batches: Iterable[Sequence[WindowIds]]
) -> Iterator[tuple[WindowIds, NDArray[np.float32]]]:
    """Yield each window with the nll of its targets, nats; one call per batch.

    A window without targets is not fed. A batch that does not fit is halved.
    Raises NonFiniteError that names row, position and token of the first NaN or infinite loss.
    """
    for batch in batches:
        fed = [window for window in batch if len(window.targets_N)]
        losses = iter(_batch_losses(session, fed) if fed else [])
        for window in batch:
            nll_N = next(losses) if len(window.targets_N) else np.empty(0, dtype=np.float32)
            require_finite(
                nll_N,
                window_M=np.full(len(nll_N), window.index),
                position_M=window.targets_N,
                token_id_M=window.ids_T[window.targets_N],
            )
            yield window, nll_N


def _batch_losses(
    session: InferenceSession, windows: Sequence[WindowIds]
) -> list[NDArray[np.float32]]:
    try:
        return session.token_nll(windows)
    except EngineOutOfMemoryError:
        if len(windows) == 1:
            raise
    half = len(windows) // 2
    return _batch_losses(session, windows[:half]) + _batch_losses(session, windows[half:])


def _check_arguments(ctx_len: int, prompt_len: int, model_type: str) -> None:
    if ctx_len < 2:
        raise UsageError(f"ctx_len must be at least 2 (a token and its context), got {ctx_len}")
    if not 1 <= prompt_len < ctx_len:
        raise UsageError(
            f"prompt_len must lie between 1 and ctx_len - 1 = {ctx_len - 1}, got {prompt_len}"
        )
    if model_type not in ENGINES_OF:
        raise UsageError(
            f"model_type must be one of {sorted(ENGINES_OF)}, got {model_type!r}: a compiled "
            "Cloud AI 100 program ('qpc') needs its own hardware; use its ONNX export here"
        )


def _check_engine(session: InferenceSession, model_type: str) -> None:
    engine = session.description.engine
    others = [kind for kind, engines in ENGINES_OF.items() if engine in engines]
    if others and model_type not in others:
        raise UsageError(
            f"model_type is {model_type!r}, but the session runs on {engine}: "
            f"say model_type={others[0]!r}, or give a session of the other kind"
        )


def _final_block(
    losses: list[NDArray[np.float32]], conditions: dict[str, Any], seconds: float
) -> str:
    """Return what a log file ends with: the conditions, then the figures of all rows."""
    window_M = np.repeat(np.arange(len(losses)), [len(nll_N) for nll_N in losses])
    clusters = clusters_for(np.zeros_like(window_M), window_M)
    interval = mean_interval(np.concatenate(losses), clusters).clamped(lowest=0.0)
    totals = _totals(losses)
    value = perplexity(totals)
    bounds = f"none ({interval.reason})"
    if interval.low is not None and interval.high is not None:
        low, high = exp_or_inf(interval.low), exp_or_inf(interval.high)
        bounds = f"{low:.6f} to {high:.6f} ({interval.basis})"
    lines = ["", *(f"{name}: {setting}" for name, setting in conditions.items())]
    lines += [
        f"num_samples: {len(losses)}",
        f"num_tokens: {totals.num_tokens}",
        f"avg_loss: {mean_nll(totals):.6f}",
        f"perplexity: {value:.6f}",
        f"interval: {bounds}",
    ]
    if conditions["model_type"] == "torch":
        lines += [f"target for {name}: {value * x:.6f} (x {x})" for name, x in ACCEPTANCE.items()]
    return "\n".join([*lines, f"hours: {seconds / 3600:.6f}", ""])


def _append(log_file: str | Path, text: str) -> None:
    with Path(log_file).open("a", encoding="utf-8") as log:
        log.write(text)
