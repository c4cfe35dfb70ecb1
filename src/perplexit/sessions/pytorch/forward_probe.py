"""The search for the leanest forward pass that gives a loaded model's own logits.

The final hidden states go through the model's own head a chunk at a time: its own forward runs
over a stub that returns given hidden states in place of the layers, so a soft-cap, a scale or a
late norm is never left out. Whether that gives the model's logits is checked on the loaded model;
where it does not, the whole forward pass is used, and `kind` says so.

Shape suffixes: B = batch, T = ids of a row, N = rows picked for the head, D = hidden size,
V = vocabulary, X = D or V.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.checkpoints.module_call import field_of, plain_output, position_limit, without_layers
from perplexit.errors import ModelError
from perplexit.sessions.pytorch.forward import ChunkedForward, ForwardPass, LinearHead, WholeForward

_PROBE_LENGTH = 8
_IDS = 24  # of a row: more than a tiny index or window holds, and quick
# Of the largest value, in float32 or float64 and in narrower dtypes.
ALIKE, _LOOSELY_ALIKE = (1e-5, 1e-2), (1e-3, 1.0)
# Rounding in another order stays below; a nll must be right within 1e-4.
_IN_ANOTHER_ORDER = (2e-4, 0.2)
NOT_REPEATABLE = (
    "expected a model that gives the same for the same ids, but its predictions change from call "
    "to call (something in it is drawn at random, or it remembers earlier calls); its perplexity "
    "is no fixed number, so it is not scored"
)


def find_forward(
    model: nn.Module, id_limit: int, *, row_by_row: bool = True, blocked_head: bool = True
) -> tuple[ForwardPass, int]:
    """Find the leanest forward pass that gives the model's own logits, and how many logits it has.

    Tried on a few fixed ids below `id_limit`, with and without padding.
    row_by_row: False where the layers round a whole batch's activations together, as LLM.int8()
    does: then later ids change earlier predictions a little even in a causal model.
    blocked_head: see LinearHead.
    Raises ModelError where they do otherwise: the model is not causal.
    """
    found: ForwardPass = WholeForward(model)
    probe = _Probe.of(found, id_limit, _device_of(model), causal=row_by_row)
    for body, own_head in _splits(model):
        chunked = ChunkedForward(body, own_head, "chunked (own forward)")
        if probe.agrees(chunked):
            linear = _unhooked_output(model)
            if linear is not None:
                hidden_ND = chunked.rows(probe.ids_BT, None).flatten(0, 1)
                if same_head(chunked.head, LinearHead(linear), hidden_ND):
                    head = LinearHead(linear, blocked=blocked_head)
                    chunked = ChunkedForward(body, head, "chunked (linear)")
            found = chunked
            break
    if row_by_row:
        found.alone = _depends_on_others(found, model, id_limit)
    return found, probe.vocab_size


def _depends_on_others(forward: ForwardPass, model: nn.Module, id_limit: int) -> bool:
    """Return whether rows change with what else is in the batch, with padding, or with length.

    Raises ModelError where the same call gives something else the second time.
    """
    length = min(_IDS, position_limit(model) or _IDS)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(id_limit, (2, length), generator=generator).to(_device_of(model))
    part = max(1, 2 * length // 3)
    with held_at(LengthDependentRope.of(model), length):
        first_BTX = forward.rows(ids_BT[:1], None)
        again_BTX = forward.rows(ids_BT[:1], None)
        if not _near(first_BTX, again_BTX, _IN_ANOTHER_ORDER):
            raise ModelError(NOT_REPEATABLE)
        both_BTX = forward.rows(ids_BT, None)
        short_BTX = forward.rows(ids_BT[:1, :part], None)
        changes = [(first_BTX, both_BTX[:1]), (first_BTX[:, :part], short_BTX)]
        if forward.takes_mask:
            mask_BT = torch.ones_like(ids_BT)
            mask_BT[0, part:] = 0
            padded_BTX = forward.rows(ids_BT, mask_BT)
            changes.append((first_BTX[:, :part], padded_BTX[:1, :part]))
    return not all(_near(one, other, _IN_ANOTHER_ORDER) for one, other in changes)


@dataclass(frozen=True)
class _Probe:
    """Fixed random ids, and the logits that the whole forward pass gives for them."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    plain_BTV: Tensor
    padded_BTV: Tensor

    @classmethod
    def of(
        cls, whole: ForwardPass, id_limit: int, device: torch.device, *, causal: bool
    ) -> "_Probe":
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(id_limit, (2, _PROBE_LENGTH), generator=generator)
        changed_BT = ids_BT.clone()
        half = _PROBE_LENGTH // 2
        changed_BT[:, half:] = (ids_BT[:, half:] + 1 + id_limit // 2) % id_limit
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, half:] = 0
        mask = mask_BT.to(device) if whole.takes_mask else None
        ids_BT = ids_BT.to(device)
        plain_BTV = whole.rows(ids_BT, None)
        if plain_BTV.shape[:2] != ids_BT.shape:
            raise ModelError(
                f"expected logits of shape (batch, length, vocabulary) for ids of shape "
                f"{tuple(ids_BT.shape)}, got {tuple(plain_BTV.shape)}"
            )
        changed_BTV = whole.rows(changed_BT.to(device), None) if causal else plain_BTV
        if not _near(plain_BTV[:, :half], changed_BTV[:, :half], _LOOSELY_ALIKE):
            if not _near(plain_BTV, whole.rows(ids_BT, None), _LOOSELY_ALIKE):
                raise ModelError(NOT_REPEATABLE)
            raise ModelError(
                "expected a causal language model, but a later id changes an earlier prediction; "
                "perplexity is defined for models that see the past alone"
            )
        return cls(ids_BT, mask, plain_BTV, whole.rows(ids_BT, mask))

    @property
    def vocab_size(self) -> int:
        return self.plain_BTV.shape[-1]

    def agrees(self, candidate: ForwardPass) -> bool:
        """Return whether a candidate gives the same logits; one that fails does not."""
        try:
            pairs: list[tuple[Tensor, Tensor | None]] = [(self.plain_BTV, None)]
            if self.mask_BT is not None:
                pairs.append((self.padded_BTV, self.mask_BT))
            for whole_BTV, mask_BT in pairs:
                rows_BTX = candidate.rows(self.ids_BT, mask_BT)
                logits_NV = candidate.head(rows_BTX.flatten(0, 1))
                if not _near(whole_BTV.flatten(0, 1), logits_NV, ALIKE):
                    return False
        except Exception:  # whatever an unknown architecture raises over a stub: it has no split
            return False
        return True


