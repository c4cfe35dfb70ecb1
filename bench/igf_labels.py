"""Labels per second, fidelity and memory of the gain modes, beside the original's algorithm.

    python bench/igf_labels.py speed       labels per second in turns, objective 100 x 32, fp32
    python bench/igf_labels.py fidelity    rank agreement of fast and exact on 104 real contexts
    python bench/igf_labels.py memory      peak bytes beyond the model of one label in each mode

SmolLM2-135M; objective 2000-2012, contexts up to 1999. The results go to
`build/igf/labels-*.json`. The original's way is written out in `original_gain`: a deep copy of the
model and a new optimizer for each pair, the objective row by row, no `no_grad`.
"""

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from igf_corpus import OBJECTIVE_YEARS, articles_of
from scipy import stats
from sidebyside.alternation import Bench
from sidebyside.checkpoints import demo_model
from sidebyside.paired_ratios import turns
from torch import Tensor, nn

import perplexit.igf as igf
from perplexit.igf.gain_measures import GainMeasure
from perplexit.igf.losses import ContextScorer
from perplexit.resources.memory_tracker import MemoryTracker

MODES = ("exact", "first-order", "directional")
SGD = igf.StepRule("sgd", clip_norm=None)


def tensors(size: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model, an objective of `size` contexts, and `count` candidates."""
    folder = demo_model()
    objective = igf.objective_contexts(articles_of(*OBJECTIVE_YEARS, folder), number=size, seed=3)
    found = igf.ContextStream(articles_of(1790, 1999, folder), 32, 11).take(0, count)
    contexts, candidates = (torch.from_numpy(c.ids_NT).long() for c in (objective, found))
    return igf.load_model(folder), contexts, candidates


def measure_of(mode: str, model: nn.Module, objective: Tensor, rule: Any = None) -> GainMeasure:
    """Set a mode up; its optimizer is SGD in the directional mode, else AdamW."""
    rule = rule or (SGD if mode == "directional" else igf.StepRule())
    measure: GainMeasure = igf.gain_measure(model, objective, mode=mode, rule=rule)
    return measure


def original_perplexity(model: nn.Module, rows: Tensor) -> Tensor:
    """Measure a row at a time, in evaluation mode, with the graph of every row."""
    model.eval()
    total = torch.zeros(1)
    for row in rows:
        context = torch.zeros((1, len(row)), dtype=torch.long)
        context[0, :] = row
        total += model(context, labels=context).loss.mean()
    perplexity = torch.exp(total / len(rows))
    model.train()
    return perplexity


def original_copy(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make what is new for every pair."""
    copied = copy.deepcopy(model)
    return copied, torch.optim.AdamW(copied.parameters(), lr=5e-5, eps=1e-8, weight_decay=0.0)


def original_gain(
    original: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Tensor,
    objective: Tensor,
    before: float,
) -> tuple[float, nn.Module, torch.optim.Optimizer]:
    """Measure one pair; return its gain and the new copy for the next."""
    optimizer.zero_grad()
    loss = model(context[None], labels=context[None]).loss
    original_perplexity(model, context[None])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    optimizer.step()
    after = original_perplexity(model, objective)
    return before - float(after), *original_copy(original)


def measure_in_turns(bench: Bench) -> dict[str, Any]:
    """Return the record of the section `igf` of `bench/run.py`."""
    rounds = 1 if bench.quick else min(bench.rounds, 2)  # the original takes long
    torch.set_num_threads(bench.threads)
    return {"seconds": speed(rounds)["seconds"], "modes": list(MODES)}


def speed(rounds: int) -> dict[str, Any]:
    """Return seconds per label of every way, taken in turns so that all meet the same machine.

    Beside the modes and the original, the floors: a context forward and backward (first-order), and
    half of directional's, a batch forward.
    """
    model, objective, candidates = tensors(100, 64)
    setup, measures = {}, {}
    for mode in MODES:
        began = time.perf_counter()
        measures[mode] = measure_of(mode, model, objective)
        setup[mode] = time.perf_counter() - began
    before = float(torch.exp(torch.tensor(measures["exact"].objective_loss)))
    counts = {"original": 1, "exact": 1, "first-order": 8, "directional": 64}
    counts |= {"forward and backward": 4, "forward": 32}
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    for number, name in turns(tuple(counts), rounds):
        contexts = candidates[: counts[name]]
        copied, optimizer = original_copy(model) if name == "original" else (model, None)
        if name in MODES:
            measures[name].gains(candidates[-1:])
        began = time.perf_counter()
        if optimizer is not None:
            original_gain(model, copied, optimizer, candidates[number], objective, before)
        elif name in MODES:
            measures[name].gains(contexts)
        elif name == "forward":
            with torch.inference_mode():
                model(contexts)
        else:
            for context in contexts:
                model(context[None], labels=context[None]).loss.backward()
                model.zero_grad(set_to_none=True)
        seconds[name].append((time.perf_counter() - began) / counts[name])
        print(f"round {number + 1}: {name} {seconds[name][-1]:.3f} s", flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "setup_seconds": setup,
        "times_faster": {mode: medians["original"] / medians[mode] for mode in MODES},
    }


def fidelity(count: int, size: int, folder: Path) -> dict[str, Any]:
    """Return how the fast gains agree with the exact ones; a second call continues."""
    model, objective, candidates = tensors(size, count)
    kept = folder / "fidelity-parts.json"
    gains: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    ways: dict[str, tuple[str, Any]] = {mode: (mode, None) for mode in MODES[1:]}
    ways |= {"exact-adamw": ("exact", None), "exact-sgd": ("exact", SGD)}
    for name, (mode, rule) in ways.items():
        done = gains.setdefault(name, [])
        measure = measure_of(mode, model, objective, rule) if len(done) < count else None
        while measure is not None and len(done) < count:
            done += measure.gains(candidates[len(done) : len(done) + 8]).tolist()
            kept.write_text(json.dumps(gains))
            print(f"\r{name} {len(done)}/{count}   ", end="", flush=True)
    found: dict[str, Any] = {"num_contexts": count, "objective": [size, 32]}
    for fast, exact in (("first-order", "exact-adamw"), ("directional", "exact-sgd")):
        found[fast] = {
            "spearman": float(stats.spearmanr(gains[fast], gains[exact]).statistic),
            "pearson": float(stats.pearsonr(gains[fast], gains[exact]).statistic),
        }
    optimizers = stats.spearmanr(gains["exact-adamw"], gains["exact-sgd"])
    return found | {"adamw against sgd": float(optimizers.statistic)}


def memory() -> dict[str, Any]:
    """Return the most memory beside the model while a mode is set up and used, × its weights.

    rss: of the process, beyond what it had with the model loaded and used once; tensors: bytes of
    tensors that operations made.
    """
    model, objective, candidates = tensors(34, 4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ContextScorer(model).losses(objective)
    found: dict[str, Any] = {"weights_bytes": weights}
    for name in (*MODES, "original"):
        peaks = []
        for counted in (False, True):  # counting tensors changes the process's own peak
            with MemoryTracker(python=False, torch_cpu=counted) as tracker:
                if name == "original":
                    copied = original_copy(model)
                    original_gain(model, *copied, candidates[0], objective[:2], 1.0)
                    del copied
                else:
                    measure_of(name, model, objective).gains(candidates)
            peaks.append(tracker.torch_cpu_peak_bytes if counted else tracker.host_rss_peak_bytes)
        found[name] = {"rss": (peaks[0] or 0) / weights, "tensors": (peaks[1] or 0) / weights}
        print(name, found[name], flush=True)
    return found


def main(
    part: Literal["speed", "fidelity", "memory"],
    folder: Path = Path("build/igf"),
    threads: int = 2,
    rounds: int = 3,
    contexts: int = 104,
    objective: int = 16,
) -> None:
    """Measure one part, print it, and write it below FOLDER."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    if part == "speed":
        found = speed(rounds)
    else:
        found = fidelity(contexts, objective, folder) if part == "fidelity" else memory()
    text = json.dumps(found, indent=1)
    (folder / f"labels-{part}.json").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    typer.run(main)
