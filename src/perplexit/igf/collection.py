"""Collecting pairs: contexts through a gain measure, committed part by part, resumable."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor, nn

from perplexit.errors import ResumeError, UsageError
from perplexit.igf.gain_measures import GainMeasure, Mode, default_rule, gain_measure
from perplexit.igf.losses import ids_on_device
from perplexit.igf.model_identity import recorded_identity
from perplexit.igf.optimizer_step import StepRule
from perplexit.igf.pairs import Pairs, pairs_output, parts_folder, write_cost
from perplexit.igf.random_contexts import Contexts, check_disjoint, derived_seed
from perplexit.igf.resumable_work import keep_conditions, require_same
from perplexit.igf.tensors_with_record import stored_as, tensor_path
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.runs.parts_folder import lock_folder
from perplexit.untrusted_files import stated

_WORK = "collection"


@dataclass(frozen=True, slots=True)
class CollectProgress:
    """How far a collection is: pairs done (resumed ones included), of how many, seconds spent."""

    num_pairs: int
    total_pairs: int
    num_pairs_resumed: int
    seconds: float
    mean_gain_nats: float


def collect_pairs(
    model: nn.Module,
    contexts: Contexts,
    objective: Contexts,
    *,
    output: str | Path | None = None,
    mode: Mode = "exact",
    rule: StepRule | None = None,
    dropout: bool = False,
    seed: int = 0,
    model_name: str = "",
    part_size: int = 16,
    progress: Callable[[CollectProgress], None] | None = None,
) -> Pairs:
    """Return the information gain of each context for the objective.

    output: the pairs' file. Parts are committed beside it while it grows; after a kill the same
        call continues from them and ends in the same file, byte for byte. The seconds are kept in
        a `.seconds.json` beside it.
    dropout: as the original has it; each context's mask then follows from `seed` and its number.

    Raises CorpusError where contexts and objective share an article, ResumeError where the parts
    beside `output` were made under other conditions or another process is writing them.
    """
    if output is not None:
        pairs_output(output)
    if part_size < 1:
        raise UsageError(f"expected parts of at least 1 pair, got {part_size}")
    if not len(contexts):
        raise UsageError("expected at least 1 context to measure, got none")
    check_disjoint(objective=objective, contexts=contexts)
    rule = rule or default_rule(mode)
    conditions = {
        "mode": mode,
        "rule": asdict(rule),
        "dropout": dropout,
        "seed": seed,
        "model": model_name,
        **recorded_identity(model),
        "contexts_fingerprint": contexts.fingerprint(),
        "objective_fingerprint": objective.fingerprint(),
        "context_length": int(contexts.ids_NT.shape[1]),
        "objective_size": len(objective),
        "part_size": part_size,
    }
    objective_NT = ids_on_device(model, objective.ids_NT)
    collection = _Collection(output, contexts, conditions)
    with collection.locked():
        collection.resume()
        collection.measure(
            lambda: gain_measure(model, objective_NT, mode=mode, rule=rule, dropout=dropout),
            ids_on_device(model, contexts.ids_NT),
            progress,
        )
        return collection.finish()


class _Collection:
    """The gains of one collection, and their committed parts beside the output, if there is one."""

    def __init__(
        self, output: str | Path | None, contexts: Contexts, conditions: dict[str, Any]
    ) -> None:
        self._began = time.perf_counter()
        self._output = None if output is None else tensor_path(output)
        self._parts = None if self._output is None else parts_folder(self._output)
        self._contexts = contexts
        self._conditions = conditions
        self._gains_N = np.full(len(contexts), np.nan)
        self._objective_loss = np.nan
        self._num_resumed = 0

    def locked(self) -> AbstractContextManager[object]:
        """Lock the folder of the parts, unless none will be written."""
        if self._output is None or self._parts is None or self._output.exists():
            return nullcontext()
        return lock_folder(self._parts.folder, _WORK, "name another output", ResumeError)

    def resume(self) -> None:
        """Read what was measured before, from the finished file or from the committed parts."""
        if self._output is not None and self._output.exists():
            self._read_finished(self._output)
        elif self._parts is not None:
            keep_conditions(self._parts.folder, self._conditions, _WORK)
            for part in self._parts:
                with stated(part.path, stored_as("a part of information gain pairs")):
                    tensors = load(part.data)
                    self._gains_N[part.start : part.stop] = tensors["gain_nats"]
                    self._objective_loss = float(tensors["objective_loss"][0])
        self._num_resumed = int(np.isfinite(self._gains_N).sum())

    def _read_finished(self, output: Path) -> None:
        finished = Pairs.open(output)
        found = {name: finished.record.get(name) for name in self._conditions}
        require_same(found, self._conditions, _WORK, output)
        with stated(output, stored_as("pairs")):
            self._gains_N[:] = finished.gain_nats_N
            self._objective_loss = float(finished.record["objective_loss"])

    def measure(
        self,
        make_measure: Callable[[], GainMeasure],
        contexts_NT: Tensor,
        progress: Callable[[CollectProgress], None] | None,
    ) -> None:
        """Measure and commit the parts that are missing; `make_measure` is called if any is."""
        measure: GainMeasure | None = None
        total, size = len(self._gains_N), self._conditions["part_size"]
        for start in range(0, total, size):
            stop = min(start + size, total)
            if not np.isfinite(self._gains_N[start:stop]).all():
                measure = measure or make_measure()
                self._objective_loss = measure.objective_loss
                gains = self._measured(measure, start, contexts_NT[start:stop])
                self._gains_N[start:stop] = gains
                if self._parts is not None:
                    loss = np.array([self._objective_loss])
                    self._parts.add(start, stop, save({"gain_nats": gains, "objective_loss": loss}))
            if progress is not None:
                done = self._gains_N[np.isfinite(self._gains_N)]
                seconds = time.perf_counter() - self._began
                mean = float(done.mean())
                progress(CollectProgress(len(done), total, self._num_resumed, seconds, mean))

    def _measured(
        self, measure: GainMeasure, start: int, contexts_BT: Tensor
    ) -> NDArray[np.float64]:
        if not self._conditions["dropout"]:
            return measure.gains(contexts_BT)
        found = []
        device = contexts_BT.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            for number, context in enumerate(contexts_BT, start=start):
                torch.manual_seed(derived_seed(self._conditions["seed"], number))
                found.append(measure.gains(context[None]))
        return np.concatenate(found)

    def finish(self) -> Pairs:
        """Return the pairs; write their file and what they cost, and remove the parts.

        The pairs' file is written last: where it exists, everything that belongs to it does.
        """
        contexts, loss = self._contexts, self._objective_loss
        before, after = exp_or_inf(loss), [exp_or_inf(loss - gain) for gain in self._gains_N]
        record = {**self._conditions, "objective_loss": loss, "objective_perplexity": before}
        drops = before - np.array(after)
        pairs = Pairs(contexts.ids_NT, contexts.article_N, self._gains_N, drops, record)
        if self._output is not None and self._parts is not None:
            if not self._output.exists():
                num_measured = len(pairs) - self._num_resumed
                write_cost(self._output, num_measured, time.perf_counter() - self._began)
                pairs.save(self._output)
            self._parts.remove()
        return pairs
