"""The ceiling: `torch.mm` over the model's own weight matrices, and nothing else.

Shape suffixes: M = rows (ids of a window), I, O = a matrix's in and out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import perplexit as px
from sidebyside.contenders import Scored, Setting, Workload
from sidebyside.transformers_loops import load_transformers

HEAD_ROWS = {"cpu": 512, "cuda": 1024}  # the head's product in pieces, as any scorer can do it


class GemmCeiling:
    """The checkpoint's weight products alone, in its dtype, with outputs allocated before.

    The weights are the loaded model's, each used once in a pass, so that the caches meet what a
    forward pass gives them. Two ways are tried, window by window and, on the CPU, all of the turn's
    rows at once; the faster one takes the turns.
    """

    def __init__(self, setting: Setting) -> None:
        self.model = load_transformers(setting)
        head = self.model.get_output_embeddings()
        self.head = _matrix_of(head)
        products = [m for m in self.model.modules() if m is not head and _is_product(m)]
        self.body = [_matrix_of(module) for module in products]

    @torch.no_grad()
    def prepare(self, workload: Workload) -> None:
        """Try the ways, and keep the faster one."""
        fed = [len(window.ids_T) - 1 for window in workload.windows()]  # the last is not fed
        targets = workload.tokens.num_targets
        ways = [self._pass(fed, targets)]
        if len(fed) > 1 and self.model.device.type == "cpu":
            ways.append(self._pass([sum(fed)], targets))
        self._fastest = min(ways, key=lambda way: min(_seconds(way), _seconds(way)))
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self._flops = {
            "products": product_flops([m.numel() for m in self.body], sum(fed))
            + product_flops([self.head.numel()], targets),
            "attention": attention_flops(fed, num_layers=config.num_hidden_layers, width=width),
        }

    @torch.no_grad()
    def __call__(self, workload: Workload) -> Scored:
        """Multiply once."""
        targets = workload.tokens.num_targets
        return Scored(None, targets, seconds=_seconds(self._fastest), flops=self._flops)

    def _pass(self, row_counts: Sequence[int], head_rows: int) -> Callable[[], None]:
        most = HEAD_ROWS[self.model.device.type]
        pieces = [min(most, head_rows - start) for start in range(0, head_rows, most)]
        products = [(rows, w_IO) for rows in row_counts for w_IO in self.body]
        products += [(rows, self.head) for rows in pieces]
        inputs = {(m, w.shape[0]): self._random(m, w.shape[0]) for m, w in products}
        outputs = {(m, w.shape[1]): self._random(m, w.shape[1]) for m, w in products}
        calls = [(inputs[m, w.shape[0]], w, outputs[m, w.shape[1]]) for m, w in products]

        def run() -> None:
            for x_MI, w_IO, out_MO in calls:
                torch.mm(x_MI, w_IO, out=out_MO)

        return run

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=self.head.device).to(self.head.dtype)


def attention_flops(lengths: Sequence[int], *, num_layers: int, width: int) -> float:
    """Return `Σ 2 · layers · width · T (T + 1)` over windows of T fed ids, causal half alone.

    width: heads · head size.
    """
    return float(sum(2 * num_layers * width * t * (t + 1) for t in lengths))


def product_flops(sizes: Sequence[int], num_rows: int) -> float:
    """Return `Σ 2 · rows · in · out` over weight matrices of these sizes, in · out."""
    return float(2 * num_rows * sum(sizes))


def _seconds(run: Callable[[], None]) -> float:
    with px.Timer() as timer:
        run()
    return timer.seconds


def _is_product(module: nn.Module) -> bool:
    """Return whether the module multiplies by a weight matrix: `nn.Linear`, GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matrix_of(module: Any) -> Tensor:
    """Return the weight as (in, out), in the memory where the model has it."""
    weight: Tensor = module.weight.detach()
    return weight if type(module).__name__ == "Conv1D" else weight.t()
