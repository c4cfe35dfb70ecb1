"""Experiment folders for tests of the report: simulated curves, summarised by the real code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.igf.experiment_file import EXPERIMENT_FILE, EXPERIMENT_KIND, SCHEMA_VERSION
from perplexit.igf.experiment_summary import summarise

STEPS = [0, 10, 20, 30]
GAINS = {"standard": 0.3, "igf-quantile": 0.6, "random-skip": 0.3, "high-loss": 0.2}


def curve(seed: int, gain: float, noise: float) -> dict[str, Any]:
    """A loss that falls by `gain` nats to the last step; `noise` differs by seed and gain."""
    random = np.random.default_rng([seed, int(1000 * gain)])
    common = np.random.default_rng(seed).normal(0, 0.1)  # what a seed does to every method
    falls = gain * np.array(STEPS) / STEPS[-1] + np.array([0, 1, 1, 1]) * random.normal(0, noise)
    return {
        "steps": STEPS,
        "test_loss": list(5 + common - falls),
        "tokens_trained": 15360,
        "tokens_scored": 0,
        "tokens_judged": 15360 if gain == GAINS["standard"] else 61440,
        "seconds": {"select": 0.1, "train": 4.0, "evaluate": 1.0},
    }


def document_of(
    gains: Mapping[str, float] = GAINS,
    *,
    num_seeds: int = 8,
    noise: float = 0.01,
    title: str = "",
    model: str = "toy/",
) -> dict[str, Any]:
    """A whole experiment.json."""
    records = {
        method: {seed: curve(seed, gain + i * 1e-3, noise) for seed in range(num_seeds)}
        for i, (method, gain) in enumerate(gains.items())
    }
    settings = {"steps": 30, "batch_size": 16, "context_length": 32, "learning_rate": 5e-4}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": EXPERIMENT_KIND,
        "status": "complete",
        "title": title,
        "model": model,
        "num_parameters": 1234567,
        "plan": {
            "methods": list(gains),
            "seeds": list(range(num_seeds)),
            "settings": settings,
            "share": 0.25,
            "constant": 1.0,
            "confidence": 0.95,
        },
        "conditions": {"weights_fingerprint": "f0" * 32},
        "threads": 1,
        "test": {"num_contexts": 200, "num_articles": 11},
        "train": {"num_articles": 227},
        "learner": {"kind": "ridge", "scores": {"spearman": 0.79, "r2": 0.635, "num_pairs": 642}},
        "labelling": {"seconds": 228.3, "num_pairs": 3000, "mode": "first-order"},
        **summarise(records),
    }


def experiment_folder(folder: Path, document: Mapping[str, Any] | None = None) -> Path:
    """The folder that `perplexit igf experiment` would have left."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(document_of() if document is None else document)
    (folder / EXPERIMENT_FILE).write_text(content, encoding="utf-8")
    return folder
