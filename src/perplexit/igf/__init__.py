"""Information Gain Filtration: learn which contexts teach a model most, and fine-tune on those.

Antonello, Beckage, Turek and Huth, "Selecting Informative Contexts Improves Language Model
Fine-tuning", ACL 2021. The names of the original are in `seed_functions`; each is loaded on first
use, so that importing this package needs no torch.
"""

from importlib import import_module
from typing import Any

_SEED_NAMES = (
    "collect_objective_set",
    "finetune",
    "generate_n_pairs",
    "save_model",
    "train_secondary_learner",
    "training_secondary_learner",
)
_HOME_OF = {
    **dict.fromkeys(_SEED_NAMES, "perplexit.igf.seed_functions"),
    "compute_perplexity": "perplexit.igf.seed_data",
    "generate_datasets": "perplexit.igf.seed_data",
    "SecondaryLearner": "perplexit.igf.learners",
    "load_gpt2": "perplexit.igf.models",
    "recopy_gpt2": "perplexit.igf.models",
    "Articles": "perplexit.igf.articles",
    "read_articles": "perplexit.igf.articles",
    "Contexts": "perplexit.igf.contexts",
    "ContextStream": "perplexit.igf.contexts",
    "objective_contexts": "perplexit.igf.contexts",
    "train_and_test": "perplexit.igf.contexts",
    "Pairs": "perplexit.igf.pairs",
    "load_pairs": "perplexit.igf.pairs",
    "tensor_path": "perplexit.igf.stored",
    "calibrated_selection": "perplexit.igf.experiments",
    "StepRule": "perplexit.igf.steps",
    "gain_measure": "perplexit.igf.gains",
    "collect_pairs": "perplexit.igf.collection",
    "train_learner": "perplexit.igf.learning",
    "doubt_about": "perplexit.igf.scores",
    "load_learner": "perplexit.igf.learners",
    "save_learner": "perplexit.igf.learners",
    "pairs_output": "perplexit.igf.pairs",
    "learner_output": "perplexit.igf.learners",
    "model_output": "perplexit.igf.saved_model",
    "check_experiment_output": "perplexit.igf.saved_model",
    "METHODS": "perplexit.igf.selection",
    "selection_named": "perplexit.igf.selection",
    "FinetuneSettings": "perplexit.igf.finetune_record",
    "finetune_model": "perplexit.igf.finetuning",
    "Experiment": "perplexit.igf.experiment_file",
    "ExperimentPlan": "perplexit.igf.experiments",
    "run_experiment": "perplexit.igf.experiments",
    "draw_experiment": "perplexit.igf.figure",
    "load_model": "perplexit.igf.models",
    "with_lora": "perplexit.igf.models",
    "unlike_pairs": "perplexit.igf.identity",
}

__all__ = [*_HOME_OF]  # noqa: PLE0604 - strings, from the table above


def __getattr__(name: str) -> Any:
    """Load the module that a public name lives in, the first time it is asked for."""
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'perplexit.igf' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
