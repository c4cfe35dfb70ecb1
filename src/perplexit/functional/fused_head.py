"""Heads that give per-token results themselves: fused kernels, and a compiled log-sum-exp.

Both stand in for `token_statistics(head(hidden_ND), targets_N)`; see `nll.ScoringHead`.

Shape suffixes: N = targets, D = hidden size, V = vocabulary, K = alternatives.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from perplexit.errors import CapabilityError, needing
from perplexit.functional.nll import HeadRequest, TokenStatistics, slices_of_rows

# (weight, hidden, targets, bias) → nll; logits exist for some rows, or tiles, at a time.
LinearNll = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


# Libraries with a linear cross-entropy: what each is imported as, and how one gets it.
KERNELS = {
    "liger": ("liger_kernel", "pip install 'perplexit[liger]'"),
    "cce": (
        "cut_cross_entropy",
        "pip install cut-cross-entropy (Apple's own licence; read it first)",
    ),
}


def fused_kernel(name: str, device: torch.device) -> LinearNll:
    """Return the library's function behind `name`, one of KERNELS, for tensors on `device`.

    Triton's interpreter (TRITON_INTERPRET=1) runs Liger's kernels on the CPU, for tests alone.
    Raises CapabilityError off CUDA, MissingPackageError with the command that installs it.
    """
    _, install = KERNELS[name]
    interpreted = name == "liger" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise CapabilityError(
            f"the head {name!r} is made of CUDA kernels, got the device {device}; leave --head "
            "out, or choose compiled"
        )
    with needing(f"the head {name!r}", install):  # the one lazy door to these libraries
        if name == "liger":
            ops = import_module("liger_kernel.ops")
            return partial(_liger_nll, ops.LigerFusedLinearCrossEntropyFunction)
        return partial(_cut_nll, import_module("cut_cross_entropy").linear_cross_entropy)


def _liger_nll(
    function: Any, weight_VD: Tensor, hidden_ND: Tensor, targets_N: Tensor, bias_V: Tensor | None
) -> Tensor:
    """Call Liger-Kernel: rows in chunks, each chunk's logits overwritten.

    Logits are rounded to the hidden states' dtype, as in the model's own forward, and summed in
    float32. Detached tensors keep it from making gradients in the forward pass, as it would for
    parameters.
    """
    bias_V = None if bias_V is None else bias_V.detach()
    # Positions: ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction.
    rest = (None, -100, 0.0, 0.0, "none")
    nll_N: Tensor = function.apply(
        hidden_ND.detach(), weight_VD.detach(), targets_N, bias_V, *rest
    )[0]
    return nll_N


def _cut_nll(
    function: Any, weight_VD: Tensor, hidden_ND: Tensor, targets_N: Tensor, bias_V: Tensor | None
) -> Tensor:
    """Call Cut Cross-Entropy: tiles of logits in registers, log-sum-exp in float32."""
    options = {} if bias_V is None else {"bias": bias_V.detach()}
    nll_N: Tensor = function(
        hidden_ND.detach(), weight_VD.detach(), targets_N, reduction="none", impl="cce", **options
    )
    return nll_N


class FusedHead:
    """A linear head whose nll a library computes without whole logits; nothing but the nll."""

    def __init__(self, name: str, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self.name = name
        self._nll = fused_kernel(name, weight_VD.device)
        package, _ = KERNELS[name]
        self.library = f"{package} {_version(package)}"
        self._weight_VD, self._bias_V = weight_VD, bias_V

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return plain logits, for callers that need distributions."""
        return torch.nn.functional.linear(hidden_ND, self._weight_VD, self._bias_V)

    def statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        """Return the nll, without entropy and rank. The library chooses its own chunks."""
        if request.top_k:
            raise CapabilityError(
                f"--top-k {request.top_k} needs whole distributions, but the head {self.name!r} "
                "gives the loss of each target alone; leave --head or --top-k out"
            )
        nll_N = self._nll(self._weight_VD, hidden_ND.contiguous(), targets_N, self._bias_V)
        return TokenStatistics({"nll": nll_N.float()})


def _version(package: str) -> str:
    distributions = metadata.packages_distributions().get(package, [package])
    try:
        return metadata.version(distributions[0])
    except metadata.PackageNotFoundError:
        return "of unknown version"


class CompiledHead:
    """Any head's logits, reduced by one kernel that `torch.compile` makes: one pass, no copies.

    Raises CapabilityError where nothing can be compiled here.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._head = head
        self._reduced = torch.compile(_reduced)
        try:
            zero_NV = torch.zeros(2, 16, device=device)
            self._reduced(zero_NV, torch.zeros(2, 1, dtype=torch.int64, device=device))
        except RuntimeError as error:
            raise cannot_compile(error) from error

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return the inner head's logits."""
        return self._head(hidden_ND)

    def statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        """Return nll, entropy and rank by chunks; all three are computed: the bits are the same."""
        parts = [
            self._chunk(hidden_ND[rows], targets_N[rows, None], request)
            for rows in slices_of_rows(len(hidden_ND), request.chunk_rows)
        ]
        return TokenStatistics.joined(parts)

    def _chunk(
        self, hidden_ND: Tensor, targets_N1: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        logits_NV = self._head(hidden_ND)
        nll_N, entropy_N, rank_N, log_total_N1 = self._reduced(logits_NV, targets_N1)
        if not request.with_details:
            return TokenStatistics({"nll": nll_N})
        columns = {"nll": nll_N, "entropy": entropy_N, "rank": rank_N}
        if request.top_k:
            top = logits_NV.topk(min(request.top_k, logits_NV.shape[-1]), dim=-1)
            columns["top_ids"] = top.indices.int()
            columns["top_logprobs"] = top.values.to(nll_N.dtype) - log_total_N1
        return TokenStatistics(columns)


def _reduced(logits_NV: Tensor, targets_N1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (nll_N, entropy_N, rank_N, log Σ exp logits, N1); formulas in `functional.nll`."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    largest_N1 = wide_NV.amax(-1, keepdim=True)
    shifted_NV = wide_NV - largest_N1
    odds_NV = shifted_NV.exp()
    sum_N = odds_NV.sum(-1)
    log_sum_N = sum_N.log()
    target_N1 = wide_NV.gather(1, targets_N1)
    nll_N = log_sum_N - (target_N1 - largest_N1)[:, 0]
    # Where a token is at -inf, 0 · -inf has the limit 0; a NaN elsewhere stays one.
    terms_NV = torch.where(odds_NV == 0, 0.0, odds_NV * shifted_NV)
    entropy_N = log_sum_N - terms_NV.sum(-1) / sum_N
    rank_N = (wide_NV > target_N1).sum(-1).int() + 1
    return nll_N, entropy_N, rank_N, largest_N1 + log_sum_N[:, None]


def cannot_compile(error: BaseException) -> CapabilityError:
    """Return the error to raise where `torch.compile` fails: mostly a compiler is missing."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CapabilityError(
        f"torch.compile fails here ({reason[:200]}); it needs a C++ compiler on the CPU and "
        "Triton on CUDA. Install one, or leave --compile and --head compiled out"
    )
