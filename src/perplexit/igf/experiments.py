"""Experiments: methods × seeds on the same test contexts, paired, with their cost.

One folder per experiment:

experiment.json  plan, curves, paired tests, costs: what the plot and a report are drawn from
conditions.json  what must be equal for the experiment to be continued
runs/            one JSON file per fine-tuning, written when it is finished; an experiment that
                 was killed does not repeat what is there
curves.png, curves.svg
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from perplexit.atomic_files import write_json
from perplexit.errors import ResumeError, UsageError
from perplexit.igf.articles import Articles
from perplexit.igf.experiment_file import DOCUMENT_HEAD, EXPERIMENT_FILE, check_experiment_output
from perplexit.igf.experiment_summary import summarise
from perplexit.igf.finetune_curve import FinetuneCurve, FinetuneProgress
from perplexit.igf.finetuning import finetune_model
from perplexit.igf.language_model import weights_restored
from perplexit.igf.learners import Learner, check_learner_fits, learner_fingerprint
from perplexit.igf.losses import ContextScorer, ids_on_device
from perplexit.igf.model_identity import recorded_identity
from perplexit.igf.random_contexts import Contexts
from perplexit.igf.resumable_work import keep_conditions
from perplexit.igf.selection import (
    METHODS,
    NUM_CALIBRATION,
    Selection,
    calibration_contexts,
    selection_named,
)
from perplexit.igf.training_options import FinetuneSettings
from perplexit.runs.measurement import plain_json
from perplexit.untrusted_files import Expected, read_json

_FINISHED = Expected(
    "the record of a finished fine-tuning", ResumeError, "remove it: the fine-tuning is run again"
)


@dataclass(frozen=True)
class ExperimentPlan:
    """What is compared.

    methods:  names of METHODS; the others are paired with the first.
    seeds:    one fine-tuning per method and seed; a seed draws the same candidates for all methods.
    share:    how many candidates the quantile, random and loss methods accept.
    constant: the threshold of igf-constant, and of igf-shifting before it shifts.
    """

    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = tuple(range(12))
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    share: float = 0.25
    constant: float = 1.0
    num_calibration: int = NUM_CALIBRATION
    confidence: float = 0.95

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown or len(set(self.methods)) != len(self.methods) or not self.methods:
            raise UsageError(
                f"expected different methods out of {', '.join(METHODS)}, got "
                f"{', '.join(self.methods) or 'none'}"
            )
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise UsageError(f"expected at least 2 different seeds, got {list(self.seeds)}")


@dataclass(frozen=True, slots=True)
class ExperimentProgress:
    """Which fine-tuning of how many is running, and how far it is."""

    method: str
    seed: int
    num_runs: int
    total_runs: int
    finetune: FinetuneProgress | None = None


def run_experiment(
    model: nn.Module,
    train: Articles,
    test: Contexts,
    *,
    plan: ExperimentPlan,
    output: str | Path,
    learner: Learner | None = None,
    labelling: dict[str, Any] | None = None,
    model_name: str = "",
    title: str = "",
    seconds_limit: float | None = None,
    progress: Callable[[ExperimentProgress], None] | None = None,
) -> dict[str, Any]:
    """Run what is not done yet and return the document that `experiment.json` holds.

    labelling:     what the learner's pairs cost, recorded beside the methods that need them.
    title:         what a plot or a report calls it; empty: the model's name.
    seconds_limit: stop after the run that passes it; the document then says status "interrupted".
    Restores the model's weights. Raises ResumeError where `output` holds another experiment.
    """
    folder = Path(output)
    check_experiment_output(folder)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    conditions = _conditions(model, train, test, plan, learner)
    keep_conditions(folder, conditions, "experiment")
    select = _calibrated(model, train, plan, learner)
    for method in plan.methods:
        select(method, 0)  # raises before anything runs where a method lacks something

    def finetuned(at: ExperimentProgress) -> FinetuneCurve:
        with weights_restored(model):
            return finetune_model(
                model,
                train,
                test,
                selection=select(at.method, at.seed),
                settings=replace(plan.settings, seed=at.seed),
                progress=progress and (lambda update: progress(replace(at, finetune=update))),
            )

    records, stopped = _run_what_is_missing(plan, finetuned, folder / "runs", seconds_limit)
    document = {
        **DOCUMENT_HEAD,
        "status": "interrupted" if stopped else "complete",
        "title": title or model_name,
        "model": model_name,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "plan": plain_json(asdict(plan)),
        "conditions": conditions,
        "threads": torch.get_num_threads(),
        "test": {"num_contexts": len(test), "num_articles": len(set(test.article_N.tolist()))},
        "train": {"num_articles": len(train)},
        "learner": None if learner is None else {"kind": learner.kind, **learner.record},
        "labelling": labelling,
        **summarise(records, confidence=plan.confidence),
    }
    write_json(folder / EXPERIMENT_FILE, document)
    return document


def _conditions(
    model: nn.Module, train: Articles, test: Contexts, plan: ExperimentPlan, learner: Learner | None
) -> dict[str, Any]:
    planned = plain_json(asdict(plan))
    articles_N = np.sort(train.fingerprints())
    return {
        "plan": {k: v for k, v in planned.items() if k not in ("methods", "seeds")},
        **recorded_identity(model),
        "test_fingerprint": test.fingerprint(),
        "train_fingerprint": hashlib.sha256(articles_N.astype("<i8").tobytes()).hexdigest(),
        "learner": None if learner is None else learner_fingerprint(learner),
    }


def _run_what_is_missing(
    plan: ExperimentPlan,
    finetuned: Callable[[ExperimentProgress], FinetuneCurve],
    folder: Path,
    seconds_limit: float | None,
) -> tuple[dict[str, dict[int, dict[str, Any]]], bool]:
    """Return (records by method and seed, whether the limit stopped it); write each new record."""
    began, stopped = time.perf_counter(), False
    records: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in plan.methods}
    runs = [(seed, method) for seed in plan.seeds for method in plan.methods]
    for number, (seed, method) in enumerate(runs):
        path = folder / f"{method}-{seed}.json"
        if not path.exists():
            late = seconds_limit is not None and time.perf_counter() - began > seconds_limit
            stopped = stopped or late
            if stopped:
                continue
            curve = finetuned(ExperimentProgress(method, seed, number, len(runs)))
            write_json(path, {"method": method, "seed": seed, **curve.to_json()})
        records[method][seed] = read_json(path, _FINISHED, dict[str, Any])
    return records, stopped


def calibrated_selection(
    name: str,
    model: nn.Module,
    train: Articles,
    context_length: int,
    *,
    learner: Learner | None = None,
    share: float = 0.25,
    constant: float = 1.0,
    seed: int = 0,
    num_calibration: int = NUM_CALIBRATION,
) -> Selection:
    """Return one of METHODS, calibrated on contexts that the fine-tuning does not see.

    The loss methods use the model's losses on those, before any training; see `selection_named`.
    """
    plan = ExperimentPlan(
        settings=FinetuneSettings(context_length=context_length),
        share=share,
        constant=constant,
        num_calibration=num_calibration,
    )
    return _calibrated(model, train, plan, learner)(name, seed)


def _calibrated(
    model: nn.Module, train: Articles, plan: ExperimentPlan, learner: Learner | None
) -> Callable[[str, int], Selection]:
    """Return a function of method and seed; all its selections have the same calibration."""
    if learner is not None:
        check_learner_fits(learner, model)
    ids_NT = calibration_contexts(train, plan.settings.context_length, plan.num_calibration).ids_NT

    @cache
    def losses() -> NDArray[np.float64]:
        return ContextScorer(model).losses(ids_on_device(model, ids_NT))

    return lambda method, seed: selection_named(
        method,
        learner=learner,
        calibration_NT=ids_NT,
        calibration_losses=losses,
        share=plan.share,
        constant=plan.constant,
        seed=seed,
    )
