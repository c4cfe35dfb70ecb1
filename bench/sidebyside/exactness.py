"""How exact figures are on a real model: a stored reference's KL, int4 twice, drifting losses."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import perplexit as px
from perplexit.metrics.intervals import clusters_for, mean_interval
from sidebyside.alternation import Bench
from sidebyside.contenders import Setting
from sidebyside.transformers_loops import load_transformers
from sidebyside.workloads import ids_of_speeches, speech_files

LAYER, SHARE, EVERY, CHARACTERS = 12, 0.5, 6, 24_000
GROUP, WINDOW, NUM_IDS = 32, 512, 3_983
LENGTHS, LAGS = (16, 64, 256, 512, 1000, 1500), (1, 2, 4, 8, 16, 64, 256)
Floats = NDArray[np.float64]


def _network(bench: Bench) -> Any:
    return load_transformers(Setting(str(bench.model("demo")), "float32", bench.threads))


def _tokens_of(model: Any, year: int, characters: int | None) -> px.TokenFile:
    """Return the beginning of an address in windows of 512 ids every 256."""
    text = speech_files(year, year)[0].read_text("utf-8")[:characters]
    return px.prepare([text], tokenizer=model, max_length=WINDOW, stride=WINDOW // 2)


def stored_reference(bench: Bench) -> dict[str, Any]:
    """Return how far KL columns from stored states are from float64 KL of whole logits.

    The candidate is the demo model with noise of half its standard deviation in one layer's down
    projection; the text, the first 24,000 characters of the address of 2024; every sixth window is
    computed in full.
    """
    model, scratch = bench.model("demo"), bench.subfolder("scratch")
    tokens = _tokens_of(model, 2024, CHARACTERS // 16 if bench.quick else CHARACTERS)
    networks = [_network(bench), _network(bench)]
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
    model = _network(bench)
    ids = ids_of_speeches(bench.model("demo"))[: NUM_IDS // (4 if bench.quick else 1)]
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    shipped = [layer.weight.detach().clone() for layer in layers]
    like_shipped = [like_q4_1(weight) for weight in shipped]

    def losses(weights: list[torch.Tensor]) -> Floats:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        return _losses(model, torch.from_numpy(ids).long())

    def int4_losses(weights: list[torch.Tensor]) -> tuple[Floats, float]:
        """Return the losses with int4 weights, and Σ (int4 - weight)² / Σ weight²."""
        rounded = [int4(weight) for weight in weights]
        wrong = sum(float(((a - b) ** 2).sum()) for a, b in zip(rounded, weights, strict=True))
        return losses(rounded), wrong / sum(float((weight**2).sum()) for weight in weights)

    plain, once = losses(shipped), losses(like_shipped)
    (int4_once, error), (int4_twice, error_twice) = map(int4_losses, (shipped, like_shipped))
    from_shipped, from_once = int4_once - plain, int4_twice - once
    rows = [
        _row("rounded once more, like Q4_1", once - plain),
        _row("int4 from the shipped weights", from_shipped, error),
        _row("int4 from those rounded once more", from_once, error_twice),
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
        tokens = _tokens_of(model, year, 1_500 if bench.quick else None)
        run = px.evaluate(f"hf:{model}", tokens, threads=bench.threads)
        nll = run.tokens.nll.astype(np.float64)
        row: dict[str, Any] = {"address of": str(year), "tokens": len(nll)}
        for n in LENGTHS:
            means = nll[: len(nll) // n * n].reshape(-1, n).mean(axis=1)
            enough = len(means) >= 4
            row[f"n = {n}"] = float(n * means.var(ddof=1) / nll.var(ddof=1)) if enough else ""
        centred = nll - nll.mean()
        products = [(centred[:-lag] * centred[lag:]).mean() for lag in LAGS]
        row["largest correlation at one lag"] = float(max(products) / nll.var())
        rows.append(row)
    return {"rows": rows}
