"""The divergences between two distributions of each token.

Shape suffixes: N = targets, V = vocabulary, K = how many top tokens are compared.

The naive equivalent, with p the reference and q the candidate:

    kl_N         = (p_NV * (log p_NV - log q_NV)).sum(-1)          KL(reference ‖ candidate), nats
    reverse_kl_N = (q_NV * (log q_NV - log p_NV)).sum(-1)          KL(candidate ‖ reference), nats
    js_N         = (KL(p ‖ m) + KL(q ‖ m)) / 2,  m = (p + q) / 2   Jensen–Shannon, nats, ≤ ln 2
    delta_p_N    = q(target) - p(target)

Sources: Kullback & Leibler 1951; Lin 1991 (Jensen–Shannon); Δp as llama.cpp's perplexity tool.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perplexit.functional.nll import TokenStatistics, slices_of_rows

_BLOCK_ELEMENTS = 1 << 18  # 2 MiB of float64


def token_divergences(
    reference_NV: Tensor, candidate_NV: Tensor, targets_N: Tensor, *, top_k: int = 10
) -> TokenStatistics:
    """Return the divergence columns of two sets of logits for the same targets.

    `kl`, `reverse_kl` and `js` are float64 in nats, never negative, from float32 logits.
    top_k: how many of the most likely tokens `top_k_agreement` looks at.

    Each term of a KL sum is taken as p·(e^d - 1 - d) with d = log q - log p, which is the same sum
    (both distributions add up to 1), has no negative term, and is exactly 0 for equal logits.
    """
    parts = [
        _block_divergences(
            reference_NV[rows].double(), candidate_NV[rows].double(), targets_N[rows, None], top_k
        )
        for rows in blocks_of(reference_NV)
    ]
    return TokenStatistics.joined(parts)


def blocks_of(logits_NV: Tensor) -> list[slice]:
    """Return slices of rows, each of at most 2 MiB of float64 logits, or one row."""
    size = max(1, _BLOCK_ELEMENTS // logits_NV.shape[-1])
    return slices_of_rows(len(logits_NV), size)


def _block_divergences(
    reference_NV: Tensor, candidate_NV: Tensor, targets_N1: Tensor, top_k: int
) -> TokenStatistics:
    logp_NV = reference_NV.log_softmax(-1)
    logq_NV = candidate_NV.log_softmax(-1)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    logm_NV = torch.logaddexp(logp_NV, logq_NV) - math.log(2)
    k = min(top_k, reference_NV.shape[-1])
    top_p, top_q = logp_NV.topk(k, dim=-1), logq_NV.topk(k, dim=-1)
    shared_N = (top_p.indices[:, :, None] == top_q.indices[:, None, :]).any(-1).float().mean(-1)
    delta_p_N = (q_NV.gather(1, targets_N1) - p_NV.gather(1, targets_N1))[:, 0]
    return TokenStatistics(
        {
            "kl": kl_of_logs(logp_NV, logq_NV, p_NV),
            "reverse_kl": kl_of_logs(logq_NV, logp_NV, q_NV),
            "js": (kl_of_logs(logp_NV, logm_NV, p_NV) + kl_of_logs(logq_NV, logm_NV, q_NV)) / 2,
            "same_top1": top_p.indices[:, 0] == top_q.indices[:, 0],
            "top_k_agreement": shared_N,
            "delta_p": delta_p_N.float(),
            "reference_top_p": top_p.values[:, 0].exp().float(),
        }
    )


def kl_of_logs(logp_NV: Tensor, logq_NV: Tensor, p_NV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row from log-probabilities, with no negative term (see above).

    Where both are 0 (-inf) the term is 0.
    """
    d_NV = logq_NV - logp_NV
    # Where p is 0 the term is q, not 0 · inf; beyond d = 30, p·e^d is taken as q itself.
    near = torch.expm1(d_NV.clamp(max=30.0)).sub_(d_NV).mul_(p_NV)
    far = logq_NV.exp() - p_NV - p_NV * d_NV
    terms_NV = torch.where(d_NV > 30.0, far, near)
    terms_NV = torch.where(p_NV == 0, logq_NV.exp(), terms_NV)
    return terms_NV.sum(-1)


SMALLEST_TAIL = 1e-12  # float32 log-probabilities may add up to a little above 1


@dataclass(frozen=True, slots=True)
class PartialDistributions:
    """What is known of the reference's distributions for some targets.

    logp_NV:   float64 log-probabilities of the known tokens, -inf for those in the tail.
    tail_N:    float64, the tail's mass.
    cap_N:     float64, the largest probability that a token of the tail can have.
    num_known: how many of the most likely tokens are known at least.
    """

    logp_NV: Tensor
    tail_N: Tensor
    cap_N: Tensor
    num_known: int

    def part(self, rows: slice) -> "PartialDistributions":
        """Return some of the targets."""
        return PartialDistributions(
            self.logp_NV[rows], self.tail_N[rows], self.cap_N[rows], self.num_known
        )


