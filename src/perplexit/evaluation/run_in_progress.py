"""One evaluation under way: batches scored, committed part by part, and put on one record."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from perplexit import __version__
from perplexit.errors import NonFiniteError
from perplexit.evaluation.input_fit import check_fits
from perplexit.evaluation.noise_floor import noise_floor_of
from perplexit.evaluation.request import Request, check_same_conditions
from perplexit.evaluation.scorer import BatchPlan, ProgressUpdate, Scorer, plan_batches
from perplexit.evaluation.window_order import WindowResults
from perplexit.inputs.token_file import TokenFile
from perplexit.resources.host_memory import HostMemory
from perplexit.runs.run import SCHEMA_VERSION, Run
from perplexit.runs.run_figures import figures_of
from perplexit.runs.store import RunStore, ScoredBatch
from perplexit.sessions.base import InferenceSession, MeasuresDeviceMemory

Progress = Callable[[ProgressUpdate], None]


@dataclass
class RunInProgress:
    """One evaluation under way: session, input and folder, and the results so far.

    began: `time.perf_counter()` when the evaluation began, before its model was loaded.
    with_reference: a `reference.opening.OpenedReference`, where one is saved or compared with.
    """

    session: InferenceSession
    tokens: TokenFile
    store: RunStore | None
    request: Request
    memory: HostMemory
    progress: Progress | None
    tokenizer_check: Mapping[str, Any] | None  # see Run
    began: float
    with_reference: Any = None
    load_seconds: float = field(init=False)
    results: WindowResults = field(init=False)
    resumed: "_Resumed" = field(init=False)

    def __post_init__(self) -> None:
        self.load_seconds = time.perf_counter() - self.began

    def begun(self, recorded: Run | None) -> Run:
        """Return the record to be filled, or the recorded run where it is complete and whole.

        recorded: what the run's folder holds; the new run goes on with its batches.
        Raises ResumeError where it was made under other conditions.
        """
        wanted = self._new_run()
        if recorded is None or self.store is None:
            return wanted
        wanted = replace(wanted, created=recorded.created, batch_plan=recorded.batch_plan)
        wanted = self.identified(wanted)
        check_same_conditions(recorded, wanted, self.request.batch_size)
        lost = self.lost_of(recorded)
        if recorded.status == "complete" and lost is None:
            self.store.remove_parts()  # a kill may have come between the record and this
            return recorded
        if lost is not None:
            again = f"the run was complete, but {lost}: it was scored again"
            wanted = replace(wanted, warnings=[*wanted.warnings, again])
        return wanted

    def _new_run(self) -> Run:
        request = self.request
        warnings = check_fits(self.session, self.tokens)
        if self.tokenizer_check is not None and not self.tokenizer_check["same"]:
            warnings.append(
                "the input was prepared with another tokenizer than the model's own, as "
                f"--other-tokenizer allows: {self.tokenizer_check['difference']}"
            )
        description = asdict(self.session.description)
        threads = description.pop("threads")
        size = request.batch_size
        plan = plan_batches(self.session, self.tokens, None if size == "auto" else size)
        run = Run(
            schema_version=SCHEMA_VERSION,
            perplexit_version=__version__,
            status="running",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            confidence=request.confidence,
            input_path=str(self.tokens.path.resolve()),
            input_fingerprint=self.tokens.input_fingerprint,
            text_fingerprint=self.tokens.text_fingerprint,
            tokenizer_fingerprint=self.tokens.tokenizer_fingerprint,
            tokenizer_check=None if self.tokenizer_check is None else dict(self.tokenizer_check),
            protocol=self.tokens.protocol,
            input_spec=dict(self.tokens.spec),
            num_documents=self.tokens.num_documents,
            num_windows=self.tokens.num_windows,
            model=asdict(self.session.model),
            session=description,
            threads=threads,
            top_k=request.top_k,
            on_non_finite=request.on_non_finite,
            batch_plan={"batch_size": size, **plan.to_json()},
            warnings=warnings,
            saved_reference=self.with_reference and self.with_reference.saved,
        )
        return self.identified(run)

    def identified(self, run: Run) -> Run:
        """Return the run with its identity and its reference's, which may depend on its batches."""
        run = run.identified()
        if self.with_reference is None:
            return run
        return replace(run, reference=self.with_reference.reference_of(run))

    def lost_of(self, recorded: Run) -> str | None:
        """Return what a complete run lacks on disk, in words; None where it lacks nothing."""
        if recorded.status != "complete":
            return None
        lost = recorded.damage()
        if lost is None and self.with_reference is not None:
            lost = self.with_reference.lost_of(self.tokens)
        return lost

    def score_all(self, run: Run) -> Run:
        """Score what is not done and commit it part by part.

        Returns the run with its batch plan as it ended up: smaller where memory ran out.
        """
        self.results = results = WindowResults(self.tokens)
        if self.store is not None:
            for part in self.store.parts():
                results.add(part)
            self.store.write_record(run)
        self.resumed = _Resumed.of(results)
        details = self.with_reference and self.with_reference.details
        plan = BatchPlan.from_json(run.batch_plan)
        scorer = Scorer(self.session, self.tokens, plan, run.top_k, details)
        try:
            for batch in scorer.batches(results.done[scorer.order]):
                if scorer.plan != plan:  # memory ran out: a resumed run must repeat the halving
                    plan = scorer.plan
                    run = replace(run, batch_plan={**run.batch_plan, **plan.to_json()})
                    if self.store is not None:
                        self.store.commit()
                        self.store.write_record(run)
                if run.on_non_finite == "error":
                    self._check_finite(batch)
                if self.store is not None:
                    self.store.add(batch)
                results.add(batch)
                if self.progress is not None:
                    self.progress(_progress_of(results, self.tokens, self.resumed))
        except BaseException:
            if self.store is not None:
                self.store.commit()
                self.store.write_record(replace(run, status="interrupted"))
            raise
        if self.store is not None:
            self.store.commit()
        return run

    def completed(self, run: Run) -> Run:
        """Return the scored run with every figure filled in, stored if it has a folder."""
        results, resumed = self.results, self.resumed
        run = replace(
            self.identified(run),
            schema_version=SCHEMA_VERSION,
            status="complete",
            num_windows_resumed=resumed.num_windows,
            loaded_tokens=results.run_tokens(),
        )
        peak = peak_beyond_weights = None
        if isinstance(self.session, MeasuresDeviceMemory):
            peak, peak_beyond_weights = self.session.peak_device_bytes()
        run = replace(
            run,
            **figures_of(
                run.tokens,
                confidence=run.confidence,
                on_non_finite=run.on_non_finite,
                spec=self.tokens.spec,
            ),
            peak_memory_bytes={
                "host_rss": self.memory.peak_bytes,
                "torch_device": peak,
                "torch_device_beyond_weights": peak_beyond_weights,
            },
            seconds={
                "load": self.load_seconds,
                "prefill": results.seconds - results.decode_seconds,
                "decode": results.decode_seconds,
                "total": time.perf_counter() - self.began + resumed.seconds,
            },
            tokens_per_second=results.num_tokens_done / max(results.seconds, 1e-9),
        )
        if run.saved_reference is not None:
            run = replace(
                run,
                saved_reference=self.with_reference.finish(),
                states_folder=self.with_reference.scratch,
            )
        return run if self.store is None else _stored(self.store, run, self.tokens)

    def with_noise_floor(self, run: Run) -> Run:
        """Return the complete run with its noise floor measured, and stored if it has a folder."""
        floor = noise_floor_of(self.session, self.tokens, run)
        run = replace(run, noise_floor=floor.to_json())
        if self.store is not None:
            self.store.write_record(run)
        return run

    def _check_finite(self, batch: ScoredBatch) -> None:
        """Raise NonFiniteError that names the batch's first bad token."""
        bad = np.flatnonzero(~np.isfinite(batch.details.nll_N))
        if len(bad):
            stops_W = np.cumsum(batch.num_targets_W)
            place = int(np.searchsorted(stops_W, bad[0], side="right"))
            row = int(batch.window_W[place])
            ids = self.tokens.window_ids(row)
            target = int(bad[0] - (stops_W[place] - batch.num_targets_W[place]))
            position = int(ids.targets_N[target])
            raise NonFiniteError(
                f"expected a finite loss for every token, got {float(batch.details.nll_N[bad[0]])} "
                f"in window {row} at position {position} (token id {int(ids.ids_T[position])}, "
                f"document {self.tokens.windows[row].document}); what was scored before is kept. "
                f"{_wider(self.session.description.dtype)}or leave such tokens out and count them "
                "with --on-non-finite count (on_non_finite='count' in Python)"
            )


