"""doctor: a model on its engine → findings, before anyone trusts a number of it."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Unpack

from perplexit.diagnosis import doctor_losses, doctor_repeats, doctor_setup
from perplexit.diagnosis.doctor_findings import Diagnosis, Finding, failed, skipped
from perplexit.diagnosis.doctor_probe import ExaminedModel, make_probe
from perplexit.errors import PerplexitError, UsageError
from perplexit.evaluation.input_fit import own_tokenizer
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.options import EngineOptions
from perplexit.sessions.registry import opened_session

Progress = Callable[[str, int, int], None]  # a check's name, its number, how many there are


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, what it does, and the checks without which it tells nothing.

    computes: it asks for windows of its own, which a recording cannot answer.
    """

    name: str
    examine: Callable[[ExaminedModel], Finding]
    needs: tuple[str, ...] = ()
    computes: bool = True


CHECKS = (
    Check("vocabulary", doctor_setup.vocabulary, computes=False),
    Check("tokenizer", doctor_setup.tokenizer, computes=False),
    Check("window length", doctor_setup.window_length, computes=False),
    Check("dtype", doctor_setup.dtype, computes=False),
    Check("finite", doctor_losses.finite, ("vocabulary",), computes=False),
    Check("prefix cache", doctor_repeats.prefix_cache, ("finite",)),
    Check("dropout", doctor_repeats.dropout, ("prefix cache",)),
    Check("determinism", doctor_repeats.determinism, ("dropout",)),
    Check("batch", doctor_repeats.batch, ("dropout",)),
    Check("padding", doctor_repeats.padding, ("batch",)),
    Check("alignment", doctor_repeats.alignment, ("dropout",)),
    Check("decode", doctor_repeats.decode, ("dropout", "alignment")),
    Check("probabilities", doctor_losses.probabilities, ("dropout", "alignment")),
    Check("bos", doctor_setup.bos, ("dropout",), computes=False),
    Check("position", doctor_losses.position, ("dropout", "alignment")),
    Check("level", doctor_losses.level, ("dropout", "tokenizer", "bos", "alignment")),
)


def doctor(
    model: InferenceSession | str | Path,
    tokens: TokenFile | str | Path | None = None,
    *,
    tokenizer: str | Path | object | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[EngineOptions],
) -> Diagnosis:
    """Return what is sound and what is not about a model on its engine, check by check.

    model:  an open session, or an address that is loaded with `options` and closed afterwards.
    tokens: the input that figures will be taken over; its windows are then what is examined.
        Without it the doctor makes a probe from a packaged text with the model's own tokenizer.
    tokenizer: the model's own, where it does not come with the model.
    max_length: ids of the longest window that is tried; the input's longest, or 1024.
    progress: called before each check.

    A check that rests on one that failed is skipped, so that one fault is one failure. Raises
    UsageError where there is nothing to examine with, and what loading raises.
    """
    began = time.perf_counter()
    if max_length is not None and max_length < 2:
        raise UsageError(f"max_length must be at least 2, got {max_length}")
    with ExitStack() as stack:
        session = stack.enter_context(opened_session(model, **options))
        token_file = (
            tokens if isinstance(tokens, TokenFile) or tokens is None else TokenFile.open(tokens)
        )
        own = (
            load_tokenizer(tokenizer)
            if tokenizer is not None
            else own_tokenizer(session.model.address)
        )
        probe = make_probe(session, own, token_file, max_length)
        examined = ExaminedModel(
            session, own, token_file, probe, options.get("dtype"), options.get("quantization")
        )
        return Diagnosis(
            model=asdict(session.model),
            session=asdict(session.description),
            input_fingerprint=None if token_file is None else token_file.input_fingerprint,
            max_length=probe.max_length,
            findings=_examined(examined, progress),
            seconds=time.perf_counter() - began,
        )


def _examined(examined: ExaminedModel, progress: Progress | None) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    cause: dict[str, str] = {}  # of each check that cannot be relied on: the failure behind it
    for number, check in enumerate(CHECKS):
        if progress is not None:
            progress(check.name, number, len(CHECKS))
        behind = next((cause[name] for name in check.needs if name in cause), None)
        if behind is not None:
            cause[check.name] = behind
            finding = skipped(f"tells nothing while {behind!r} fails")
        elif check.computes and not examined.computes:
            finding = skipped("a recording computes nothing")
        else:
            finding = _found(check, examined)
        if finding.status == "fail":
            cause[check.name] = check.name
        findings.append(replace(finding, check=check.name))
    return tuple(findings)


def _found(check: Check, examined: ExaminedModel) -> Finding:
    """Return what the check finds; a stated error of the engine is a failure of the check."""
    try:
        return check.examine(examined)
    except PerplexitError as error:
        return failed(str(error), advice="see the message")
