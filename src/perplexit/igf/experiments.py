"""Experiments: methods × seeds on the same test contexts, paired, with their cost.

A folder an experiment:

experiment.json  plan, curves, paired tests, costs: what the figure and a report are drawn from
runs/            one JSON file a fine-tuning, written when it is finished; a killed experiment
                 leaves out what is there already
curves.png, curves.svg
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from perplexit.errors import ResumeError, UsageError
from perplexit.igf.articles import Articles
from perplexit.igf.contexts import Contexts, ContextStream
from perplexit.igf.experiment_file import EXPERIMENT_FILE, EXPERIMENT_KIND, SCHEMA_VERSION
from perplexit.igf.finetune_record import FinetuneProgress, FinetuneSettings
from perplexit.igf.finetuning import finetune_model
from perplexit.igf.identity import (
    differing_conditions,
    measurement_of_model,
    weights_fingerprint,
)
from perplexit.igf.learners import Learner, check_learner_fits, learner_fingerprint
from perplexit.igf.losses import measured_losses
from perplexit.igf.models import restore_weights, weights_of
from perplexit.igf.outcomes import summarise
from perplexit.igf.saved_model import check_experiment_output
from perplexit.igf.selection import (
    CALIBRATION_SEED,
    METHODS,
    NUM_CALIBRATION,
    Selection,
    selection_named,
)
from perplexit.igf.stored import CONDITIONS, write_text
from perplexit.runs.identity import measurement_fingerprint
from perplexit.untrusted_files import Expected
from perplexit.untrusted_json import read_json

_FINISHED = Expected(
    "the record of a finished fine-tuning", ResumeError, "remove it: the fine-tuning is run again"
)


@dataclass(frozen=True)
class ExperimentPlan:
    """What is compared.

    methods:  names of METHODS; the first is what the others are paired with.
    seeds:    one fine-tuning a method and seed; a seed draws the same candidates for all methods.
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

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class ExperimentProgress:
    """Which fine-tuning of how many is under way, and how far it is."""

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
    title:         what a figure or a report calls it; none: the model's name.
    seconds_limit: stop after the run that passes it; the document then says status "interrupted".
    The model has its own weights again afterwards. Raises ResumeError where `output` holds another
    experiment.
    """
    folder = Path(output)
    check_experiment_output(folder)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    measurement = measurement_of_model(model)
    conditions = {
        "plan": {k: v for k, v in plan.to_json().items() if k not in ("methods", "seeds")},
        "weights_fingerprint": weights_fingerprint(model),
        "measurement": measurement,
        "measurement_fingerprint": measurement_fingerprint(measurement),
        "test_fingerprint": test.fingerprint(),
        "train_fingerprint": _fingerprint(train),
        "learner": None if learner is None else learner_fingerprint(learner),
    }
    _check_conditions(folder, conditions)
    original = weights_of(model)
    selections = _selections(model, train, plan, learner)
    began = time.perf_counter()
    total = len(plan.methods) * len(plan.seeds)
    records: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in plan.methods}
    stopped = False
    for number, (seed, method) in enumerate((s, m) for s in plan.seeds for m in plan.methods):
        path = folder / "runs" / f"{method}-{seed}.json"
        if path.exists():
            records[method][seed] = read_json(path, _FINISHED, dict[str, Any])
            continue
        if stopped or (seconds_limit is not None and time.perf_counter() - began > seconds_limit):
            stopped = True
            continue

        def report(
            update: FinetuneProgress, at: tuple[str, int, int] = (method, seed, number)
        ) -> None:
            if progress is not None:
                progress(ExperimentProgress(at[0], at[1], at[2], total, update))

        settings = replace(plan.settings, seed=seed)
        try:
            curve = finetune_model(
                model,
                train,
                test,
                selection=selections(method, seed),
                settings=settings,
                progress=report,
            )
        finally:
            restore_weights(model, original)
        records[method][seed] = {"method": method, "seed": seed, **curve.to_json()}
        _write_json(path, records[method][seed])
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": EXPERIMENT_KIND,
        "status": "interrupted" if stopped else "complete",
        "title": title or model_name,
        "model": model_name,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "plan": plan.to_json(),
        "conditions": conditions,
        "threads": torch.get_num_threads(),
        "test": {"num_contexts": len(test), "num_articles": len(set(test.article_N.tolist()))},
        "train": {"num_articles": len(train)},
        "learner": None if learner is None else {"kind": learner.kind, **learner.record},
        "labelling": labelling,
        **summarise(records, confidence=plan.confidence),
    }
    _write_json(folder / EXPERIMENT_FILE, document)
    return document


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
    """One of METHODS for one fine-tuning, its quantiles taken from contexts that it does not see.

    The loss methods ask the model as it is for its losses on those; see `selection_named`.
    """
    if learner is not None:
        check_learner_fits(learner, model)
    calibration = ContextStream(train, context_length, CALIBRATION_SEED).take(0, num_calibration)
    return selection_named(
        name,
        learner=learner,
        calibration_NT=calibration.ids_NT,
        calibration_losses=lambda: _losses_on(model, calibration),
        share=share,
        constant=constant,
        seed=seed,
    )


def _losses_on(model: nn.Module, contexts: Contexts) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    model.eval()
    return measured_losses(model, torch.from_numpy(contexts.ids_NT).long().to(device))


def _selections(
    model: nn.Module, train: Articles, plan: ExperimentPlan, learner: Learner | None
) -> Callable[[str, int], Selection]:
    if learner is not None:
        check_learner_fits(learner, model)
    length = plan.settings.context_length
    calibration = ContextStream(train, length, CALIBRATION_SEED).take(0, plan.num_calibration)
    losses = None
    if {"high-loss", "perplexity-band"} & set(plan.methods):
        losses = _losses_on(model, calibration)

    def named(method: str, seed: int) -> Selection:
        return selection_named(
            method,
            learner=learner,
            calibration_NT=calibration.ids_NT,
            calibration_losses=None if losses is None else (lambda: losses),
            share=plan.share,
            constant=plan.constant,
            seed=seed,
        )

    for method in plan.methods:
        named(method, 0)  # what a method lacks is said before anything runs
    return named


def _check_conditions(folder: Path, conditions: dict[str, Any]) -> None:
    path = folder / "conditions.json"
    if not path.exists():
        _write_json(path, conditions)
        return
    found = read_json(path, CONDITIONS, dict[str, Any])
    differing = differing_conditions(found, conditions)
    if differing:
        raise ResumeError(
            f"expected {folder} to hold the same experiment, but {differing} differ; "
            "name another folder"
        )


def _fingerprint(articles: Articles) -> str:
    content = hashlib.sha256(np.sort(articles.fingerprints()).astype("<i8").tobytes())
    return content.hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