def _wider(dtype: str) -> str:
    """Return what to do about numbers that are too small for a loss, where that is the cause."""
    if "float32" in dtype:
        return "The model itself gives it in float32: look at its weights (`perplexit doctor`), "
    return f"Score in float32 (this was {dtype}), "


@dataclass(frozen=True)
class _Resumed:
    """What an earlier process had scored."""

    num_windows: int
    num_tokens: int
    seconds: float

    @classmethod
    def of(cls, results: WindowResults) -> "_Resumed":
        return cls(results.num_windows_scored, results.num_tokens_done, results.seconds)


def _progress_of(results: WindowResults, tokens: TokenFile, resumed: _Resumed) -> ProgressUpdate:
    return ProgressUpdate(
        num_tokens=results.num_tokens_done,
        total_tokens=tokens.num_targets,
        nll_sum=results.nll_sum,
        num_windows=results.num_windows_scored,
        total_windows=tokens.num_windows,
        num_tokens_resumed=resumed.num_tokens,
        num_windows_resumed=resumed.num_windows,
        seconds=results.seconds - resumed.seconds,
    )


def _stored(store: RunStore, run: Run, tokens: TokenFile) -> Run:
    """Put the results on disk: tokens first, then the record that calls them complete."""
    if tokens.sources is not None:
        store.write_documents(tokens.sources.table())
    run = replace(run, tokens_sha256=store.write_tokens(run.tokens), folder=store.folder)
    store.write_record(run)
    store.remove_parts()
    return run
