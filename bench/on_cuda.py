"""Perplexit on a CUDA device beside lm-evaluation-harness and the device's own matrix products.

    python bench/on_cuda.py                         where a CUDA device is: the whole measurement
    python bench/on_cuda.py --also liger --also cce with fused heads too
    python bench/on_cuda.py --tiny --device cpu     a minute anywhere: proves the script, no aim

A random Llama (by default of 1.24 billion parameters, with a vocabulary of 128,256) scores random
windows of 4096 ids in bfloat16; Perplexit with `--head compiled`, and with its default. The
contenders take turns on one loaded model; a turn is every window. Reported: medians with their
spread, the share of the ceiling (`torch.mm` at the model's own shapes, and nothing else, in the
same turns), the ratio to the harness, and the peak of the memory beyond the weights, taken in a
turn of its own that is not timed.

Shape suffixes: M = rows, I, O = a matrix's in and out, T = ids of a window, V = vocabulary.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sidebyside.cuda_page import cuda_page
from sidebyside.machine import machine
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import perplexit as px
from perplexit.errors import PerplexitError
from perplexit.resources.loaded_torch import synchronize
from perplexit.resources.memory_tracker import MemoryTracker
from perplexit.sessions.pytorch import PytorchInferenceSession

LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
}
TINY = LARGE | {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ALSO = {
    "liger": {"head": "liger"},
    "cce": {"head": "cce"},
    "compiled-layers": {"compile_mode": "default", "head": "compiled"},
    "graphs": {"compile_mode": "reduce-overhead", "head": "compiled"},
}
HARNESS, ALGORITHM, CEILING = "lm-evaluation-harness", "its algorithm alone", "torch.mm"
OURS = "perplexit"
AIMS = {"share_of_ceiling": 0.60, "ratio": 1.30, "peak_share": 0.10}

Turn = Callable[[], float]  # scores every window; the mean nll, NaN where there is none


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    model = _model(TINY if options.tiny else LARGE, options, device)
    with tempfile.TemporaryDirectory() as folder:
        tokens = _windows(model, options, Path(folder))
        contenders, left_out = _contenders(model, tokens, options)
        seconds, nll = _alternate(contenders, options.rounds)
        peaks = {
            name: _peak_bytes(turn, device) for name, turn in contenders.items() if name != CEILING
        }
    report = _report(model, options, seconds=seconds, nll=nll, peaks=peaks, left_out=left_out)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda.json").write_text(json.dumps(report, indent=2) + "\n")
    page = cuda_page(report, OURS)
    (options.out / "cuda.md").write_text(page)
    print(page)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=None, help="32, with --tiny 8")
    parser.add_argument("--max-length", type=int, default=None, help="4096, with --tiny 256")
    parser.add_argument("--batch-size", type=int, default=1, help="of every contender")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--also", choices=sorted(ALSO), action="append", default=[])
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("-o", "--out", type=Path, default=Path("build/bench-cuda"))
    options = parser.parse_args()
    options.windows = options.windows or (8 if options.tiny else 32)
    options.max_length = options.max_length or (256 if options.tiny else 4096)
    if options.rounds < 5:
        parser.error("a median of fewer than 5 rounds says little: --rounds 5 or more")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --tiny --device cpu proves the script")
    return options


def _model(sizes: dict[str, Any], options: argparse.Namespace, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=options.max_length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.train(False)
    return model


def _windows(model: Any, options: argparse.Namespace, folder: Path) -> px.TokenFile:
    generator = np.random.default_rng(0)
    shape = (options.windows, options.max_length)
    rows = generator.integers(0, model.config.vocab_size, shape)
    lines = folder / "ids.txt"
    lines.write_text("\n".join(" ".join(map(str, row)) for row in rows.tolist()) + "\n")
    return px.import_id_lines(lines, output=folder / "tokens.safetensors")


def _contenders(
    model: Any, tokens: px.TokenFile, options: argparse.Namespace
) -> tuple[dict[str, Turn], dict[str, str]]:
    """The turns by name, and why others that were asked for cannot be taken here."""
    ids = [tokens.window_ids(n).ids_T.astype(np.int64) for n in range(tokens.num_windows)]
    size = options.batch_size
    turns: dict[str, Turn] = {
        CEILING: _products(model, len(ids), options.max_length - 1),
        ALGORITHM: _harness_algorithm(model, ids, size),
        OURS: _perplexit(PytorchInferenceSession(model, head="compiled"), tokens, size),
        f"{OURS}, chunked head": _perplexit(PytorchInferenceSession(model), tokens, size),
    }
    left_out: dict[str, str] = {}
    try:
        turns[HARNESS] = _harness(model, ids, size)
    except ImportError as error:
        left_out[HARNESS] = f"not installed: {error}"
    for name in options.also:
        try:
            session = PytorchInferenceSession(model, **ALSO[name])  # type: ignore[arg-type]
            turns[f"{OURS}, {name}"] = _perplexit(session, tokens, size)
        except PerplexitError as error:
            left_out[f"{OURS}, {name}"] = str(error)
    return turns, left_out


def _perplexit(session: PytorchInferenceSession, tokens: px.TokenFile, size: int) -> Turn:
    def turn() -> float:
        run = px.evaluate(session, tokens, batch_size=size)
        assert run.nll_sum is not None
        assert run.num_tokens
        return run.nll_sum / run.num_tokens

    return turn


def _harness(model: Any, ids: list[Any], size: int) -> Turn:
    """`HFLM._loglikelihood_tokens`, where the harness's every loglikelihood is computed."""
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped] # noqa: PLC0415
    from tokenizers import Tokenizer, models  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), eos_token="?"
    )
    peer = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=len(ids[0]),
        batch_size=size,
        device=str(model.device),
    )
    requests = [((f"{n}", ""), row[:1].tolist(), row[1:].tolist()) for n, row in enumerate(ids)]
    num_targets = sum(len(row) - 1 for row in ids)

    def turn() -> float:
        with redirect_stderr(io.StringIO()):
            answers = peer._loglikelihood_tokens(requests, disable_tqdm=True)
        return -float(sum(logprob for logprob, _ in answers)) / num_targets

    return turn


