"""Perplexit: a language model's perplexity as a number that can be trusted, compared and used.

Names are loaded on first use (PEP 562), so that `import perplexit` needs neither torch nor
transformers and `perplexit --help` stays quick.
"""

from importlib import import_module
from typing import Any

from perplexit import errors
from perplexit.telemetry import switch_off

switch_off()  # before anything below could import an engine

__version__ = "0.1.0"

_HOME_OF = {
    "prepare": "perplexit.inputs.preparing",
    "ngram_overlap": "perplexit.inputs.overlap",
    "TokenFile": "perplexit.inputs.token_file",
    "load_session": "perplexit.sessions.registry",
    "evaluate": "perplexit.evaluation",
    "perplexity": "perplexit.evaluation",
    "compare": "perplexit.comparison",
    "compare_runs": "perplexit.comparison",
    "Comparison": "perplexit.comparison",
    "compare_bytes": "perplexit.comparison.compare_by_byte",
    "ByteComparison": "perplexit.comparison.byte_comparison",
    "explain": "perplexit.diagnosis",
    "Explanation": "perplexit.diagnosis",
    "doctor": "perplexit.diagnosis",
    "Diagnosis": "perplexit.diagnosis",
    "Run": "perplexit.runs.run",
    "UnreadableRun": "perplexit.runs.store",
    "find_runs": "perplexit.runs.store",
    "list_runs": "perplexit.runs.store",
    "verify_run": "perplexit.runs.run_figures",
    "export_tokens": "perplexit.runs.level_tables",
    "export_documents": "perplexit.runs.level_tables",
    "export_words": "perplexit.runs.level_tables",
    "surprisal_of_words": "perplexit.runs.words",
    "write_report": "perplexit.report",
    "export_id_lines": "perplexit.inputs.id_lines",
    "check_id_lines_output": "perplexit.inputs.preparing",
    "import_id_lines": "perplexit.inputs.id_lines",
    "compile": "perplexit.compilation.targets",
    "Timer": "perplexit.resources.timer",
    "MemoryTracker": "perplexit.resources.memory_tracker",
    "PytorchInferenceSession": "perplexit.sessions.pytorch",
    "OnnxInferenceSession": "perplexit.sessions.onnx",
    "OpenVinoInferenceSession": "perplexit.sessions.openvino",
    "TvmInferenceSession": "perplexit.sessions.tvm",
    "Pt2InferenceSession": "perplexit.sessions.pt2",
    "LlamaCppInferenceSession": "perplexit.sessions.llamacpp",
    "CompletionsInferenceSession": "perplexit.sessions.completions",
    "NgramInferenceSession": "perplexit.sessions.ngram",
    "RecordedInferenceSession": "perplexit.sessions.loss_file",
    "calculate_perplexity": "perplexit.seed_api",
    "torch_perplexity": "perplexit.seed_api",
    "compute_perplexity": "perplexit.seed_api",
    **dict.fromkeys(
        (n for n in vars(errors) if n.endswith(("Error", "Warning"))), "perplexit.errors"
    ),
}

__all__ = ["__version__", *_HOME_OF]  # noqa: PLE0604 - strings, from the table above


def __getattr__(name: str) -> Any:
    """Load the module that a public name lives in, the first time it is asked for."""
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'perplexit' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
