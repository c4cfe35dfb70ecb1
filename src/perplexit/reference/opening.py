"""What `evaluate` is asked for with `save_reference` and `reference`, opened and checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from perplexit.atomic_files import TemporaryFolder
from perplexit.errors import CapabilityError, RunError, UsageError
from perplexit.inputs.kl_base_file import KlBaseFile
from perplexit.inputs.token_file import TokenFile
from perplexit.reference.heads import proven_head
from perplexit.reference.partial_distributions import KlBaseReference, TopKReference, floor_of_file
from perplexit.reference.request import Reference
from perplexit.reference.states import FOLDER, ReferenceStates, StatesDtype, StatesWriter
from perplexit.reference.window_scorers import (
    LiveLogits,
    ReferenceScoring,
    SavingScoring,
    StoredLogits,
)
from perplexit.runs.measurement import measurement_fingerprint, measurement_of
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession, LogitsSession
from perplexit.sessions.loss_file import described_base_file
from perplexit.sessions.registry import opened_session
from perplexit.token_columns import TokenDetails


@dataclass(frozen=True)
class OpenedReference:
    """How to score with a reference, and what the run records of it."""

    details: Callable[..., list[TokenDetails]]
    reference: dict[str, Any] | None = None
    measured: Run | tuple[Any, Any] | None = None  # the reference run, or (model, session)
    saved: dict[str, Any] | None = None
    scratch: Any = None  # the TemporaryDirectory of a run in memory
    saving: tuple[SavingScoring, StatesWriter] | None = None

    def reference_of(self, run: Run) -> dict[str, Any] | None:
        """Return what `run.json` says of the reference: its measurement and its input.

        A reference that is scored in step takes the run's batches and its rule for losses that are
        not finite.
        """
        if self.reference is None or self.measured is None:
            return None
        if isinstance(self.measured, Run):
            measurement = self.measured.measurement
            fingerprint = self.measured.measurement_fingerprint
        else:
            measurement = measurement_of(
                *self.measured, on_non_finite=run.on_non_finite, batch_plan=run.batch_plan
            )
            fingerprint = measurement_fingerprint(measurement)
        return {
            **self.reference,
            "measurement_fingerprint": fingerprint,
            "input_fingerprint": run.input_fingerprint,
            "measurement": measurement,
        }

    def finish(self) -> dict[str, Any]:
        """Make the saved states a reference; what `run.json` says of them."""
        scoring, writer = self.saving or (None, None)
        if scoring is None or writer is None or self.saved is None:
            raise UsageError("expected a run that saves its reference; nothing was saved")
        record = {**self.saved, **scoring.measured()}
        if scoring.head is not None:
            record["head_file"] = writer.keep_head(scoring.head)
        writer.finish(record)
        return record

    def lost_of(self, tokens: TokenFile) -> str | None:
        """Return what the states of a complete run lack on disk, in words; None if nothing."""
        if self.saving is None:
            return None
        try:
            states = ReferenceStates(self.saving[1].folder.parent)
            if states.keeps_head:
                states.head(torch.device("cpu"))
        except RunError as error:
            return str(error)
        lacking = set(np.flatnonzero(tokens.target_counts()).tolist()) - states.windows
        return f"the states of {len(lacking)} windows are missing" if lacking else None


@contextmanager
def reference_scoring(
    session: InferenceSession,
    *,
    reference: Reference | None,
    save_in: Path | Literal["memory"] | None,
    dtype: StatesDtype,
) -> Iterator[OpenedReference]:
    """Yield scoring that saves hidden states, or that holds a candidate against a reference.

    reference: as `requested_reference` gives it.
    Raises FingerprintMismatchError where the reference's checkpoint is no longer the one it was or
    its head does not give what it recorded, CapabilityError where a session cannot give what is
    needed.
    """
    if save_in is not None:
        yield _saving(session, save_in, dtype)
        return
    if isinstance(reference, KlBaseFile):
        yield _base_file(session, reference)
    elif isinstance(reference, Run) and reference.saved_reference is None:
        yield _alternatives(session, reference)
    elif isinstance(reference, Run):
        states = _states_of(reference)
        with proven_head(reference, states) as head:
            scoring = ReferenceScoring(session, StoredLogits(states, head))
            described = _described("stored states", reference.model, reference.session)
            yield OpenedReference(scoring.details, reference=described, measured=reference)
    elif reference is not None:
        with opened_session(reference) as live:
            yield _live(session, live)


def _saving(session: InferenceSession, save_in: Path | str, dtype: StatesDtype) -> OpenedReference:
    scratch = None
    if save_in == "memory":
        scratch = TemporaryFolder("reference")
        save_in = scratch.name
    writer = StatesWriter(Path(save_in) / FOLDER, dtype)
    scoring = SavingScoring(session, writer)
    saved = {
        "dtype": dtype,
        "weights_fingerprint": session.model.weights_fingerprint,
        "head": (
            "the checkpoint's own, loaded from it by its fingerprint"
            if scoring.head is None
            else "kept with the states"
        ),
    }
    return OpenedReference(scoring.details, saved=saved, scratch=scratch, saving=(scoring, writer))


def _base_file(session: InferenceSession, file: KlBaseFile) -> OpenedReference:
    scoring = ReferenceScoring(session, KlBaseReference(file))
    mean, largest = floor_of_file(file)
    record = {
        "kind": "llama.cpp base file",
        "address": str(file.path),
        "weights_fingerprint": file.fingerprint,
        "engine": "llama.cpp",
        "dtype": "uint16 log-probabilities, the least likely tokens as one",
        "self_kl_mean": mean,
        "self_kl_max": largest,
    }
    measured = [asdict(part) for part in described_base_file(file)]
    return OpenedReference(scoring.details, reference=record, measured=(measured[0], measured[1]))


def _alternatives(session: InferenceSession, run: Run) -> OpenedReference:
    """Return scoring with a reference that recorded its most likely tokens: bounds of the KL."""
    reference = TopKReference(run)
    scoring = ReferenceScoring(session, reference)
    kind = f"top {reference.num_alternatives} and a tail"
    described = _described(kind, run.model, run.session)
    return OpenedReference(scoring.details, reference=described, measured=run)


def _states_of(run: Run) -> ReferenceStates:
    scratch = run.states_folder
    folder = Path(scratch.name) if scratch is not None else run.folder
    if folder is None:
        raise UsageError("the reference run keeps no hidden states; use save_reference=True")
    return ReferenceStates(folder)


def _live(session: InferenceSession, reference: InferenceSession) -> OpenedReference:
    if not isinstance(reference, LogitsSession):
        raise CapabilityError(
            f"expected a reference that gives whole distributions, but {reference.model.address} "
            "gives the loss of each target alone; use the checkpoint itself (hf:), or a run of it "
            "with --top-k"
        )
    scoring = ReferenceScoring(session, LiveLogits(reference))
    model, described = asdict(reference.model), asdict(reference.description)
    return OpenedReference(
        scoring.details,
        reference=_described("in step", model, described),
        measured=(model, described),
    )


def _described(kind: str, model: Any, session: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "address": model["address"],
        "weights_fingerprint": model["weights_fingerprint"],
        "engine": session["engine"],
        "dtype": session["dtype"],
    }
