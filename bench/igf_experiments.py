"""The IGF experiments of docs/igf.md: labels, learners, methods × seeds, figures.

    python bench/igf_experiments.py shift          small GPT-2 tuned on 1790-1899, pool up to 1999
    python bench/igf_experiments.py same-domain    small GPT-2 tuned on 1790-1999, the same pool
    python bench/igf_experiments.py longer         as shift, 1080 steps: more than what labels cost
    python bench/igf_experiments.py demo           SmolLM2-135M, pool up to 1999

Objective 2000-2012, test 2013-2026 throughout. A killed call goes on where it was;
--seconds-limit ends it after the fine-tuning that passes the limit.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from igf_corpus import OBJECTIVE_YEARS, TEST_YEARS, articles_of, packaged_model, small_gpt2

from perplexit.igf.collection import collect_pairs
from perplexit.igf.experiment_plot import draw_experiment
from perplexit.igf.experiments import ExperimentPlan, run_experiment
from perplexit.igf.finetune_curve import FinetuneSettings
from perplexit.igf.gain_measures import Mode
from perplexit.igf.language_model import load_model
from perplexit.igf.learner_training import train_learner
from perplexit.igf.learners import load_learner, save_learner
from perplexit.igf.optimizer_step import StepRule
from perplexit.igf.random_contexts import ContextStream, objective_contexts

FIVE = ("standard", "igf-shifting", "igf-quantile", "random-skip", "high-loss")
SIX = (*FIVE, "igf-constant")


@dataclass(frozen=True)
class Setting:
    """One experiment: which model, which pool, how much of everything."""

    title: str
    model_years: int | None  # the small GPT-2 is trained up to this year; None: SmolLM2
    num_pairs: int
    learning_rate: float
    methods: tuple[str, ...]
    num_seeds: int
    steps: int
    batch_size: int
    eval_interval: int
    num_test: int
    mode: Mode = "first-order"
    learner: str = "ridge"
    pool: tuple[int, int] = (1790, 1999)


SETTINGS = {
    "shift": Setting(
        title="small GPT-2 tuned on 1790-1899; candidates 1790-1999",
        model_years=1899,
        num_pairs=3000,
        learning_rate=5e-4,
        methods=SIX,
        num_seeds=12,
        steps=60,
        batch_size=16,
        eval_interval=10,
        num_test=200,
    ),
    "same-domain": Setting(
        title="small GPT-2 tuned on 1790-1999; candidates 1790-1999",
        model_years=1999,
        num_pairs=3000,
        learning_rate=5e-4,
        methods=FIVE,
        num_seeds=12,
        steps=60,
        batch_size=16,
        eval_interval=10,
        num_test=200,
    ),
    "longer": Setting(
        title="small GPT-2 tuned on 1790-1899; candidates 1790-1999; 1080 steps",
        model_years=1899,
        num_pairs=3000,
        learning_rate=5e-4,
        methods=("standard", "igf-constant"),
        num_seeds=3,
        steps=1080,
        batch_size=16,
        eval_interval=60,
        num_test=200,
    ),
    "demo": Setting(
        title="SmolLM2-135M-Instruct; candidates 1790-1999",
        model_years=None,
        num_pairs=300,
        learning_rate=5e-5,
        methods=("standard", "igf-quantile", "random-skip"),
        num_seeds=5,
        steps=30,
        batch_size=4,
        eval_interval=15,
        num_test=40,
    ),
}


def run(
    name: str, folder: Path, seconds_limit: float | None, seeds: tuple[int, ...] | None = None
) -> None:
    """Labels, both learners, the experiment and its figure, below `folder / name`."""
    setting = SETTINGS[name]
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    model_dir = (
        packaged_model() if setting.model_years is None else small_gpt2(folder, setting.model_years)
    )
    model = load_model(model_dir)
    train = articles_of(*setting.pool, model_dir)
    objective = objective_contexts(articles_of(*OBJECTIVE_YEARS, model_dir), seed=3)
    test = objective_contexts(articles_of(*TEST_YEARS, model_dir), number=setting.num_test, seed=4)
    began = time.perf_counter()
    pairs = collect_pairs(
        model,
        ContextStream(train, 32, seed=1_000_000).take(0, setting.num_pairs),
        objective,
        output=out / "pairs.safetensors",
        mode=setting.mode,
        rule=StepRule(learning_rate=setting.learning_rate),
        model_name=setting.title,
        progress=lambda p: print(
            f"\r{p.num_pairs}/{p.total_pairs} pairs, {p.seconds:.0f} s", end="", flush=True
        ),
    )
    print(f"\npairs: {time.perf_counter() - began:.0f} s")
    learners = {}
    for kind in ("ridge", "cnn"):
        if not (out / f"{kind}.json").exists():
            trained = train_learner(
                pairs,
                kind=kind,
                model=model,
                learning_rate=1e-3 if setting.model_years else 1e-4,
                max_epochs=40,
                batch_size=32,
            )
            save_learner(trained, out / kind)
        learners[kind] = load_learner(out / kind)
        print(kind, json.dumps(learners[kind].record["scores"]))
    plan = ExperimentPlan(
        methods=setting.methods,
        seeds=seeds or tuple(range(setting.num_seeds)),
        settings=FinetuneSettings(
            steps=setting.steps,
            batch_size=setting.batch_size,
            eval_interval=setting.eval_interval,
            learning_rate=setting.learning_rate,
        ),
    )
    seconds = json.loads((out / "pairs.seconds.json").read_text())
    document = run_experiment(
        model,
        train,
        test,
        plan=plan,
        output=out / "experiment",
        learner=learners[setting.learner],
        labelling={**seconds, "num_pairs": len(pairs), "mode": setting.mode},
        model_name="SmolLM2-135M-Instruct"
        if setting.model_years is None
        else "a GPT-2 of 4 layers",
        title=setting.title,
        seconds_limit=seconds_limit,
    )
    draw_experiment(document, out / "experiment")
    report(document)


def report(document: dict) -> None:  # type: ignore[type-arg]
    """Print the experiment as a table."""
    print(document["status"])
    for method, found in document["methods"].items():
        seconds = found["seconds"]
        print(
            f"{method:16} n={found['num_seeds']:2} median {found['median_perplexity'][-1]:.3f} "
            f"[{found['low_perplexity'][-1]:.3f}, {found['high_perplexity'][-1]:.3f}] accepted "
            f"{found['acceptance']:.2f}  select {seconds['select']:.1f} s train "
            f"{seconds['train']:.1f} s evaluate {seconds['evaluate']:.1f} s"
        )
    for row in document["comparisons"]:
        print(
            f"{row['method']:16} / {row['reference']}: {row['ratio']:.4f} [{row['ratio_low']:.4f}, "
            f"{row['ratio_high']:.4f}] better {row['seeds_better']}/{row['num_seeds']} Holm t "
            f"{row['p_t_holm']:.2g} Wilcoxon {row['p_wilcoxon_holm']:.2g}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--folder", type=Path, default=Path("build/igf"))
    parser.add_argument("--seconds-limit", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="only these, for two processes at once"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds = None if arguments.seeds is None else tuple(arguments.seeds)
    run(arguments.setting, arguments.folder, arguments.seconds_limit, seeds)
