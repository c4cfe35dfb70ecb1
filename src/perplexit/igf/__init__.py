"""Information Gain Filtration: learn which contexts teach a model most, and fine-tune on those.

Antonello, Beckage, Turek and Huth, "Selecting Informative Contexts Improves Language Model
Fine-tuning", ACL 2021. The names of the original are in `original_functions`; each name is loaded
on first use, so that importing this package needs no torch.
"""

from importlib import import_module
from typing import Any

_NAMES_IN = {
    "original_functions": (
        "collect_objective_set",
        "compute_perplexity",
        "finetune",
        "generate_datasets",
        "generate_n_pairs",
        "train_secondary_learner",
        "training_secondary_learner",
    ),
    "articles": ("Articles", "read_articles"),
    "random_contexts": ("Contexts", "ContextStream", "objective_contexts", "train_and_test"),
    "optimizer_step": ("StepRule",),
    "gain_measures": ("gain_measure",),
    "pairs": ("Pairs", "load_pairs", "pairs_output", "cost_of"),
    "tensors_with_record": ("tensor_path",),
    "collection": ("collect_pairs",),
    "learners": ("SecondaryLearner", "learner_output", "load_learner", "save_learner"),
    "learner_training": ("train_learner",),
    "learner_scores": ("doubt_about",),
    "selection": ("METHODS", "selection_named"),
    "training_options": ("FinetuneSettings",),
    "finetuning": ("finetune_model",),
    "language_model": (
        "load_gpt2",
        "load_model",
        "model_output",
        "recopy_gpt2",
        "save_model",
        "set_threads",
        "with_lora",
    ),
    "model_identity": ("unlike_pairs",),
    "experiment_file": ("Experiment", "check_experiment_output"),
    "experiments": ("ExperimentPlan", "calibrated_selection", "run_experiment"),
    "experiment_summary": ("draw_experiment",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [*_MODULE_OF]  # noqa: PLE0604 - strings, from the table above


def __getattr__(name: str) -> Any:
    """Load the module that a public name lives in, the first time the name is used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'perplexit.igf' has no attribute {name!r}")
    value = getattr(import_module(f"perplexit.igf.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
