"""Secondary learners: they predict a context's normalised information gain from its ids.

There are two, behind one interface: ridge regression on token counts is the baseline to beat, the
convolution is the paper's. Both are saved as a safetensors file with a JSON record inside, and a
readable copy of that record in a `.json` beside it.

Shape suffixes: N = contexts, T = ids of a context, V = vocabulary, D = embedding size.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from perplexit.atomic_files import write_json
from perplexit.errors import UsageError, VocabularyError
from perplexit.igf.tensors_with_record import StoredFileError, TensorFile, json_kind, tensor_path
from perplexit.protected_outputs import OutputFile, paths_among

_FILE = TensorFile("a secondary learner")
_PREDICTION_ROWS = 512


class Learner(Protocol):
    """Predicts normalised information gain. `record` says how it was trained and how well."""

    kind: str
    record: dict[str, Any]

    def predict(self, ids_NT: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the predicted z-score of each context's gain, float64 [N]."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return what has to be saved to predict the same again."""


def token_counts(ids_NT: NDArray[np.int32], vocab_size: int) -> sparse.csr_matrix:
    """Count how often each id is in each context, sparse float64 [N, V].

    Raises VocabularyError for ids outside the vocabulary.
    """
    check_vocabulary(ids_NT, vocab_size)
    num_contexts, length = ids_NT.shape
    rows = np.repeat(np.arange(num_contexts), length)
    ones = np.ones(ids_NT.size)
    return sparse.csr_matrix((ones, (rows, ids_NT.ravel())), shape=(num_contexts, vocab_size))


def check_vocabulary(ids_NT: NDArray[np.int32], vocab_size: int) -> None:
    """Raise VocabularyError for ids that a learner of `vocab_size` ids has no row for."""
    if ids_NT.size and (int(ids_NT.max()) >= vocab_size or int(ids_NT.min()) < 0):
        raise VocabularyError(
            f"expected ids below {vocab_size}, the learner's vocabulary, got "
            f"{int(ids_NT.max())}; use the tokenizer that the pairs were collected with"
        )