def _harness_algorithm(model: Any, ids: list[Any], size: int) -> Turn:
    """What the harness does with a batch, and nothing around it: whole logits, in their dtype."""
    num_targets = sum(len(row) - 1 for row in ids)

    @torch.no_grad()
    def turn() -> float:
        total = 0.0
        for start in range(0, len(ids), size):
            batch_BT = torch.from_numpy(np.stack(ids[start : start + size])).to(model.device)
            logprobs_BTV = model(batch_BT[:, :-1]).logits.log_softmax(-1)
            for row_T, logprobs_TV in zip(batch_BT, logprobs_BTV, strict=True):
                targets_T = row_T[1:]
                bool((logprobs_TV.argmax(-1) == targets_T).all())
                total -= float(logprobs_TV.gather(1, targets_T[:, None]).sum())
        return total / num_targets

    return turn


def _products(model: Any, num_windows: int, rows: int) -> Turn:
    """The model's matrix products alone, window by window, into buffers made before."""
    weights_OI = [x.weight for x in model.modules() if isinstance(x, nn.Linear)]
    shapes = {tuple(weight.shape) for weight in weights_OI}
    inputs: dict[int, Tensor] = {
        i: torch.randn(rows, i, dtype=weights_OI[0].dtype, device=model.device) for _, i in shapes
    }
    head_rows = min(rows, 1024)  # the head's in pieces, as any scorer of that size can do it
    vocab = model.config.vocab_size
    out = {o: weights_OI[0].new_empty(head_rows if o == vocab else rows, o) for o, _ in shapes}

    @torch.no_grad()
    def turn() -> float:
        for _ in range(num_windows):
            for weight_OI in weights_OI:
                o, i = weight_OI.shape
                step = len(out[o])
                for start in range(0, rows, step):
                    part_MI = inputs[i][start : start + step]
                    torch.mm(part_MI, weight_OI.t(), out=out[o][: len(part_MI)])
        return float("nan")

    return turn


def _alternate(
    contenders: dict[str, Turn], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    nll = {name: turn() for name, turn in contenders.items()}  # compiles and warms up
    for number in range(rounds):
        for name, turn in contenders.items():
            synchronize()
            began = time.perf_counter()
            turn()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds, nll


def _peak_bytes(turn: Turn, device: torch.device) -> int | None:
    """The most that a turn held beyond what was held before it, weights included there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with MemoryTracker(python=False, torch_cpu=device.type == "cpu") as tracker:
        turn()
    return tracker.torch_cuda_peak_bytes if device.type == "cuda" else tracker.torch_cpu_peak_bytes


def _report(
    model: Any,
    options: argparse.Namespace,
    *,
    seconds: dict[str, list[float]],
    nll: dict[str, float],
    peaks: dict[str, int | None],
    left_out: dict[str, str],
) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = HARNESS if HARNESS in medians else ALGORITHM
    num_targets = options.windows * (options.max_length - 1)
    rows = {}
    for name, times in seconds.items():
        peak, peer_peak = peaks.get(name), peaks[baseline]
        rows[name] = {
            "seconds": times,
            "median_seconds": medians[name],
            "tokens_per_second": num_targets / medians[name],
            "share_of_ceiling": medians[CEILING] / medians[name],
            "ratio": medians[baseline] / medians[name],
            "peak_bytes_beyond_weights": peak,
            "peak_share": peak / peer_peak if peak is not None and peer_peak else None,
            "mean_nll": None if np.isnan(nll[name]) else nll[name],
        }
    linear = sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Linear))
    on_cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_cuda else "cpu",
        "cuda": torch.version.cuda,
        "machine": machine(),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "max_length": options.max_length,
        "windows": options.windows,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "ceiling_tflops": 2e-12 * linear * num_targets / medians[CEILING],
        "compared_with": baseline,
        "contenders": rows,
        "left_out": left_out,
        "aims": AIMS,
        "aims_apply": on_cuda and not options.tiny and options.dtype == "bfloat16",
    }


if __name__ == "__main__":
    main()
