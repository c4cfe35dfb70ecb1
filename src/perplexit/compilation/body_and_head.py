"""A transformers model as body and head, so that a program can work on the head in chunks.

Shape suffixes: B = windows, T = ids per window, D = hidden size, V = vocabulary, C = rows of logits
alive at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope
from perplexit.checkpoints.module_call import without_layers
from perplexit.errors import CompilationError
from perplexit.program_record import ProgramShapes

_HEAD_LOGITS_BYTES = 16 * 2**20
_LONGEST = 2**24  # ids: more than any window has
_FEWEST_ROWS, _MOST_ROWS = 32, 256  # below, the head's weights are read too often; above, no gain


def rows_at_a_time(
    vocab_size: int, *, logits_bytes: int = _HEAD_LOGITS_BYTES, most: int = _MOST_ROWS
) -> int:
    """Return how many rows of float32 logits the head inside a program makes at a time.

    At least 32 and at most `most`, in sixteens, of `logits_bytes` together.
    """
    rows = logits_bytes // (4 * vocab_size)
    return max(_FEWEST_ROWS, min(most, rows // 16 * 16))


def check_rotary(model: Any, shapes: ProgramShapes) -> None:
    """Refuse a model of other rotary frequencies for windows of other lengths, as programs pad.

    Raises CompilationError unless the program's length is fixed where all windows have the same.
    """
    rope = LengthDependentRope.of(model)
    if rope is None:
        return
    border = rope.border(shapes.length or _LONGEST)
    if border is None:
        rope.settle()
    else:
        raise CompilationError(
            f"expected a model whose RoPE is the same for every window, but that of "
            f"{type(model).__name__} ({rope.kinds}) changes for windows of more than {border} ids, "
            f"and a program pads; compile it with --max-length {border} or less, or evaluate the "
            "checkpoint with PyTorch (hf:…), which gives each window its own"
        )


@contextmanager
def exportable_attention(model: Any) -> Iterator[None]:
    """Use SDPA, one operator, inside the block; eager where SDPA omits a soft-cap or sinks."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None:
        with suppress(ValueError):  # transformers: this model has no SDPA
            model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


class Body(nn.Module):
    """Ids_BT → the hidden states_BTD that the head reads; right padding needs no mask.

    No id sees one after it, so what is padded on the right changes nothing before it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = model.base_model

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **given: Any) -> Tensor:
        """Map (B, T) → (B, T, D). given: more for the model's own forward."""
        if attention_mask is None:  # without any, transformers looks for windows packed in one row
            attention_mask = input_ids.new_ones(input_ids.shape)
        options = {"attention_mask": attention_mask, "use_cache": False, **given}
        return self.body(input_ids=input_ids, **options).last_hidden_state  # type: ignore[no-any-return]


class LogitsHead(nn.Module):
    """Hidden states → float32 logits, by the model's own `forward` without its body.

    So its soft-cap, scale and bias are there.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head = without_layers(model, model.base_model_prefix)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Map (B, T, D) → (B, T, V)."""
        return self.head(inputs_embeds=hidden_BTD, use_cache=False).logits.float()  # type: ignore[no-any-return]


class LogitsProgram(nn.Module):
    """Ids_BT and their mask → logits_BTV: body and head one after the other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = Body(model), LogitsHead(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map (B, T) and (B, T) → (B, T, V)."""
        return self.head(self.body(input_ids, attention_mask))  # type: ignore[no-any-return]


def halve_body(model: Any) -> None:
    """Turn the body's weights to float16 in place; the head keeps its own, and gets float32 rows.

    A head that shares the embedding's weights keeps a float32 copy of them. Buffers (rotary
    frequencies) stay float32, as in a checkpoint that transformers loads in float16.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().float().clone(), requires_grad=False)
    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.to(torch.float16)
    head.register_forward_pre_hook(_widened)


def _widened(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = arguments
    return (hidden.float(), *rest)
