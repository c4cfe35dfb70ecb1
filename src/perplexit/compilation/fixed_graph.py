"""A checkpoint as a module of fixed sizes: explicit masks and positions, the head in chunks.

For compilers that want every size: what depends on them alone becomes a constant.
Shape suffixes: B = windows, T = ids per window, N = targets of a call (B · (T − 1)), C = rows of
logits alive at a time, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.compilation.body_and_head import LogitsProgram, check_rotary, rows_at_a_time
from perplexit.compilation.compiler_errors import stated_by
from perplexit.errors import UsageError
from perplexit.program_record import ProgramShapes

DEFAULT_BATCH_SIZE, DEFAULT_LENGTH = 1, 512
_SUMMED_AT_ONCE = 256


def fixed_shapes(asked: ProgramShapes, model: Any) -> ProgramShapes:
    """Return the sizes asked for; one window of 512 ids (or of all that the model takes) otherwise.

    Raises UsageError for windows longer than the model was made for.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and (asked.length or 0) > longest:
        raise UsageError(
            f"expected windows of at most {longest} ids, which is what the model was made for, got "
            f"--max-length {asked.length}"
        )
    length = asked.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    batch = asked.batch_size or DEFAULT_BATCH_SIZE
    return ProgramShapes(batch, length, batch * (length - 1))


class FixedLogits(LogitsProgram):
    """Ids_BT → logits_BTV; B and T are the shapes', every window starts at position 0."""

    def __init__(self, model: Any, shapes: ProgramShapes) -> None:
        super().__init__(model)
        model.set_attn_implementation("eager")
        config = model.config.get_text_config()
        batch, length = shapes.batch_size or 1, shapes.length or 2
        self.register_buffer("positions_BT", torch.arange(length).expand(batch, length).clone())
        causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
        self.register_buffer("causal", _additive(causal_TT))
        reach = int(getattr(config, "sliding_window", None) or 0)
        kinds = set(getattr(config, "layer_types", None) or ())
        self.by_kind = reach > 0 and "sliding_attention" in kinds
        if self.by_kind:
            self.register_buffer("sliding", _additive(causal_TT & ~causal_TT.tril(-reach)))

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Map (B, T) → (B, T, D)."""
        mask: Any = self.causal
        if self.by_kind:
            mask = {"full_attention": self.causal, "sliding_attention": self.sliding}
        return self.body(input_ids, mask, position_ids=self.positions_BT)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T) → (B, T, V)."""
        return self.head(self.hidden_states(input_ids))  # type: ignore[no-any-return]


class FixedLoss(FixedLogits):
    """Ids_BT, target rows_N and ids_N → nll_N; C rows of logits are alive at a time."""

    def __init__(self, model: Any, shapes: ProgramShapes) -> None:
        super().__init__(model, shapes)
        self.num_targets = shapes.num_targets or 1
        self.rows = rows_at_a_time(int(model.config.get_text_config().vocab_size))

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, target_rows: Tensor, target_ids: Tensor
    ) -> Tensor:
        """Map (B, T), (N), (N) → (N)."""
        hidden_ND = self.hidden_states(input_ids).flatten(0, 1)
        nll = []
        for start in range(0, self.num_targets, self.rows):
            rows_C = target_rows[start : start + self.rows]
            ids_C = target_ids[start : start + self.rows]
            logits_CV = self.head(hidden_ND.index_select(0, rows_C)[None])[0]
            logprobs_CV = logits_CV.log_softmax(-1)
            target_C = logprobs_CV.gather(-1, ids_C[:, None])[:, 0]
            nll.append(_log_of_total(logprobs_CV) - target_C)
        return torch.cat(nll)


def _log_of_total(logprobs_CV: Tensor) -> Tensor:
    """Return the log of the probabilities' sum, (C, V) → (C): 0, but for what the engine lost.

    A compiler's plain float32 loop over 49,152 terms loses those far below its sum, always to the
    same side: 1.5e-4 nats a token in the log-softmax. Sums of 256 terms lose 1e-6.
    """
    p_CV = logprobs_CV.exp()
    parts = p_CV.shape[-1] // _SUMMED_AT_ONCE
    whole = parts * _SUMMED_AT_ONCE
    total_C = p_CV[:, :whole].reshape(p_CV.shape[0], parts, _SUMMED_AT_ONCE).sum(-1).sum(-1)
    if whole < p_CV.shape[-1]:
        total_C = total_C + p_CV[:, whole:].sum(-1)
    return torch.log(total_C)


def exported_fixed(model: Any, shapes: ProgramShapes, *, perplexity: bool) -> Any:
    """Return the `torch.export` program of FixedLoss or FixedLogits. Raises CompilationError."""
    check_rotary(model, shapes)
    model.eval().requires_grad_(False)
    module = (FixedLoss if perplexity else FixedLogits)(model, shapes)
    batch, length = shapes.batch_size or 1, shapes.length or 2
    ids_BT = torch.arange(batch * length).reshape(batch, length) % 7
    targets_N = torch.arange(shapes.num_targets or 1) % 7
    inputs = (ids_BT, targets_N, targets_N.clone()) if perplexity else (ids_BT,)
    stated = stated_by("PyTorch can export", logger="accelerate")
    with stated, torch.no_grad(), quiet_transformers():
        return torch.export.export(module.eval(), inputs, strict=False)


def _additive(seen_TT: Tensor) -> Tensor:
    """Return 0 where an id is seen, the lowest float32 where it is not, (1, 1, T, T)."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen_TT.shape).masked_fill(~seen_TT, lowest)[None, None]