def same_head(
    head: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    tolerance: tuple[float, float] = ALIKE,
) -> bool:
    """Return whether a plain product gives what a model's head gives, also far from zero.

    Near zero a soft-cap changes nothing: a thousandfold hidden state tells it apart.
    """
    scaled = (hidden_ND, hidden_ND * 1000.0)
    return all(_near(head(states_ND), linear(states_ND), tolerance) for states_ND in scaled)


def _splits(model: nn.Module) -> Iterator[tuple[nn.Module, "_OwnForwardHead"]]:
    """Yield the places where a model can be cut into layers and head; OPT has the second."""
    prefix = getattr(model, "base_model_prefix", "")
    for path in (prefix, f"{prefix}.decoder"):
        body = _submodule(model, path)
        if body is not None:
            yield body, _OwnForwardHead(model, path)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        return None
    return None if module is model else module


def _unhooked_output(model: nn.Module) -> nn.Linear | None:
    """Return the model's output layer where it is a plain linear one without hooks."""
    layer = plain_output(model)
    if layer is None or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    return None if hasattr(layer, "_hf_hook") else layer  # its weights may be elsewhere


class _OwnForwardHead:
    """The model's own forward over a stub: whatever it does after its layers is done here too."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model = without_layers(model, path)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        output = self._model(inputs_embeds=hidden_ND[None], use_cache=False)
        return field_of(output, "logits")[0]


def _near(expected: Tensor, got: Tensor, tolerance: tuple[float, float]) -> bool:
    """Return whether both are equal up to rounding; NaN equals NaN.

    tolerance: of the largest value, in float32 or float64 and in narrower dtypes.
    """
    if expected.shape != got.shape:
        return False
    exact, narrow = tolerance
    part = exact if expected.dtype in (torch.float32, torch.float64) else narrow
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0
    return torch.allclose(expected, got.to(expected), rtol=0, atol=part * scale, equal_nan=True)


def _device_of(module: nn.Module) -> torch.device:
    devices = (tensor.device for tensor in (*module.parameters(), *module.buffers()))
    return next((x for x in devices if x.type != "meta"), torch.device("cpu"))