def partial_divergences(
    reference: PartialDistributions, candidate_NV: Tensor, targets_N: Tensor, *, top_k: int = 10
) -> TokenStatistics:
    """Return the bounds above for candidate logits, in float64; `kl_high_N` is filled in.

    The top-k agreement is None where fewer than `top_k` tokens are known. The known part and the
    tail are scaled to a sum of 1.
    """
    parts = [
        _block(
            reference.part(rows),
            candidate_NV[rows].double().log_softmax(-1),
            targets_N[rows, None],
            top_k,
        )
        for rows in blocks_of(candidate_NV)
    ]
    return TokenStatistics.joined(parts)


def _block(
    reference: PartialDistributions, logq_NV: Tensor, targets_N1: Tensor, top_k: int
) -> TokenStatistics:
    known_NV = reference.logp_NV > -math.inf
    tail_N = reference.tail_N.clamp(min=SMALLEST_TAIL)
    tail_N = torch.where(known_NV.all(-1), torch.zeros_like(tail_N), tail_N)
    logp_NU = torch.cat([reference.logp_NV, tail_N.log()[:, None]], -1).log_softmax(-1)
    tail_logq_NV = logq_NV.masked_fill(known_NV, -math.inf)
    tail_logq_N = tail_logq_NV.logsumexp(-1)
    logq_NU = torch.cat([logq_NV.masked_fill(~known_NV, -math.inf), tail_logq_N[:, None]], -1)
    p_NU, q_NU = logp_NU.exp(), logq_NU.exp()
    logm_NU = torch.logaddexp(logp_NU, logq_NU) - math.log(2)
    kl_N = kl_of_logs(logp_NU, logq_NU, p_NU)
    excess_N = _largest_excess(tail_logq_NV, logp_NU[:, -1], tail_logq_N, reference.cap_N)
    return TokenStatistics(
        {
            "kl": kl_N,
            "reverse_kl": kl_of_logs(logq_NU, logp_NU, q_NU),
            "js": (kl_of_logs(logp_NU, logm_NU, p_NU) + kl_of_logs(logq_NU, logm_NU, q_NU)) / 2,
            "same_top1": reference.logp_NV.argmax(-1) == logq_NV.argmax(-1),
            "top_k_agreement": _agreement(reference, logq_NV, top_k),
            "delta_p": _delta_p(logp_NU, known_NV, logq_NV, targets_N1),
            "reference_top_p": logp_NU[:, :-1].max(-1).values.exp().float(),
            "kl_high": kl_N + excess_N,
        }
    )


def _largest_excess(
    tail_logq_NV: Tensor, log_tail_N: Tensor, tail_logq_N: Tensor, cap_N: Tensor
) -> Tensor:
    """Return how far the true KL can lie above the bucketed one: nats, 0 without a tail."""
    tail_N = log_tail_N.exp()
    in_tail_NV = tail_logq_NV > -math.inf
    num_tail_N = in_tail_NV.sum(-1)
    cap_N = torch.maximum(cap_N, tail_N / num_tail_N.clamp(min=1))  # rounding: as many as there are
    full_N = torch.minimum(torch.floor(tail_N / cap_N.clamp(min=SMALLEST_TAIL)), num_tail_N)
    count = min(int(full_N.max().item()) + 1, tail_logq_NV.shape[-1])
    least_NR = tail_logq_NV.masked_fill(~in_tail_NV, math.inf).topk(count, largest=False).values
    place_R = torch.arange(count)
    mass_NR = torch.where(place_R < full_N[:, None], cap_N[:, None], 0.0)
    rest_N = (tail_N - full_N * cap_N).clamp(min=0)
    mass_NR = torch.where(place_R == full_N[:, None], rest_N[:, None], mass_NR)
    used_NR = (mass_NR > 0) & (least_NR < math.inf)
    terms_NR = torch.where(used_NR, mass_NR * (mass_NR.log() - least_NR), 0.0)
    bucket_N = torch.where(tail_N > 0, tail_N * (log_tail_N - tail_logq_N), 0.0)
    return (terms_NR.sum(-1) - bucket_N).clamp(min=0)


def _agreement(reference: PartialDistributions, logq_NV: Tensor, top_k: int) -> Tensor | None:
    k = min(top_k, logq_NV.shape[-1])
    if reference.num_known < k:
        return None
    top_p = reference.logp_NV.topk(k, dim=-1).indices
    top_q = logq_NV.topk(k, dim=-1).indices
    return (top_p[:, :, None] == top_q[:, None, :]).any(-1).float().mean(-1)


def _delta_p(logp_NU: Tensor, known_NV: Tensor, logq_NV: Tensor, targets_N1: Tensor) -> Tensor:
    """Give a target in the tail the tail's mean probability: in a clamped file at most 1e-7."""
    num_tail_N1 = (~known_NV).sum(-1, keepdim=True).clamp(min=1)
    mean_tail_N1 = logp_NU[:, -1:].exp() / num_tail_N1
    own_N1 = logp_NU.gather(1, targets_N1).exp()
    p_N1 = torch.where(known_NV.gather(1, targets_N1), own_N1, mean_tail_N1)
    return (logq_NV.gather(1, targets_N1).exp() - p_N1)[:, 0].float()