@dataclass
class RidgeLearner:
    """`intercept + Σ weights[id]` over a context's ids: linear in the counts of tokens."""

    weights_V: NDArray[np.float32]
    intercept: float
    record: dict[str, Any] = field(default_factory=dict)
    kind = "ridge"

    def predict(self, ids_NT: NDArray[np.int32]) -> NDArray[np.float64]:
        """See Learner."""
        check_vocabulary(ids_NT, len(self.weights_V))
        sums: NDArray[np.float64] = self.weights_V[ids_NT].sum(axis=1, dtype=np.float64)
        return self.intercept + sums

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See Learner."""
        return {"weights": self.weights_V, "intercept": np.array([self.intercept])}

    @classmethod
    def fit(
        cls, ids_NT: NDArray[np.int32], z_N: NDArray[np.float64], vocab_size: int, penalty: float
    ) -> "RidgeLearner":
        """Return the minimum of `Σ (z - prediction)² + penalty · |weights|²`, in its dual form.

        With centred counts `X`: `weights = Xᵀ (X Xᵀ + penalty · I)⁻¹ (z - mean z)`; N × N, so the
        vocabulary's size does not matter.
        """
        counts = token_counts(ids_NT, vocab_size)
        mean_V = np.asarray(counts.mean(axis=0)).ravel()
        cross_N = counts @ mean_V
        gram = (counts @ counts.T).toarray() - cross_N[:, None] - cross_N[None, :]
        gram += mean_V @ mean_V + penalty * np.eye(len(z_N))
        dual = np.linalg.solve(gram, z_N - z_N.mean())
        weights = counts.T @ dual - mean_V * dual.sum()
        return cls(weights.astype(np.float32), float(z_N.mean() - mean_V @ weights))


class ConvolutionLearner(nn.Module):
    """The paper's network.

        ids [N, T] → embeddings (a trainable copy of the language model's) [N, T, D]
        → convolution over positions, kernel 3, D → 256 channels, ReLU → maximum over positions
        → 256 → 32, ReLU → dropout 0.1 → 32 → 32, ReLU → 32 → 1

    The embedding is the input embedding of any causal language model; nothing else of it is used.
    """

    kind = "cnn"

    def __init__(self, embedding_VD: Tensor, record: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.record = record or {}
        weights = embedding_VD.detach().clone().float()
        self.embeddings = nn.Embedding(len(weights), weights.shape[1], _weight=weights)
        self.convolution = nn.Conv1d(weights.shape[1], 256, kernel_size=3)
        self.layers = nn.Sequential(
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def forward(self, context: Tensor) -> Tensor:
        """Return predicted z-scores [N, 1] of contexts [N, T] (or [N, 1, T], as the original)."""
        ids_NT = context.squeeze(1) if context.dim() == 3 else context
        channels = torch.relu(self.convolution(self.embeddings(ids_NT).transpose(1, 2)))
        found: Tensor = self.layers(channels.amax(dim=2))
        return found

    def predict(self, ids_NT: NDArray[np.int32]) -> NDArray[np.float64]:
        """See Learner."""
        check_vocabulary(ids_NT, self.embeddings.num_embeddings)
        if ids_NT.shape[1] < 3:
            raise UsageError(
                f"expected contexts of at least 3 ids for the convolution, got {ids_NT.shape[1]}; "
                "use the ridge learner for shorter ones"
            )
        was_training = self.training
        self.eval()
        device = self.embeddings.weight.device
        ids = torch.from_numpy(np.ascontiguousarray(ids_NT)).long().to(device)
        with torch.inference_mode():
            found = [self(rows)[:, 0] for rows in torch.split(ids, _PREDICTION_ROWS)]
        self.train(was_training)
        if not found:
            return np.zeros(0)
        return np.asarray(torch.cat(found).double().cpu().numpy())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See Learner."""
        return {name: t.detach().cpu().numpy() for name, t in self.state_dict().items()}


class SecondaryLearner(ConvolutionLearner):
    """The convolution learner, made as the original makes it: from the language model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(input_embedding(model))


def learner_fingerprint(learner: Learner) -> str:
    """Return the SHA-256 of what a learner predicts by: its kind and its tensors."""
    content = hashlib.sha256(learner.kind.encode())
    for name, array in sorted(learner.tensors().items()):
        content.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def check_learner_fits(learner: Learner, model: nn.Module) -> None:
    """Raise VocabularyError where the learner knows ids that the model does not have.

    It was then trained on contexts of another tokenizer, whose ids mean other words here.
    """
    tensors = learner.tensors()
    known = len(tensors["weights" if "weights" in tensors else "embeddings.weight"])
    own = len(input_embedding(model))
    if known > own:
        raise VocabularyError(
            f"expected a learner of the model's vocabulary of {own} ids, got one of {known}; "
            "train it on pairs that were collected with this model"
        )


def input_embedding(model: nn.Module) -> Tensor:
    """Return the language model's input embedding, [V, D]."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def learner_output(path: str | Path, *, inputs: object = (), force: bool = False) -> OutputFile:
    """Return the file for a learner.

    Raises OutputError where it or the record beside it holds something else, and where it holds a
    learner and `force` is not given: whether training will give the same one is not known.
    """
    place = learner_path(path)
    read = paths_among(inputs)
    OutputFile(place.with_suffix(".json"), json_kind("learner"), read)
    file = _FILE.output(place, inputs=read, force=force)
    if file.exists and not force:
        raise file.refused_as_other()
    return file


def save_learner(learner: Learner, path: str | Path) -> Path:
    """Write a learner: `path` (safetensors) and its record as JSON beside it; return `path`.

    Replaces an older learner; raises OutputError where anything else is there.
    """
    learner_output(path, force=True)
    record = {"learner": learner.kind, **learner.record}
    path = _FILE.write(learner_path(path), learner.tensors(), record)
    write_json(path.with_suffix(".json"), record)
    return path


def load_learner(path: str | Path) -> Learner:
    """Return the learner that `save_learner` wrote; it predicts the same to the last bit."""
    with _FILE.opened(learner_path(path)) as (tensors, found):
        kind = found.get("learner")
        record = {k: v for k, v in found.items() if k not in ("learner", "kind", "version")}
        if any(a.dtype.kind != "f" or not np.isfinite(a).all() for a in tensors.values()):
            raise ValueError("weights that are no finite numbers")
        if kind == RidgeLearner.kind:
            weights, intercept = tensors["weights"], tensors["intercept"]
            if weights.ndim != 1 or intercept.shape != (1,):
                raise ValueError(f"weights of shape {weights.shape}")
            return RidgeLearner(weights, float(intercept[0]), record)
        if kind == ConvolutionLearner.kind:
            state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
            learner = ConvolutionLearner(state["embeddings.weight"], record)
            learner.load_state_dict(state)
            return learner.eval()
    raise StoredFileError(f"expected a learner of kind ridge or cnn in {path}, got {kind!r:.60}")


def learner_path(path: str | Path) -> Path:
    """Return where a learner's tensors are kept: `path`, with `.safetensors` at its end."""
    path = tensor_path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
