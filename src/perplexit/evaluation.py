"""evaluate(session, input) → Run: every declared target scored, sums kept, one record."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from perplexit.conditions import Asked, check_asked_conditions, check_same_conditions
from perplexit.errors import UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.option_ranges import check_numbers
from perplexit.recording import Progress, Recording
from perplexit.reference.request import requested_reference
from perplexit.resources.host_memory import HostMemory
from perplexit.runs.run import Run
from perplexit.runs.store import RunStore
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.cached import cached_session
from perplexit.sessions.registry import load_session, split_address
from perplexit.tokenizer_check import check_tokenizer


def evaluate(
    session: InferenceSession | str | Path,
    tokens: TokenFile | str | Path,
    *,
    run: str | Path | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    attention: str | None = None,
    head: str | None = None,
    compile_mode: str | None = None,
    device_map: Mapping[str, str | int] | str | Path | None = None,
    tensor_parallel: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    mode: Literal["full", "cached"] = "full",
    prompt_len: int | None = None,
    decode_chunk: int | None = None,
    top_k: int = 0,
    confidence: float = 0.95,
    on_non_finite: Literal["error", "count"] = "error",
    save_reference: bool = False,
    reference_dtype: Literal["float32", "float16"] = "float32",
    reference: Run | InferenceSession | str | Path | None = None,
    measure_noise_floor: bool = False,
    other_tokenizer: bool = False,
    progress: Progress | None = None,
) -> Run:
    """The run of a model over a prepared input: perplexity with its interval and its conditions.

    session:  an open session, or a model address (`hf:PATH_OR_ID`, `onnx:DIR`, a bare path) that
        is loaded with `dtype`, `quantization`, `device`, `threads` and `adapter` (the folder of a
        PEFT adapter, merged into the weights with `merge_adapter`), and closed afterwards. Of
        PyTorch alone: `attention`, `head`, `compile_mode`, `device_map` and `tensor_parallel`;
        see PytorchInferenceSession.
    tokens:   a TokenFile or the path of one (opened and verified).
    run:      the run folder. Results are committed there part by part; the same call after a kill
        goes on where it was, and a complete run under the same conditions is returned as it is
        (and scored again where its tokens or its kept states are missing or damaged).
        None keeps the run in memory.
    batch_size: windows a batch, or "auto": what memory allows. Halved when memory runs out.
    mode:     "full": every window in one forward pass. "cached": the first `prompt_len` ids in one
        pass (1 unless given), the rest `decode_chunk` ids a call (1 unless given) against a
        key/value cache. The same losses up to rounding; see `sessions.cached`.
    top_k:    record the K most likely alternatives of every target.
    on_non_finite: "error" stops at the first NaN or infinite loss and names it; "count" leaves
        such tokens out of every sum and reports how many there were.
    save_reference: keep the final hidden states, in `reference_dtype`, so that candidates can be
        held against this run.
    reference: a run that was made so, its folder, or a model (session or address) that is scored
        in step, or llama.cpp's base file. Every token then has its KL divergence and what goes
        with it (needs PyTorch).
    measure_noise_floor: score up to 32 windows again in batches of another size; how far that
        moves the mean loss is recorded, and no comparison calls less than that a difference.
    other_tokenizer: go on where the model comes with another tokenizer than the input's; recorded.
    progress: called after every batch.

    Raises ResumeError where the folder's run was made under other conditions,
    FingerprintMismatchError where the model comes with another tokenizer than the input's,
    NonFiniteError, VocabularyError, CapabilityError, EngineOutOfMemoryError, RunError,
    TokenFileError.
    """
    check_numbers(
        batch_size=batch_size,
        top_k=top_k,
        threads=threads,
        prompt_len=prompt_len,
        decode_chunk=decode_chunk,
        tensor_parallel=tensor_parallel,
    )
    _check_options(batch_size, top_k, confidence, on_non_finite)
    _check_mode(mode, prompt_len, decode_chunk)
    began = time.perf_counter()
    with ExitStack() as stack:
        memory = stack.enter_context(HostMemory())
        token_file = tokens if isinstance(tokens, TokenFile) else TokenFile.open(tokens)
        wanted_reference = requested_reference(
            reference, token_file, save_reference=save_reference, dtype=reference_dtype
        )
        store = None if run is None else stack.enter_context(RunStore(run))
        settings: dict[str, Any] = {
            "dtype": dtype,
            "quantization": quantization,
            "device": device,
            "threads": threads,
            "adapter": adapter,
            "merge_adapter": merge_adapter,
            "attention": attention,
            "head": head,
            "compile_mode": compile_mode,
            "device_map": device_map,
            "tensor_parallel": tensor_parallel,
        }
        recorded = None if store is None else store.record()
        if recorded is not None:
            asked = Asked(
                input_fingerprint=token_file.input_fingerprint,
                top_k=top_k,
                on_non_finite=on_non_finite,
                confidence=confidence,
                batch_size=batch_size,
                mode=mode,
                prompt_len=prompt_len,
                decode_chunk=decode_chunk,
                dtype=dtype,
                quantization=quantization,
                saves_reference=save_reference,
                has_reference=reference is not None,
                loads_model=isinstance(session, str | Path),
            )
            check_asked_conditions(recorded, asked)
        checked = None
        if isinstance(session, str | Path):
            address = ":".join(split_address(session))
            checked = check_tokenizer(address, token_file, other_tokenizer=other_tokenizer)
            session = stack.enter_context(_loaded(session, **settings))
        elif any(value not in (None, False) for value in settings.values()):
            raise UsageError(
                f"{', '.join(settings)} are settings of a session that is being loaded, but an "
                "open session was given; set them in load_session"
            )
        if mode == "cached":
            session = cached_session(
                session, prompt_len=prompt_len or 1, decode_chunk=decode_chunk or 1
            )
        load_seconds = time.perf_counter() - began
        if checked is None:  # a model of the hub is here only now
            checked = check_tokenizer(
                session.model.address, token_file, other_tokenizer=other_tokenizer
            )
        recording = Recording(session, token_file, store, memory, progress, checked)
        if save_reference or reference is not None:
            # The one lazy door to what needs PyTorch here.
            references = import_module("perplexit.reference.opening")
            recording.with_reference = stack.enter_context(
                references.reference_scoring(
                    session,
                    reference=wanted_reference,
                    save_in=None if not save_reference else (store.folder if store else "memory"),
                    dtype=reference_dtype,
                )
            )
        wanted = recording.new_run(
            top_k=top_k, confidence=confidence, on_non_finite=on_non_finite, batch_size=batch_size
        )
        if store is not None and recorded is not None:
            wanted = replace(wanted, created=recorded.created, batch_plan=recorded.batch_plan)
            wanted = recording.identified(wanted)
            check_same_conditions(recorded, wanted, batch_size)
            lost = recording.lost_of(recorded)
            if recorded.status == "complete" and lost is None:
                store.remove_parts()  # a kill may have come between the record and this
                missing = measure_noise_floor and recorded.noise_floor is None
                return recording.with_noise_floor(recorded) if missing else recorded
            if lost is not None:
                again = f"the run was complete, but {lost}: it was scored again"
                wanted = replace(wanted, warnings=[*wanted.warnings, again])
        scored = recording.complete(wanted, began=began, load_seconds=load_seconds)
        return recording.with_noise_floor(scored) if measure_noise_floor else scored


def _check_options(batch_size: Any, top_k: int, confidence: float, on_non_finite: str) -> None:
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"batch_size must be 'auto' or at least 1, got {batch_size!r}")
    if top_k < 0:
        raise UsageError(f"top_k must be 0 or more, got {top_k}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is usual")
    if on_non_finite not in ("error", "count"):
        raise UsageError(f"on_non_finite must be 'error' or 'count', got {on_non_finite!r}")


def _check_mode(mode: str, prompt_len: int | None, decode_chunk: int | None) -> None:
    if mode not in ("full", "cached"):
        raise UsageError(f"mode must be 'full' or 'cached', got {mode!r}")
    for name, value in (("prompt_len", prompt_len), ("decode_chunk", decode_chunk)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
        if value is not None and mode == "full":
            raise UsageError(
                f"{name} is a setting of prefill and decode, but the mode is 'full', which has "
                "neither; ask for mode 'cached', or leave it out"
            )


@contextmanager
def _loaded(address: str | Path, **settings: Any) -> Iterator[InferenceSession]:
    session = load_session(address, **settings)
    try:
        yield session
    finally:
        session.close()
