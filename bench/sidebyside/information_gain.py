"""Information gain filtration: ways to label contexts take turns, how true labels are, experiments.

Addresses by year: contexts up to 1999, their objective 2000-2012, test 2013-2026.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import perplexit.igf as igf
from perplexit.igf.losses import ids_on_device
from sidebyside.alternation import Bench
from sidebyside.checkpoints import small_gpt2
from sidebyside.contenders import TABLES, Score, Scored, Setting, Workload
from sidebyside.workloads import speech_files

POOL_YEARS, OBJECTIVE_YEARS, TEST_YEARS = (1790, 1999), (2000, 2012), (2013, 2026)
CONTEXT = 32


@cache  # reading takes longer than most turns
def _articles(folder: Path, first: int, last: int) -> Any:
    return igf.read_articles(speech_files(first, last), folder)


def contexts_of(folder: Path, size: int, length: int, count: int) -> tuple[Any, Any]:
    """Return an objective of `size` contexts, and `count` candidates."""
    aim, pool = _articles(folder, *OBJECTIVE_YEARS), _articles(folder, *POOL_YEARS)
    objective = igf.objective_contexts(aim, number=size, length=length, seed=3)
    return objective, igf.ContextStream(pool, CONTEXT, 11).take(0, count)


def labels(setting: Setting, way: str, most: int) -> Score:
    """Open one way to label contexts, at most so many in a turn.

    The workload says how many contexts the objective has, and of how many ids. The first turn sets
    the way up, and so has its memory.
    """
    torch.set_num_threads(setting.threads)
    model = igf.load_model(setting.model)

    @cache
    def labelling(workload: Workload) -> tuple[int, Callable[[], object]]:
        size = workload.tokens.num_windows
        count = min(most, size)
        found = contexts_of(Path(setting.model), size, workload.max_length, count)
        objective, contexts = (ids_on_device(model, part.ids_NT) for part in found)
        if way == "original":
            return count, partial(next, _original_gains(model, objective, contexts[:1]))
        if way == "forward":
            return count, partial(torch.inference_mode()(model), contexts)
        if way == "context pass":
            return count, partial(_forward_and_backward, model, contexts)
        measure: Any = igf.gain_measure(model, objective, mode=way)
        return count, partial(measure.gains, contexts)

    def score(workload: Workload) -> Scored:
        count, label = labelling(workload)
        label()
        return Scored(None, count)

    return score


def _forward_and_backward(model: nn.Module, contexts: Tensor) -> None:
    for context in contexts:
        model(context[None], labels=context[None]).loss.backward()
        model.zero_grad(set_to_none=True)


def _original_gains(model: nn.Module, objective: Tensor, context: Tensor) -> Iterator[float]:
    """Yield the gain of a pair over and over, by the original's algorithm, as the original has it.

    A deep copy of the model and a new optimizer for each pair; the objective row by row, with the
    graph of every row.
    """
    before = float(_original_perplexity(model, objective))
    copied, optimizer, _ = igf.recopy_gpt2(model, "cpu", 1)
    while True:
        optimizer.zero_grad()
        loss = copied(context, labels=context).loss
        _original_perplexity(copied, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(copied.parameters(), 3.0)
        optimizer.step()
        after = _original_perplexity(copied, objective)
        copied, optimizer, _ = igf.recopy_gpt2(model, "cpu", 1)
        yield before - float(after)


def _original_perplexity(model: nn.Module, rows: Tensor) -> Tensor:
    """Measure a row at a time, in evaluation mode."""
    model.eval()
    total = torch.zeros(1)
    for row in rows:
        context = torch.zeros((1, len(row)), dtype=torch.long)
        context[0, :] = row
        total += model(context, labels=context).loss.mean()
    model.train()
    return torch.exp(total / len(rows))


def fidelity(bench: Bench) -> dict[str, Any]:
    """Return how fast gains agree with exact ones: 104 contexts, an objective of 16 × 32 ids."""
    torch.set_num_threads(bench.threads)
    count, size = (12, 2) if bench.quick else (104, 16)
    folder, sgd = bench.model("demo"), igf.StepRule("sgd", clip_norm=None)
    model = igf.load_model(folder)
    objective, candidates = contexts_of(folder, size, CONTEXT, count)

    def gains(mode: Any, rule: Any = None) -> Any:
        options: dict[str, Any] = {"mode": mode, "rule": rule, "part_size": 8}
        return igf.collect_pairs(model, candidates, objective, **options).gain_nats_N

    exact, exact_sgd = gains("exact"), gains("exact", sgd)
    pairs = {
        "first-order beside exact, AdamW": (gains("first-order"), exact),
        "directional beside exact, SGD": (gains("directional"), exact_sgd),
        "exact, AdamW beside exact, SGD": (exact, exact_sgd),
    }
    rows = []
    for name, pair in pairs.items():
        spearman, pearson = stats.spearmanr(*pair).statistic, stats.pearsonr(*pair).statistic
        figures = {"Spearman": float(spearman), "Pearson": float(pearson)}
        rows.append({"gains": name, "contexts": count, **figures})
    return {"rows": rows}


def experiment(bench: Bench, name: str) -> dict[str, Any]:
    """Make labels, both learners, the experiment and its figure; return a row for each method.

    A killed call continues where it was.
    """
    torch.set_num_threads(bench.threads)
    asked, folder = TABLES["experiments"][name], bench.subfolder("igf-quick" * bench.quick or "igf")
    if bench.quick:
        asked = asked | TABLES["quick_experiment"]
    years, out = asked["model_years"], folder / name
    out.mkdir(exist_ok=True)
    path = small_gpt2(folder, years, 30 if bench.quick else 1000) if years else bench.model("demo")
    model, train = igf.load_model(path), _articles(path, *POOL_YEARS)
    pairs = igf.collect_pairs(
        model,
        igf.ContextStream(train, CONTEXT, seed=1_000_000).take(0, asked["num_pairs"]),
        igf.objective_contexts(_articles(path, *OBJECTIVE_YEARS), seed=3),
        output=out / "pairs.safetensors",
        mode="first-order",
        rule=igf.StepRule(learning_rate=asked["pair_rate"]),
        model_name=asked["title"],
    )
    learners: dict[str, Any] = {}
    for kind in ("ridge", "cnn"):
        if not (out / f"{kind}.json").exists():
            trained = igf.train_learner(pairs, kind=kind, model=model, **asked["learner"])
            igf.save_learner(trained, out / kind)
        learners[kind] = igf.load_learner(out / kind)
    cost = igf.cost_of(out / "pairs.safetensors")
    document = igf.run_experiment(
        model,
        train,
        igf.objective_contexts(_articles(path, *TEST_YEARS), number=asked["num_test"], seed=4),
        plan=igf.ExperimentPlan(
            methods=tuple(asked["methods"]),
            seeds=tuple(range(asked["num_seeds"])),
            settings=igf.FinetuneSettings(**asked["finetune"]),
        ),
        output=out / "experiment",
        learner=learners["ridge"],
        labelling={**cost, "num_pairs": len(pairs), "mode": "first-order"},
        model_name="a GPT-2 of 4 layers" if years else "SmolLM2-135M-Instruct",
        title=asked["title"],
    )
    igf.draw_experiment(document, out / "experiment")
    compared = {row["method"]: row for row in document["comparisons"]}
    rows = [_row(name, m, compared.get(name, {})) for name, m in document["methods"].items()]
    scores = {kind: learner.record["scores"] for kind, learner in learners.items()}
    return {"rows": rows, "learners": scores}


def _row(method: str, found: dict[str, Any], compared: dict[str, Any]) -> dict[str, Any]:
    """Return a method's final perplexity, its ratio to the first one's, and its cost."""
    return {
        "method": method,
        "accepted": found["acceptance"],
        "perplexity": [found[f"{end}_perplexity"][-1] for end in ("low", "median", "high")],
        "ratio": [compared.get(f"ratio{end}") for end in ("_low", "", "_high")],
        "p (t)": compared.get("p_t_holm"),
        "p (Wilcoxon)": compared.get("p_wilcoxon_holm"),
        "seeds better": compared.get("seeds_better"),
        "of": found["num_seeds"],
        "seconds": ", ".join(f"{part} {s:.1f}" for part, s in found["seconds"].items()),
    }
