"""The IGF experiments of docs/igf.md: labels, learners, methods × seeds, figures.

    python bench/igf_experiments.py shift          small GPT-2 tuned on 1790-1899, pool up to 1999
    python bench/igf_experiments.py same-domain    small GPT-2 tuned on 1790-1999, the same pool
    python bench/igf_experiments.py longer         as shift, 1080 steps: more than what labels cost
    python bench/igf_experiments.py demo           SmolLM2-135M, pool up to 1999

Objective 2000-2012, test 2013-2026 throughout. A killed call continues where it was;
--seconds-limit ends it after the fine-tuning that passes the limit.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from igf_corpus import OBJECTIVE_YEARS, TEST_YEARS, articles_of, small_gpt2
from sidebyside.checkpoints import demo_model

import perplexit.igf as igf
from perplexit.igf.learners import Learner

POOL = (1790, 1999)
SIXTY_STEPS = igf.FinetuneSettings(steps=60, batch_size=16, eval_interval=10, learning_rate=5e-4)


@dataclass(frozen=True)
class Setting:
    """One experiment. model_years: the small GPT-2 is trained up to this year; None: SmolLM2."""

    title: str = "small GPT-2 tuned on 1790-1899; candidates 1790-1999"
    model_name: str = "a GPT-2 of 4 layers"
    model_years: int | None = 1899
    num_pairs: int = 3000
    pair_rate: float = 5e-4
    learner_rate: float = 1e-3
    methods: str = "standard igf-shifting igf-quantile random-skip high-loss igf-constant"
    num_seeds: int = 12
    num_test: int = 200
    finetune: igf.FinetuneSettings = SIXTY_STEPS


SHIFT = Setting()
SETTINGS = {
    "shift": SHIFT,
    "same-domain": replace(
        SHIFT,
        title="small GPT-2 tuned on 1790-1999; candidates 1790-1999",
        model_years=1999,
        methods="standard igf-shifting igf-quantile random-skip high-loss",
    ),
    "longer": replace(
        SHIFT,
        title="small GPT-2 tuned on 1790-1899; candidates 1790-1999; 1080 steps",
        methods="standard igf-constant",
        num_seeds=3,
        finetune=replace(SIXTY_STEPS, steps=1080, eval_interval=60),
    ),
    "demo": Setting(
        title="SmolLM2-135M-Instruct; candidates 1790-1999",
        model_name="SmolLM2-135M-Instruct",
        model_years=None,
        num_pairs=300,
        pair_rate=5e-5,
        learner_rate=1e-4,
        methods="standard igf-quantile random-skip",
        num_seeds=5,
        num_test=40,
        finetune=igf.FinetuneSettings(steps=30, batch_size=4, eval_interval=15, learning_rate=5e-5),
    ),
}


def main(
    setting: Literal["shift", "same-domain", "longer", "demo"],
    folder: Path = Path("build/igf"),
    seconds_limit: float | None = None,
    threads: int = 2,
    seeds: Annotated[str, typer.Option(help="Only these, by commas: two processes at once.")] = "",
) -> None:
    """Make labels, both learners, the experiment and its figure, below FOLDER / SETTING."""
    torch.set_num_threads(threads)
    asked, out = SETTINGS[setting], folder / setting
    out.mkdir(parents=True, exist_ok=True)
    path = demo_model() if asked.model_years is None else small_gpt2(folder, asked.model_years)
    model, train = igf.load_model(path), articles_of(*POOL, path)
    test_articles = articles_of(*TEST_YEARS, path)
    pairs = igf.collect_pairs(
        model,
        igf.ContextStream(train, 32, seed=1_000_000).take(0, asked.num_pairs),
        igf.objective_contexts(articles_of(*OBJECTIVE_YEARS, path), seed=3),
        output=out / "pairs.safetensors",
        mode="first-order",
        rule=igf.StepRule(learning_rate=asked.pair_rate),
        model_name=asked.title,
    )
    learners = {kind: _learner(kind, pairs, model, asked, out) for kind in ("ridge", "cnn")}
    numbers = [int(seed) for seed in seeds.split(",") if seed] or range(asked.num_seeds)
    seconds = json.loads((out / "pairs.seconds.json").read_text("utf-8"))
    document = igf.run_experiment(
        model,
        train,
        igf.objective_contexts(test_articles, number=asked.num_test, seed=4),
        plan=igf.ExperimentPlan(
            methods=tuple(asked.methods.split()), seeds=tuple(numbers), settings=asked.finetune
        ),
        output=out / "experiment",
        learner=learners["ridge"],
        labelling={**seconds, "num_pairs": len(pairs), "mode": "first-order"},
        model_name=asked.model_name,
        title=asked.title,
        seconds_limit=seconds_limit,
    )
    igf.draw_experiment(document, out / "experiment")
    print(document["status"], *_lines(document), sep="\n")


def _learner(kind: str, pairs: Any, model: Any, asked: Setting, out: Path) -> Learner:
    """Return the learner that was trained before, or train it."""
    if not (out / f"{kind}.json").exists():
        options = {"learning_rate": asked.learner_rate, "max_epochs": 40, "batch_size": 32}
        igf.save_learner(igf.train_learner(pairs, kind=kind, model=model, **options), out / kind)
    learner: Learner = igf.load_learner(out / kind)
    print(kind, json.dumps(learner.record["scores"]), flush=True)
    return learner


def _lines(document: dict[str, Any]) -> Iterator[str]:
    """Yield each method's final perplexity, and its ratio to the first one's."""
    for method, found in document["methods"].items():
        median, low, high = (found[f"{end}_perplexity"][-1] for end in ("median", "low", "high"))
        seconds = ", ".join(f"{part} {value:.1f} s" for part, value in found["seconds"].items())
        yield (
            f"{method:16} n={found['num_seeds']:2} median {median:.3f} [{low:.3f}, {high:.3f}] "
            f"accepted {found['acceptance']:.2f}  {seconds}"
        )
    for row in document["comparisons"]:
        yield (
            f"{row['method']:16} / {row['reference']}: {row['ratio']:.4f} [{row['ratio_low']:.4f}, "
            f"{row['ratio_high']:.4f}] better {row['seeds_better']}/{row['num_seeds']} Holm t "
            f"{row['p_t_holm']:.2g} Wilcoxon {row['p_wilcoxon_holm']:.2g}"
        )


if __name__ == "__main__":
    typer.run(main)
