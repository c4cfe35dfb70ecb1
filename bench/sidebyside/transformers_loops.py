"""The peers that are a loop over `model(...)`, written as plainly as their sources have them.

Shape suffixes: B = windows, T = ids of a window, V = vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sidebyside.contenders import Contender, Scored, Setting
from sidebyside.workloads import Workload

Loop = Callable[[Any, Workload], Scored]
EVALUATE_BATCH = 16  # the metric's default


@dataclass(frozen=True)
class LoopContender:
    """A model of transformers and a loop over it."""

    model: Any
    loop: Loop

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """The loop itself; it makes its own tensors, as its source does."""
        return lambda: self.loop(self.model, workload)


def load_transformers(setting: Setting) -> Any:
    """The checkpoint as transformers loads it, in evaluation mode."""
    torch.set_num_threads(setting.threads)
    dtype = getattr(torch, setting.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype)
    return model.eval()


@torch.no_grad()
def score_plainly(model: Any, workload: Workload) -> Scored:
    """`model(ids, labels=ids).loss`, one window after the other."""
    nll_sum, num_tokens = 0.0, 0
    for window_T in workload.windows():
        ids_BT = torch.from_numpy(window_T).long()[None]
        count = len(window_T) - 1
        nll_sum += model(ids_BT, labels=ids_BT).loss.item() * count
        num_tokens += count
    return Scored(nll_sum, num_tokens)


@torch.no_grad()
def score_as_hf_evaluate(model: Any, workload: Workload) -> Scored:
    """The `perplexity` metric: padded batches of texts, the mean of their perplexities."""
    windows = workload.windows()
    perplexities, nll_sum = [], 0.0
    for start in range(0, len(windows), EVALUATE_BATCH):
        texts = [torch.from_numpy(window).long() for window in windows[start:][:EVALUATE_BATCH]]
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
    return Scored(nll_sum, workload.num_targets, math.fsum(perplexities) / len(perplexities))


@torch.no_grad()
def score_as_mlc_hf_loop(model: Any, workload: Workload) -> Scored:
    """Logits of a line, shifted cross entropy, exp of the mean of the lines' means."""
    means, nll_sum = [], 0.0
    for window_T in workload.windows():
        ids_BT = torch.from_numpy(window_T).long()[None]
        logits_BTV = model(ids_BT).logits
        flat_TV = logits_BTV[:, :-1].contiguous().view(-1, logits_BTV.shape[-1])
        means.append(cross_entropy(flat_TV, ids_BT[:, 1:].contiguous().view(-1)).item())
        nll_sum += means[-1] * (len(window_T) - 1)
    return Scored(nll_sum, workload.num_targets, math.exp(math.fsum(means) / len(means)))


@torch.no_grad()
def score_as_hf_guide(model: Any, workload: Workload) -> Scored:
    """Windows every `stride`, labels of the context ignored, window means weighted by a count.

    The guide takes one off the count of every window, though an overlapped window has lost none.
    """
    ids_T = torch.from_numpy(workload.text_ids).long()
    nll_sum, weighted, num_tokens, num_counted = 0.0, 0.0, 0, 0
    for begin, end, new in workload.strided():
        ids_BT = ids_T[None, begin:end]
        labels_BT = ids_BT.clone()
        labels_BT[:, :-new] = -100
        loss = model(ids_BT, labels=labels_BT).loss.item()
        scored = min(new, end - begin - 1)  # the first id of all is predicted by nothing
        nll_sum += loss * scored
        num_tokens += scored
        counted = new - 1
        weighted += loss * counted
        num_counted += counted
    return Scored(nll_sum, num_tokens, math.exp(weighted / num_counted))


def plain_loop(setting: Setting) -> Contender:
    """Everybody's loop."""
    return LoopContender(load_transformers(setting), score_plainly)


def hf_evaluate(setting: Setting) -> Contender:
    """The algorithm of evaluate's metric."""
    return LoopContender(load_transformers(setting), score_as_hf_evaluate)


def hf_guide(setting: Setting) -> Contender:
    """The algorithm of the transformers guide."""
    return LoopContender(load_transformers(setting), score_as_hf_guide)


def mlc_hf_loop(setting: Setting) -> Contender:
    """The algorithm of MLC's comparison script."""
    return LoopContender(load_transformers(setting), score_as_mlc_hf_loop)
