"""A program while it is made of a checkpoint: its losses against the checkpoint's, its record.

Both score the same few windows of random ids.
Shape suffixes: T = ids per window, N = targets, V = vocabulary.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perplexit import __version__
from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import rows_at_a_time
from perplexit.compilation.targets import CompileRequest
from perplexit.errors import CompilationError, QuantizationError
from perplexit.inputs.windows import WindowIds
from perplexit.program_batches import ProgramCalls, RunProgram
from perplexit.program_record import (
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramShapes,
    ProgramVerification,
    files_of,
)

IN_FLOAT32 = "the checkpoint in PyTorch float32"
TOLERANCE = 1e-3  # nats per token
_MEAN_TOLERANCE = 4.0  # in the mean, of quantized weights on random ids; noise costs tens
_LEAST_CHANGE = 1e-6  # nats: less than this is rounding, no quantization
_LENGTHS = (64, 37, 2)  # ids: unequal, so that padding and masks are tested
Losses = NDArray[np.float64]


class ProgramBuild:
    """What every builder needs: the checkpoint, described, with windows to verify the program on.

    engine: that the program is for. shapes: its sizes. packages: those whose versions count.
    """

    def __init__(
        self,
        engine: str,
        checkpoint: Checkpoint,
        request: CompileRequest,
        shapes: ProgramShapes,
        packages: tuple[str, ...],
    ) -> None:
        self.engine, self.request, self.shapes = engine, request, shapes
        self.module: Any = checkpoint.model
        self.model = _described(checkpoint)
        self.windows = _verification_windows(self.model, shapes)
        self._packages = packages

    def checkpoint_losses(self) -> Losses:
        """Return PyTorch's losses with a float64 log-softmax, each window alone, unpadded."""
        return np.concatenate([window_nll(self.module, window.ids_T) for window in self.windows])

    def program_losses(self, run: RunProgram, *, masked: bool = False) -> Losses:
        """Return the program's own losses, or those of its logits; see `ProgramCalls`."""
        calls = ProgramCalls(run, self.shapes, masked=masked)
        if self.request.perplexity:
            return np.concatenate(calls.nll(self.windows)).astype(np.float64)
        rows = calls.logit_rows(self.windows)
        return np.concatenate([_nll_of_rows(r, w) for r, w in zip(rows, self.windows, strict=True)])

    def record(
        self,
        folder: Path,
        verification: ProgramVerification,
        *,
        made_by: dict[str, str] | None = None,
        **changes: Any,
    ) -> ProgramMetadata:
        """Return the record of the finished program in `folder`.

        made_by: more than the packages' versions. changes: fields of ProgramMetadata, where they
        are not those of a float32 program whose head makes `rows_at_a_time` rows of logits.
        """
        versions = {name: metadata.version(name) for name in self._packages}
        fields: dict[str, Any] = {
            "engine": self.engine,
            "perplexity": self.request.perplexity,
            "dtype": "float32",
            "opset": 0,
            "shapes": self.shapes,
            "model": self.model,
            "memory": _memory_of(self.module),
            "verification": verification,
            "files": files_of(folder),
            "made_by": {"perplexit": __version__, **versions, **(made_by or {})},
        }
        if self.request.perplexity:
            fields["head_rows"] = rows_at_a_time(self.model.vocab_size)
        return ProgramMetadata(**(fields | changes))


def _described(checkpoint: Checkpoint) -> ProgramModel:
    model: Any = checkpoint.model
    config = model.config.get_text_config()
    return ProgramModel(
        address=checkpoint.source.address,
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_fingerprint=checkpoint.source.fingerprint,
        vocab_size=int(config.vocab_size),
        max_length=getattr(config, "max_position_embeddings", None),
    )


def _memory_of(model: Any) -> ProgramMemory:
    """Estimate what a window costs while a float32 program runs."""
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # a dozen hidden-sized tensors and three of the feed-forward's are alive at a time, and three
    # copies of the attention scores
    return ProgramMemory(4 * (12 * hidden + 3 * inner), 4 * 3 * int(config.num_attention_heads))


def _verification_windows(model: ProgramModel, shapes: ProgramShapes) -> list[WindowIds]:
    """Return a few windows of random ids (the same every time) that fit the program's shapes."""
    longest = min(shapes.length or _LENGTHS[0], model.max_length or _LENGTHS[0])
    random = np.random.default_rng(0)
    windows = []
    for index, length in enumerate(_LENGTHS):
        ids_T = random.integers(0, model.vocab_size, size=min(length, longest)).astype(np.int32)
        windows.append(WindowIds(index, ids_T, np.arange(1, len(ids_T), dtype=np.int64)))
    return windows


def window_nll(model: Any, ids_T: NDArray[np.int32]) -> Losses:
    """Return the nll of each id but the first, by one forward pass and a float64 log-softmax."""
    ids = torch.from_numpy(ids_T.astype(np.int64))
    with torch.inference_mode():
        logprobs_TV = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        logprobs_TV = logprobs_TV.log_softmax(-1)
        nll: Losses = -logprobs_TV.gather(1, ids[1:, None])[:, 0].numpy()
    return nll


def verified(
    losses: Losses, reference: Losses, against: str = IN_FLOAT32, *, tolerance: float = TOLERANCE
) -> ProgramVerification:
    """Return the record of the comparison.

    Raises CompilationError where a loss is more than `tolerance` nats from the reference.
    """
    difference = float(np.abs(losses - reference).max())
    if not difference <= tolerance:  # NaN too
        raise CompilationError(
            f"expected the program's losses within {tolerance} nats of {against}, got a difference "
            f"of {difference:.3g}; evaluate the checkpoint with PyTorch instead (hf:…)"
        )
    return ProgramVerification(against, len(losses), difference)


def check_changed(losses: Losses, full_precision: Losses, precision: str) -> None:
    """Raise QuantizationError where quantized weights give the full-precision losses."""
    change = float(np.abs(losses - full_precision).max())
    if not change >= _LEAST_CHANGE:
        raise QuantizationError(
            f"expected {precision} weights to change the losses, got the full-precision ones "
            f"(largest difference {change:.1e} nats); compile without a quantization"
        )


def verified_change(
    losses: Losses, reference: Losses, full_precision: Losses, precision: str
) -> ProgramVerification:
    """Return the record of what a quantization changed.

    Raises QuantizationError where it changed nothing, CompilationError where the losses are noise.
    """
    check_changed(losses, full_precision, precision)
    if not abs(float((losses - reference).mean())) <= _MEAN_TOLERANCE:  # NaN too
        raise CompilationError(
            f"expected {precision} weights to cost at most {_MEAN_TOLERANCE} nats a token on "
            f"random ids, got {float((losses - reference).mean()):.3g}; choose more bits"
        )
    against = f"{IN_FLOAT32}, which the {precision} weights stand in for"
    return ProgramVerification(against, len(losses), float(np.abs(losses - reference).max()))


def _nll_of_rows(rows_NV: NDArray[np.float32], window: WindowIds) -> Losses:
    ids_N = window.ids_T[window.targets_N]
    shifted_NV = rows_NV.astype(np.float64)
    shifted_NV -= shifted_NV.max(-1, keepdims=True)
    nll: Losses = np.log(np.exp(shifted_NV).sum(-1)) - shifted_NV[np.arange(len(ids_N)), ids_N]
    return nll
