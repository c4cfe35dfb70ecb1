"""evaluate(session, input) → Run: every declared target scored, sums kept, one record."""

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Unpack

from perplexit.evaluation.input_fit import (
    LoadableModel,
    Model,
    check_tokenizer,
    model_and_tokenizer,
    text_input,
    token_file_of,
)
from perplexit.evaluation.request import Request, check_asked_conditions
from perplexit.evaluation.run_in_progress import Progress, RunInProgress
from perplexit.inputs.preparing_options import PreparingOptions
from perplexit.inputs.token_file import TokenFile
from perplexit.reference.request import requested_reference
from perplexit.resources.host_memory import HostMemory
from perplexit.runs.run import Run
from perplexit.runs.store import RunStore
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.options import ScoringOptions, given_options
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.registry import opened_session, split_address


def evaluate(
    session: Model,
    tokens: TokenFile | str | Path | Iterable[str | Path],
    *,
    run: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
    top_k: int = 0,
    confidence: float = 0.95,
    on_non_finite: Literal["error", "count"] = "error",
    save_reference: bool = False,
    reference: Run | InferenceSession | str | Path | None = None,
    measure_noise_floor: bool = False,
    other_tokenizer: bool = False,
    progress: Progress | None = None,
    **options: Unpack[ScoringOptions],
) -> Run:
    """Return the run of a model over an input: its perplexity with interval and conditions.

    session:  a model address (`hf:PATH_OR_ID`, `onnx:DIR`, a bare path), which is loaded and
        closed; an open session; a `torch.nn.Module`; or `(module, tokenizer)`.
    tokens:   a TokenFile or the path of one (opened and verified); or texts: a str, the path of a
        text, or several. They are prepared by `prepare`'s defaults with the model's own tokenizer.
    run:      the run folder. Results are committed there part by part. After a kill, the same call
        continues the run. A complete run under the same conditions is returned as it is, and
        scored again where its tokens or its kept states are missing or damaged.
        None keeps the run in memory.
    batch_size: windows per batch, or "auto": what memory allows. Halved when memory runs out.
    top_k:    record the K most likely alternatives of every target.
    confidence: coverage of the intervals, in (0, 1).
    on_non_finite: "error" stops at the first NaN or infinite loss and names it; "count" leaves
        such tokens out of every sum and reports how many there were.
    save_reference: keep the final hidden states, so that candidates can be compared with this run.
    reference: a run with kept states, its folder, a model (session or address) that is scored in
        step, or llama.cpp's base file. Every token then has its divergences (needs PyTorch).
    measure_noise_floor: score up to 32 windows again in batches of another size. The run records
        how far that moves the mean loss, and no comparison calls less than that a difference.
    other_tokenizer: continue where the model comes with another tokenizer than the input's.
    progress: called after every batch.
    options:  how the model is loaded and how windows go through it: see ScoringOptions. In mode
        "cached" the first `prompt_len` ids go through in one pass, the others `decode_chunk` ids
        per call against a key/value cache: the same losses up to rounding.

    Raises ResumeError where the folder's run was made under other conditions,
    FingerprintMismatchError where the model comes with another tokenizer than the input's,
    UsageError, NonFiniteError, VocabularyError, CapabilityError, EngineOutOfMemoryError, RunError,
    TokenFileError.
    """
    began = time.perf_counter()
    model, tokenizer = model_and_tokenizer(session, tokens)
    request = Request(
        batch_size=batch_size,
        top_k=top_k,
        confidence=confidence,
        on_non_finite=on_non_finite,
        saves_reference=save_reference,
        has_reference=reference is not None,
        options=given_options(ScoringOptions, options),
        loads_model=isinstance(model, str | Path),
    )
    request.check()
    with ExitStack() as stack:
        memory = stack.enter_context(HostMemory())
        token_file = token_file_of(tokens, model, tokenizer)
        wanted_reference = requested_reference(
            reference,
            token_file,
            save_reference=save_reference,
            dtype=request.option("reference_dtype"),
        )
        store = None if run is None else stack.enter_context(RunStore(run))
        recorded = None if store is None else store.record()
        if recorded is not None:
            check_asked_conditions(recorded, request, token_file.input_fingerprint)
        opened, checked = _opened_model(stack, model, token_file, request, other_tokenizer)
        under_way = RunInProgress(
            opened, token_file, store, request, memory, progress, checked, began=began
        )
        if wanted_reference is not None or save_reference:
            # The one lazy door to what needs PyTorch here.
            references = import_module("perplexit.reference.opening")
            under_way.with_reference = stack.enter_context(
                references.reference_scoring(
                    opened,
                    reference=wanted_reference,
                    save_in=None if not save_reference else (store.folder if store else "memory"),
                    dtype=request.option("reference_dtype"),
                )
            )
        wanted = under_way.begun(recorded)
        if wanted.status != "complete":
            wanted = under_way.completed(under_way.score_all(wanted))
        missing = measure_noise_floor and (wanted is not recorded or wanted.noise_floor is None)
        return under_way.with_noise_floor(wanted) if missing else wanted


def _opened_model(
    stack: ExitStack,
    model: LoadableModel,
    tokens: TokenFile,
    request: Request,
    other_tokenizer: bool,
) -> tuple[InferenceSession, Mapping[str, Any] | None]:
    """Return the session to score with, and how its tokenizer was compared with the input's."""
    checked = None
    if isinstance(model, str | Path):
        address = ":".join(split_address(model))
        checked = check_tokenizer(address, tokens, other_tokenizer=other_tokenizer)
    session = stack.enter_context(opened_session(model, **request.engine_options))
    if request.option("mode") == "cached":
        session = cached_session(
            session,
            prompt_len=request.option("prompt_len") or 1,
            decode_chunk=request.option("decode_chunk") or 1,
        )
    if checked is None:  # a model of the hub is here only now
        address = session.model.address
        checked = check_tokenizer(address, tokens, other_tokenizer=other_tokenizer)
    return session, checked


def perplexity(
    model: Model,
    texts: str | Path | Iterable[str | Path],
    tokenizer: str | Path | object | None = None,
    **options: Any,
) -> Run:
    """Return the run of a model over texts: `evaluate`, with the texts prepared for the model.

    texts:      a str, the path of a text (or JSONL, Parquet, CSV file or folder), or several.
    tokenizer:  anything that `prepare` takes; None takes the one that comes with the model.
    options:    those of `prepare` that decide what is made of a text (see PreparingOptions:
        protocol, max_length, stride, bos, text_key, …) and those of `evaluate`.
    Raises what `prepare` and `evaluate` raise; UsageError where the model comes without a
    tokenizer and none is given.
    """
    plain, own = model_and_tokenizer(model, texts)
    prepared = {n: options.pop(n) for n in PreparingOptions.__annotations__ if n in options}
    tokens = text_input(texts, plain, own if tokenizer is None else tokenizer, **prepared)
    return evaluate(plain, tokens, **options)
