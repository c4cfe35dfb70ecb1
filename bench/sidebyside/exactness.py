"""How exact figures are on a real model: a stored reference's KL, int4 twice, drifting losses."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.metrics.intervals import clusters_for, mean_interval
from sidebyside.alternation import Bench
from sidebyside.workloads import ids_of_speeches, speech_files

LAYER, SHARE, EVERY, CHARACTERS = 12, 0.5, 6, 24_000
GROUP, WINDOW, NUM_IDS = 32, 512, 3_983
LENGTHS = (16, 64, 256, 512, 1000, 1500)
Floats = NDArray[np.float64]


def _network(model: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.eval()


def stored_reference(bench: Bench) -> dict[str, Any]:
    """Return how far KL columns from stored states are from float64 KL of whole logits.

    The candidate is the demo model with noise of half its standard deviation in one layer's down
    projection; the text, the first 24,000 bytes of the address of 2024 in windows of 512 every 256;
    every sixth window is computed in full.
    """
    model, scratch = bench.model("demo"), bench.subfolder("scratch")
    text = speech_files(2024, 2024)[0].read_text("utf-8")[
        : CHARACTERS // (16 if bench.quick else 1)
    ]
    tokens = px.prepare([text], tokenizer=model, max_length=WINDOW, stride=WINDOW // 2)
    networks = [_network(model), _network(model)]
    torch.manual_seed(0)
    weight = networks[1].model.layers[LAYER].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * weight.std() * SHARE)
    networks[1].save_pretrained(scratch / "damaged")
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "float16"):
        options: dict[str, Any] = {"threads": bench.threads, "run": scratch / dtype}
        px.evaluate(f"hf:{model}", tokens, save_reference=True, reference_dtype=dtype, **options)
        options |= {"reference": scratch / dtype, "run": None, "other_tokenizer": True}
        found = px.evaluate(f"hf:{scratch / 'damaged'}", tokens, **options).tokens
        errors = []
        for index in range(0, tokens.num_windows, EVERY):
            exact = _whole_kl(networks, tokens.window_ids(index))
            assert found.kl is not None  # the candidate was evaluated with a reference
            errors.append(np.abs(exact - found.kl[found.window == index]))
        error = np.concatenate(errors)
        figures = {"largest error": float(error.max()), "mean error": float(error.mean())}
        rows.append({"states": dtype, "tokens": len(error), **figures})
    return {"rows": rows}


@torch.no_grad()
def _whole_kl(networks: list[Any], window: Any) -> Floats:
    """Return each target's float64 KL of the second network from the first, of whole logits."""
    ids = torch.tensor([window.ids_T.tolist()])
    logits = (network(ids).logits[0][window.targets_N - 1].double() for network in networks)
    p, q = (x.log_softmax(-1) for x in logits)
    kl: Floats = (p.exp() * (p - q)).sum(-1).numpy()
    return kl


def rounded_twice(bench: Bench) -> dict[str, Any]:
    """Return what 4-bit rounding costs on weights that were rounded to 4 bits before.

    The packaged model is shipped as Q4_1, and its full-precision weights are in no package. So the
    question is turned round: the shipped weights are rounded to int4 (symmetric, groups of 32) once
    directly, and once after another rounding in the manner of Q4_1 with groups that lie otherwise.
    """
    model = _network(bench.model("demo"))
    ids = ids_of_speeches(bench.model("demo"))[: NUM_IDS // (4 if bench.quick else 1)]
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    shipped = [layer.weight.detach().clone() for layer in layers]
    like_shipped = [like_q4_1(weight) for weight in shipped]

    def losses(weights: list[torch.Tensor]) -> Floats:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        return _losses(model, torch.from_numpy(ids).long())

    plain, once = losses(shipped), losses(like_shipped)
    from_shipped = losses([int4(weight) for weight in shipped]) - plain
    from_once = losses([int4(weight) for weight in like_shipped]) - once
    error, twice = relative_error(shipped), relative_error(like_shipped)
    rows = [
        _row("rounded once more, like Q4_1", once - plain),
        _row("int4 from the shipped weights", from_shipped, error),
        _row("int4 from those rounded once more", from_once, twice),
        _row("the last over the one before", from_once - from_shipped),
    ]
    return {"rows": rows, "perplexity": float(np.exp(plain.mean()))}


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight as symmetric codes -8 … 7 in groups along the inputs."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-12)
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def like_q4_1(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight on 16 levels in groups that begin in the middle of the shipped ones."""
    groups = weight.roll(GROUP // 2, 1).reshape(len(weight), -1, GROUP)
    low = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
    rounded = ((groups - low) / step).round() * step + low
    return rounded.reshape(weight.shape).roll(-GROUP // 2, 1)


def relative_error(weights: list[torch.Tensor]) -> float:
    """Return Σ (int4 - weight)² / Σ weight², over all weights."""
    wrong = sum(float(((int4(weight) - weight) ** 2).sum()) for weight in weights)
    return wrong / sum(float((weight**2).sum()) for weight in weights)


@torch.inference_mode()
def _losses(model: Any, ids: torch.Tensor) -> Floats:
    found = []
    for start in range(0, len(ids) - 1, WINDOW - 1):
        window = ids[start : start + WINDOW]
        logprobs = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        found.append(-logprobs.gather(1, window[1:, None])[:, 0])
    losses: Floats = torch.cat(found).numpy()
    return losses


def _row(name: str, change: Floats, error: float | None = None) -> dict[str, Any]:
    """Return the row of a change of the losses, as a ratio of perplexities with its interval."""
    windows = np.arange(len(change)) // (WINDOW - 1)
    found = mean_interval(change, clusters_for(np.zeros_like(windows), windows))
    ends = [None if x is None else float(np.exp(x)) for x in (found.low, found.value, found.high)]
    return {"": name, "targets": len(change), "ratio": ends, "relative error of int4": error}


def loss_drift(bench: Bench) -> dict[str, Any]:
    """Return how far the losses of addresses are from independent: what the intervals must hold.

    For stretches of n consecutive tokens, n · variance of their means / variance of the losses: 1
    for independent tokens; where it stops to grow, a stretch holds what varies together. Also the
    largest autocorrelation at any of some lags from 1 to 256.
    """
    model, rows = bench.model("demo"), []
    for year in (2023, 2024):
        text = speech_files(year, year)[0].read_text("utf-8")[: 1_500 if bench.quick else None]
        tokens = px.prepare([text], tokenizer=model, max_length=WINDOW, stride=WINDOW // 2)
        run = px.evaluate(f"hf:{model}", tokens, threads=bench.threads)
        nll = run.tokens.nll.astype(np.float64)
        enough = [n for n in LENGTHS if len(nll) >= 4 * n]
        lengths = {f"n = {n}": inflation(nll, n) if n in enough else "" for n in LENGTHS}
        largest = {"largest correlation at one lag": largest_correlation(nll)}
        rows.append({"address of": str(year), "tokens": len(nll), **lengths, **largest})
    return {"rows": rows}


def inflation(nll: Floats, length: int) -> float:
    """Return `length` · variance of the means of stretches / variance of the losses."""
    means = nll[: len(nll) // length * length].reshape(-1, length).mean(axis=1)
    return float(length * means.var(ddof=1) / nll.var(ddof=1))


def largest_correlation(nll: Floats) -> float:
    """Return the largest autocorrelation of the losses at any of some lags from 1 to 256."""
    centred = nll - nll.mean()
    products = [(centred[:-lag] * centred[lag:]).mean() for lag in (1, 2, 4, 8, 16, 64, 256)]
    return float(max(products) / nll.var())
