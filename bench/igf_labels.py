"""Labels a second, fidelity and memory of the gain modes, beside the original's algorithm.

    python bench/igf_labels.py speed       labels a second in one run, objective 100 x 32, fp32
    python bench/igf_labels.py fidelity    rank agreement of fast and exact on 104 real contexts
    python bench/igf_labels.py memory      peak bytes of tensors beyond the model, a label a mode

SmolLM2-135M; objective 2000-2012, contexts up to 1999. Figures go to
`build/igf/labels-*.json`. The original's way is written out in `original_gain`: a deep copy of the
model and a new optimizer a pair, the objective row by row, no `no_grad`.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from igf_corpus import OBJECTIVE_YEARS, articles_of, packaged_model
from scipy import stats
from torch import Tensor, nn

from perplexit.igf.gain_measures import gain_measure
from perplexit.igf.language_model import load_model
from perplexit.igf.losses import ContextScorer
from perplexit.igf.optimizer_step import StepRule
from perplexit.igf.random_contexts import ContextStream, objective_contexts
from perplexit.resources.cpu_tensor_bytes import CpuTensorBytes
from perplexit.resources.host_memory import HostMemory

SGD = StepRule("sgd", clip_norm=None)
MODES: dict[str, tuple[str, StepRule]] = {
    "exact": ("exact", StepRule()),
    "first-order": ("first-order", StepRule()),
    "directional": ("directional", SGD),
}


def original_perplexity(model: nn.Module, rows: Tensor) -> Tensor:
    """A row at a time, in evaluation mode, with the graph of every row."""
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
    """What is made anew for every pair."""
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
    """One pair, and the fresh copy for the next."""
    optimizer.zero_grad()
    loss = model(context[None], labels=context[None]).loss
    original_perplexity(model, context[None])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    optimizer.step()
    after = original_perplexity(model, objective)
    return before - float(after), *original_copy(original)


def tensors(size: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, an objective of `size` contexts, and `count` candidates."""
    folder = packaged_model()
    objective = objective_contexts(articles_of(*OBJECTIVE_YEARS, folder), number=size, seed=3)
    found = ContextStream(articles_of(1790, 1999, folder), 32, 11).take(0, count)
    contexts, candidates = (torch.from_numpy(c.ids_NT).long() for c in (objective, found))
    return load_model(folder), contexts, candidates


