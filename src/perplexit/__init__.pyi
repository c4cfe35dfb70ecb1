"""The public names with their types; at run time they are loaded on first use."""

from perplexit.comparison import Comparison as Comparison
from perplexit.comparison import compare as compare
from perplexit.comparison import compare_runs as compare_runs
from perplexit.comparison.byte_comparison import ByteComparison as ByteComparison
from perplexit.comparison.compare_by_byte import compare_bytes as compare_bytes
from perplexit.compilation.targets import compile as compile
from perplexit.diagnosis import Diagnosis as Diagnosis
from perplexit.diagnosis import Explanation as Explanation
from perplexit.diagnosis import doctor as doctor
from perplexit.diagnosis import explain as explain
from perplexit.errors import CacheMismatchError as CacheMismatchError
from perplexit.errors import CapabilityError as CapabilityError
from perplexit.errors import CompilationError as CompilationError
from perplexit.errors import CorpusError as CorpusError
from perplexit.errors import EmptyScoreError as EmptyScoreError
from perplexit.errors import EngineOutOfMemoryError as EngineOutOfMemoryError
from perplexit.errors import FingerprintMismatchError as FingerprintMismatchError
from perplexit.errors import GateError as GateError
from perplexit.errors import MemoryBoundError as MemoryBoundError
from perplexit.errors import MissingPackageError as MissingPackageError
from perplexit.errors import ModelError as ModelError
from perplexit.errors import NonFiniteError as NonFiniteError
from perplexit.errors import OutputError as OutputError
from perplexit.errors import PerplexitError as PerplexitError
from perplexit.errors import QuantizationError as QuantizationError
from perplexit.errors import ResumeError as ResumeError
from perplexit.errors import RunError as RunError
from perplexit.errors import TokenFileError as TokenFileError
from perplexit.errors import TokenizerError as TokenizerError
from perplexit.errors import TrustWarning as TrustWarning
from perplexit.errors import UnknownPrecisionError as UnknownPrecisionError
from perplexit.errors import UsageError as UsageError
from perplexit.errors import VocabularyError as VocabularyError
from perplexit.evaluation import evaluate as evaluate
from perplexit.evaluation import perplexity as perplexity
from perplexit.inputs.id_lines import export_id_lines as export_id_lines
from perplexit.inputs.id_lines import import_id_lines as import_id_lines
from perplexit.inputs.overlap import ngram_overlap as ngram_overlap
from perplexit.inputs.preparing import check_id_lines_output as check_id_lines_output
from perplexit.inputs.preparing import prepare as prepare
from perplexit.inputs.token_file import TokenFile as TokenFile
from perplexit.report import write_report as write_report
from perplexit.resources.memory_tracker import MemoryTracker as MemoryTracker
from perplexit.resources.timer import Timer as Timer
from perplexit.runs.level_tables import export_documents as export_documents
from perplexit.runs.level_tables import export_tokens as export_tokens
from perplexit.runs.level_tables import export_words as export_words
from perplexit.runs.run import Run as Run
from perplexit.runs.run_figures import verify_run as verify_run
from perplexit.runs.store import UnreadableRun as UnreadableRun
from perplexit.runs.store import find_runs as find_runs
from perplexit.runs.store import list_runs as list_runs
from perplexit.runs.words import surprisal_of_words as surprisal_of_words
from perplexit.seed_api import calculate_perplexity as calculate_perplexity
from perplexit.seed_api import compute_perplexity as compute_perplexity
from perplexit.seed_api import torch_perplexity as torch_perplexity
from perplexit.sessions.completions import (
    CompletionsInferenceSession as CompletionsInferenceSession,
)
from perplexit.sessions.llamacpp import LlamaCppInferenceSession as LlamaCppInferenceSession
from perplexit.sessions.loss_file import RecordedInferenceSession as RecordedInferenceSession
from perplexit.sessions.ngram import NgramInferenceSession as NgramInferenceSession
from perplexit.sessions.onnx import OnnxInferenceSession as OnnxInferenceSession
from perplexit.sessions.openvino import OpenVinoInferenceSession as OpenVinoInferenceSession
from perplexit.sessions.pt2 import Pt2InferenceSession as Pt2InferenceSession
from perplexit.sessions.pytorch import PytorchInferenceSession as PytorchInferenceSession
from perplexit.sessions.registry import load_session as load_session
from perplexit.sessions.tvm import TvmInferenceSession as TvmInferenceSession

__version__: str
