"""Collecting pairs: contexts through a gain measure, committed part by part, resumable."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from perplexit.errors import ResumeError, UsageError
from perplexit.igf.contexts import Contexts, check_disjoint
from perplexit.igf.gains import GainMeasure, Mode, gain_measure
from perplexit.igf.identity import (
    differing_conditions,
    measurement_of_model,
    weights_fingerprint,
)
from perplexit.igf.losses import perplexity_of
from perplexit.igf.pairs import Pairs, pairs_output
from perplexit.igf.steps import StepRule
from perplexit.igf.stored import (
    CONDITIONS,
    StoredFileError,
    read_stored,
    stored_as,
    tensor_path,
    write_stored,
    write_text,
)
from perplexit.runs.identity import measurement_fingerprint
from perplexit.untrusted_files import stated
from perplexit.untrusted_json import read_json

PART_KIND = "a part of information gain pairs"


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
    """The information gain of each context for the objective.

    output: the pairs' file. Parts are committed beside it while it grows; the same call after a
        kill goes on from there and ends in the same file, byte for byte. Seconds are kept in a
        `.seconds.json` beside it.
    dropout: as the original has it; each context's mask then follows from `seed` and its number.

    Raises CorpusError where contexts and objective share an article, ResumeError where the parts
    beside `output` were made under other conditions.
    """
    if output is not None:
        pairs_output(output)
    if part_size < 1:
        raise UsageError(f"expected parts of at least 1 pair, got {part_size}")
    check_disjoint(objective=objective, contexts=contexts)
    device = next(model.parameters()).device
    objective_NT = torch.from_numpy(objective.ids_NT).long().to(device)
    began = time.perf_counter()
    measurement = measurement_of_model(model)
    conditions = {
        "mode": mode,
        "rule": (rule or _default_rule(mode)).to_json(),
        "dropout": dropout,
        "seed": seed,
        "model": model_name,
        "weights_fingerprint": weights_fingerprint(model),
        "measurement": measurement,
        "measurement_fingerprint": measurement_fingerprint(measurement),
        "contexts_fingerprint": contexts.fingerprint(),
        "objective_fingerprint": objective.fingerprint(),
        "context_length": int(contexts.ids_NT.shape[1]),
        "objective_size": len(objective),
        "part_size": part_size,
    }
    parts = _Parts(None if output is None else tensor_path(output), conditions)
    gains = parts.done(len(contexts))
    num_resumed = int(np.isfinite(gains).sum())
    measure: GainMeasure | None = None
    objective_loss = parts.objective_loss
    for start in range(0, len(contexts), part_size):
        rows = slice(start, min(start + part_size, len(contexts)))
        if not np.isfinite(gains[rows]).all():
            if measure is None:
                measure = gain_measure(model, objective_NT, mode=mode, rule=rule, dropout=dropout)
                objective_loss = measure.objective_loss
            gains[rows] = _measured(measure, contexts.ids_NT[rows], start, dropout, seed, device)
            parts.add(start, gains[rows], float(measure.objective_loss))
        if progress is not None:
            done = gains[np.isfinite(gains)]
            seconds = time.perf_counter() - began
            progress(
                CollectProgress(len(done), len(contexts), num_resumed, seconds, float(done.mean()))
            )
    if objective_loss is None:
        raise UsageError("expected at least 1 context to measure, got none")
    before = perplexity_of(objective_loss)
    after = np.array([perplexity_of(objective_loss - gain) for gain in gains])
    record = {**conditions, "objective_loss": objective_loss, "objective_perplexity": before}
    pairs = Pairs(contexts.ids_NT, contexts.article_N, gains, before - after, record)
    parts.finish(pairs, time.perf_counter() - began, len(contexts) - num_resumed)
    return pairs


def _default_rule(mode: Mode) -> StepRule:
    return StepRule("sgd", clip_norm=None) if mode == "directional" else StepRule()


def _measured(  # noqa: PLR0917 - one part
    measure: GainMeasure,
    ids_NT: NDArray[np.int32],
    start: int,
    dropout: bool,
    seed: int,
    device: torch.device,
) -> NDArray[np.float64]:
    contexts = torch.from_numpy(ids_NT).long().to(device)
    if not dropout:
        return measure.gains(contexts)
    found = []
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        for row, context in enumerate(contexts):
            torch.manual_seed(int(np.random.SeedSequence([seed, start + row]).generate_state(1)[0]))
            found.append(measure.gains(context[None]))
    return np.concatenate(found)


class _Parts:
    """The committed parts beside an output file (or nothing, where there is no output)."""

    def __init__(self, output: Path | None, conditions: dict[str, Any]) -> None:
        self._output = output
        self._conditions = conditions
        self._folder = None if output is None else output.with_name(output.name + ".parts")
        self.objective_loss: float | None = None

    def done(self, total: int) -> NDArray[np.float64]:
        """Gains that are committed already, NaN where not yet."""
        gains = np.full(total, np.nan)
        if self._output is not None and self._output.exists():
            self._reuse_finished(gains)
            return gains
        if self._folder is None:
            return gains
        self._check_conditions(self._folder)
        for path in sorted(self._folder.glob("part-*.safetensors")):
            try:
                tensors, record = read_stored(path, PART_KIND)
            except StoredFileError:
                path.unlink()  # cut off, in a folder of our own: measured again
                continue
            with stated(path, stored_as(PART_KIND)):
                start = int(record["start"])
                gains[start : start + len(tensors["gain_nats"])] = tensors["gain_nats"]
                self.objective_loss = float(record["objective_loss"])
        return gains

    def _reuse_finished(self, gains: NDArray[np.float64]) -> None:
        finished = Pairs.open(self._output or "")
        self._compare({k: finished.record.get(k) for k in self._conditions}, self._output)
        with stated(self._output or "", stored_as("pairs")):
            gains[:] = finished.gain_nats_N
            self.objective_loss = float(finished.record["objective_loss"])

    def _check_conditions(self, folder: Path) -> None:
        path = folder / "conditions.json"
        if path.exists():
            self._compare(read_json(path, CONDITIONS, dict[str, Any]), folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._conditions, indent=2, sort_keys=True)
        write_text(path, text)

    def _compare(self, found: dict[str, Any], where: Path | None) -> None:
        differing = differing_conditions(found, self._conditions)
        if differing:
            raise ResumeError(
                f"expected {where} to have been made under the same conditions, but {differing} "
                "differ; name another output, or remove it"
            )

    def add(self, start: int, gains: NDArray[np.float64], objective_loss: float) -> None:
        """Commit a part: after this returns, a kill does not lose it."""
        if self._folder is not None:
            path = self._folder / f"part-{start:09d}.safetensors"
            record = {"start": start, "objective_loss": objective_loss}
            write_stored(path, PART_KIND, {"gain_nats": gains}, record)

    def finish(self, pairs: Pairs, seconds: float, num_measured: int) -> None:
        """Write the file and drop the parts.

        The file comes last but for them: where it exists, everything that belongs to it does.
        """
        if self._output is None or self._folder is None:
            return
        if not self._output.exists():
            self._write(self._output, pairs, seconds, num_measured)
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _write(output: Path, pairs: Pairs, seconds: float, num_measured: int) -> None:
        note = {"seconds": seconds, "num_pairs_measured": num_measured}
        text = json.dumps({**note, "pairs_per_second": num_measured / max(seconds, 1e-9)}, indent=2)
        write_text(output.with_suffix(".seconds.json"), text)
        pairs.save(output)
