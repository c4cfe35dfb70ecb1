"""A forward pass whose layers `torch.compile` has compiled, fed in few shapes.

Shape suffixes: B = rows, T = ids of a row, X = what the forward pass gives a position.
"""

import torch
from torch import Tensor, nn

from perplexit.checkpoints.module_call import Past, plain_output
from perplexit.errors import CapabilityError, UsageError
from perplexit.functional.fused_head import CompiledHead, FusedHead, cannot_compile
from perplexit.sessions.pytorch.forward import ForwardPass, WrappedForward
from perplexit.sessions.pytorch.forward_probe import same_head

COMPILE_MODES = ("default", "reduce-overhead")
HEADS = ("chunked", "compiled", "liger", "cce")
_NO_CACHE = "compiled layers take no key/value cache; leave --compile out, or use --mode full"
_MOST_SHAPES = 64  # programs kept; beyond, torch would quietly run a shape uncompiled


class CompiledForward(WrappedForward):
    """The layers compiled; the head, and a pass with a cache, as they were.

    mode: "default", or "reduce-overhead", which replays CUDA graphs and so exists on CUDA alone.
    Batches are padded up to one of a few shapes, each with a program (and a graph) of its own:
    on the right, where a causal model's earlier predictions do not see it.
    """

    def __init__(self, inner: ForwardPass, mode: str, device: torch.device) -> None:
        if mode not in COMPILE_MODES:
            raise UsageError(f"expected --compile {' or '.join(COMPILE_MODES)}, got {mode!r}")
        if mode == "reduce-overhead" and device.type != "cuda":
            raise CapabilityError(
                f"--compile reduce-overhead records CUDA graphs, got the device {device}; use "
                "--compile default"
            )
        super().__init__(inner, why_no_cache=_NO_CACHE)
        self._graphs = mode == "reduce-overhead"
        self._rows = torch.compile(inner.rows, mode=mode)
        self.head = inner.head

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return the inner rows, by the compiled program of the batch's shape."""
        if past is not None:
            raise CapabilityError(_NO_CACHE)
        num_rows, length = ids_BT.shape
        to_rows, to_length = bucket(num_rows), bucket(length)
        if self._graphs:  # what the last replay returned has been copied out of its buffer
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            # A graph that was recorded under inference mode keeps a random state which no graph
            # outside can use any more: a loaded model's session and a handed-in one's would clash.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES),
            ):
                rows_BTX: Tensor = self._rows(
                    _grown(ids_BT, to_rows, to_length), _grown_mask(mask_BT, to_rows, to_length)
                )
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise cannot_compile(error) from error
            raise
        return rows_BTX[:num_rows, :length]


def bucket(size: int) -> int:
    """Return the next size with at most four significant bits: at most an eighth more."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _grown(ids_BT: Tensor, num_rows: int, length: int) -> Tensor:
    """Pad on the right with each row's last id, and below with the first row."""
    right_BT = ids_BT[:, -1:].expand(-1, length - ids_BT.shape[1])
    wide_BT = torch.cat([ids_BT, right_BT], dim=1)
    return torch.cat([wide_BT, wide_BT[:1].expand(num_rows - len(wide_BT), -1)])


def _grown_mask(mask_BT: Tensor | None, num_rows: int, length: int) -> Tensor | None:
    """Pad on the right with 0, and below with the first row."""
    if mask_BT is None:
        return None
    wide_BT = torch.nn.functional.pad(mask_BT, (0, length - mask_BT.shape[1]))
    return torch.cat([wide_BT, wide_BT[:1].expand(num_rows - len(wide_BT), -1)])


class HeadedForward(WrappedForward):
    """A forward pass with another way from hidden states to per-token results."""

    def __init__(self, inner: ForwardPass, head: CompiledHead | FusedHead, kind: str) -> None:
        reason = None
        if isinstance(head, FusedHead):
            reason = (
                f"the head {head.name!r} gives no entropy, which a cached run keeps for every "
                "token; leave --head out, or use --mode full"
            )
        super().__init__(inner, why_no_cache=reason)
        self.kind, self.head = kind, head
        self.library = head.library if isinstance(head, FusedHead) else None


def with_head(
    forward: ForwardPass, name: str | None, module: nn.Module, device: torch.device
) -> ForwardPass:
    """Return the forward pass with the head of that name, one of HEADS; None is "chunked".

    Raises UsageError for another name, CapabilityError where the kernel cannot do what this
    model does after its layers, MissingPackageError.
    """
    if name is None or name == "chunked":
        return forward
    if name == "compiled":
        head = CompiledHead(forward.head, device)
        return HeadedForward(forward, head, f"{forward.kind}, compiled log-sum-exp")
    if name not in HEADS:
        raise UsageError(f"expected --head {', '.join(HEADS)}, got {name!r}")
    linear = plain_output(module)
    if linear is None or not _is_product(forward, linear):
        raise CapabilityError(
            f"the head {name!r} computes a plain product of hidden states and weights, but "
            f"{type(module).__name__} (whose head is {forward.kind!r}) does more or something "
            "else after its layers; leave --head out, or choose compiled"
        )
    fused = FusedHead(name, linear.weight, linear.bias)
    return HeadedForward(forward, fused, f"{name} (fused)")


def _is_product(forward: ForwardPass, linear: nn.Linear) -> bool:
    """Return whether the head is that layer alone; a soft-cap shows far from zero."""
    if forward.keeps_logits:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(8, linear.in_features, generator=generator).to(linear.weight)
    return same_head(forward.head, linear, hidden_ND, (1e-5, 2e-2))