def speed(rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds a label of every way, taken in turns so that all meet the same machine."""
    model, objective, candidates = tensors(100, 64)
    numbers = {"exact": 1, "first-order": 8, "directional": 64}
    setup, measures = {}, {}
    for name, (mode, rule) in MODES.items():
        began = time.perf_counter()
        measures[name] = gain_measure(model, objective, mode=mode, rule=rule)  # type: ignore[arg-type]
        setup[name] = time.perf_counter() - began
    before = float(torch.exp(torch.tensor(measures["exact"].objective_loss)))
    seconds: dict[str, list[float]] = {name: [] for name in ("original", *MODES, *FLOORS)}
    found: dict[str, Any] = {}
    for turn in range(rounds):
        copied, optimizer = original_copy(model)
        began = time.perf_counter()
        _, copied, optimizer = original_gain(
            model, copied, optimizer, candidates[turn], objective, before
        )
        seconds["original"].append(time.perf_counter() - began)
        del copied, optimizer
        for name, measure in measures.items():
            measure.gains(candidates[-1:])
            began = time.perf_counter()
            measure.gains(candidates[: numbers[name]])
            seconds[name].append((time.perf_counter() - began) / numbers[name])
        for name, (call, count) in FLOORS.items():
            began = time.perf_counter()
            call(model, candidates)
            seconds[name].append((time.perf_counter() - began) / count)
        print(json.dumps({k: round(v[-1], 3) for k, v in seconds.items()}), flush=True)
        found = {
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "setup_seconds": setup,
            "times_faster": {
                m: statistics.median(seconds["original"]) / statistics.median(seconds[m])
                for m in MODES
            },
        }
        save(folder, "speed", found)
    return found


def forward_and_backward(model: nn.Module, candidates: Tensor) -> None:
    """The floor of first-order: one context forward and backward, four times."""
    for context in candidates[:4]:
        model(context[None], labels=context[None]).loss.backward()
        model.zero_grad(set_to_none=True)


def forward_alone(model: nn.Module, candidates: Tensor) -> None:
    """Half of the floor of directional: 32 contexts forward."""
    with torch.inference_mode():
        model(candidates[:32])


FLOORS: dict[str, tuple[Callable[[nn.Module, Tensor], None], int]] = {
    "forward and backward": (forward_and_backward, 4),
    "forward": (forward_alone, 32),
}


def save(folder: Path, part: str, found: dict[str, Any]) -> None:
    """Write a part's figures."""
    (folder / f"labels-{part}.json").write_text(json.dumps(found, indent=1))


def fidelity(count: int, size: int, folder: Path) -> dict[str, Any]:
    """Spearman and relative error of the fast gains against the exact ones; resumable."""
    model, objective, candidates = tensors(size, count)
    kept = folder / "fidelity-parts.json"
    gains: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    ways = {"first-order": MODES["first-order"], "directional": MODES["directional"]}
    ways |= {"exact-adamw": ("exact", StepRule()), "exact-sgd": ("exact", SGD)}
    for name, (mode, rule) in ways.items():
        done = gains.setdefault(name, [])
        if len(done) == count:
            continue
        measure = gain_measure(model, objective, mode=mode, rule=rule)  # type: ignore[arg-type]
        while len(done) < count:
            done += measure.gains(candidates[len(done) : len(done) + 8]).tolist()
            kept.write_text(json.dumps(gains))
            print(f"\r{name} {len(done)}/{count}   ", end="", flush=True)
        del measure
    found: dict[str, Any] = {"num_contexts": count, "objective": [size, 32]}
    for fast, exact in (("first-order", "exact-adamw"), ("directional", "exact-sgd")):
        found[fast] = {
            "spearman": float(stats.spearmanr(gains[fast], gains[exact]).statistic),
            "pearson": float(stats.pearsonr(gains[fast], gains[exact]).statistic),
        }
    found["adamw against sgd"] = float(
        stats.spearmanr(gains["exact-adamw"], gains["exact-sgd"]).statistic
    )
    return found


def memory() -> dict[str, Any]:
    """The most memory beside the model while a mode is set up and used, in units of its weights.

    rss: of the process, beyond what it had with the model loaded and used once; tensors: bytes of
    tensors that operations made.
    """
    model, objective, candidates = tensors(34, 4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ContextScorer(model).losses(objective)

    def use(name: str) -> None:
        if name == "original":
            copied, optimizer = original_copy(model)
            original_gain(model, copied, optimizer, candidates[0], objective[:2], 1.0)
        else:
            mode, rule = MODES[name]
            gain_measure(model, objective, mode=mode, rule=rule).gains(candidates)  # type: ignore[arg-type]

    found: dict[str, Any] = {"weights_bytes": weights}
    for name in (*MODES, "original"):
        with HostMemory() as rss:
            use(name)
        with CpuTensorBytes() as tracked:
            use(name)
        found[name] = {
            "rss": (rss.peak_bytes - rss.start_bytes) / weights,
            "tensors": tracked.peak_bytes / weights,
        }
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("speed", "fidelity", "memory"))
    parser.add_argument("--folder", type=Path, default=Path("build/igf"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=104)
    parser.add_argument("--objective", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.part == "speed":
        result = speed(arguments.rounds, arguments.folder)
    elif arguments.part == "fidelity":
        result = fidelity(arguments.contexts, arguments.objective, arguments.folder)
    else:
        result = memory()
    print("\n" + json.dumps(result, indent=1))
    save(arguments.folder, arguments.part, result)
