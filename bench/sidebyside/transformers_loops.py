"""The peers that are a loop over `model(...)`, written as plainly as their sources have them.

Shape suffixes: B = windows, T = ids of a window, V = vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sidebyside.contenders import Score, Scored, Setting, Workload

EVALUATE_BATCH = 16  # the metric's default


def load_transformers(setting: Setting) -> Any:
    """Load the checkpoint as transformers does, in evaluation mode."""
    torch.set_num_threads(setting.threads)
    dtype = getattr(torch, setting.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype)
    return model.eval().to(setting.device)


def _single(workload: Workload) -> list[Tensor]:
    """Return each window's ids as a batch of one, [1, T]."""
    return [torch.from_numpy(window.ids_T).long()[None] for window in workload.windows()]


def _contender(loop: Callable[[Any, Workload], Scored]) -> Callable[[Setting], Score]:
    """Return what opens a loop. The loop makes its own tensors, as its source does."""
    return lambda setting: partial(torch.no_grad()(loop), load_transformers(setting))


@_contender
def plain_loop(model: Any, workload: Workload) -> Scored:
    """Score as everybody does: `model(ids, labels=ids).loss`, one window after the other."""
    nll_sum = 0.0
    for ids_BT in _single(workload):
        nll_sum += model(ids_BT, labels=ids_BT).loss.item() * (ids_BT.shape[1] - 1)
    return Scored(nll_sum, workload.tokens.num_targets)


@_contender
def hf_evaluate(model: Any, workload: Workload) -> Scored:
    """Score as evaluate's metric: padded batches of texts, the mean of their perplexities."""
    windows = _single(workload)
    perplexities, nll_sum = [], 0.0
    for start in range(0, len(windows), EVALUATE_BATCH):
        texts = [ids_BT[0] for ids_BT in windows[start:][:EVALUATE_BATCH]]
        ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths_B = torch.tensor([len(text) for text in texts])
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        logits_BTV = model(ids_BT, attention_mask=mask_BT).logits
        shifted_BTV = logits_BTV[..., :-1, :].contiguous()
        labels_BT, counted_BT = ids_BT[..., 1:].contiguous(), mask_BT[..., 1:].contiguous()
        losses_BT = cross_entropy(shifted_BTV.transpose(1, 2), labels_BT, reduction="none")
        sums_B = (losses_BT * counted_BT).sum(1)
        perplexities += torch.exp(sums_B / counted_BT.sum(1)).tolist()
        nll_sum += sums_B.double().sum().item()
    own = math.fsum(perplexities) / len(perplexities)
    return Scored(nll_sum, workload.tokens.num_targets, own)


@_contender
def mlc_hf_loop(model: Any, workload: Workload) -> Scored:
    """Score as MLC's comparison script: shifted cross entropy, exp of the mean of line means."""
    means, nll_sum = [], 0.0
    for ids_BT in _single(workload):
        logits_BTV = model(ids_BT).logits
        flat_TV = logits_BTV[:, :-1].contiguous().view(-1, logits_BTV.shape[-1])
        means.append(cross_entropy(flat_TV, ids_BT[:, 1:].contiguous().view(-1)).item())
        nll_sum += means[-1] * (ids_BT.shape[1] - 1)
    own = math.exp(math.fsum(means) / len(means))
    return Scored(nll_sum, workload.tokens.num_targets, own)


@_contender
def hf_guide(model: Any, workload: Workload) -> Scored:
    """Score as the transformers guide: windows every `stride`, labels of the context ignored.

    Window means are weighted by a count. The guide subtracts one from the count of every window,
    though an overlapped window has lost none.
    """
    nll_sum, weighted, num_counted = 0.0, 0.0, 0
    for window, ids_BT in zip(workload.windows(), _single(workload), strict=True):
        scored = len(window.targets_N)  # the first id of all is predicted by nothing
        labels_BT = ids_BT.clone()
        labels_BT[:, :-scored] = -100
        loss = model(ids_BT, labels=labels_BT).loss.item()
        nll_sum += loss * scored
        counted = scored if window.index == 0 else scored - 1
        weighted += loss * counted
        num_counted += counted
    return Scored(nll_sum, workload.tokens.num_targets, math.exp(weighted / num_counted))


@_contender
def lm_eval_algorithm(model: Any, workload: Workload) -> Scored:
    """Score as lm-evaluation-harness does with a batch, and do nothing around it.

    The logits are whole, the log-softmax in their dtype. On the model's device.
    """
    windows, size, nll_sum = _single(workload), workload.batch_size or 1, 0.0
    for start in range(0, len(windows), size):
        ids_BT = torch.cat(windows[start : start + size]).to(model.device)
        logprobs_BTV = model(ids_BT[:, :-1]).logits.log_softmax(-1)
        for ids_T, logprobs_TV in zip(ids_BT, logprobs_BTV, strict=True):
            targets_T = ids_T[1:]
            bool((logprobs_TV.argmax(-1) == targets_T).all())
            nll_sum -= float(logprobs_TV.gather(1, targets_T[:, None]).sum())
    return Scored(nll_sum, workload.tokens.num_targets)
