"""`perplexit igf finetune`, and `perplexit igf experiment`: many fine-tunings, compared."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, people, print_json, tell, with_interval

_NOT_ASKED = ("output", "checkpoints", "threads", "json", "force")  # they do not change the weights
_OF_FINETUNE_ALONE = ("micro_batch", "dropout", "seed_compatible", "seed")
FINETUNE_EXAMPLES = examples(
    "perplexit igf finetune addresses/ --model gpt2/ --learner learner -o tuned/",
    "perplexit igf finetune old/ --test new/ --model gpt2/ --method standard -o tuned/",
    "perplexit igf finetune old/ --model smollm2/ --learner learner --lora-rank 8 -o adapter/",
)
EXPERIMENT_EXAMPLES = examples(
    "perplexit igf experiment addresses/ --model gpt2/ --learner learner -o experiment/",
    "perplexit igf experiment old/ --test new/ --model gpt2/ --methods standard,random-skip "
    "--seeds 5 --steps 30 -o experiment/",
)


@takes_options(*options.TUNING_OPTIONS)
def finetune(
    context: typer.Context,
    corpus: options.Corpus,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the model is written.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{options.METHODS}. \\[default: igf-shifting with a learner, else standard]"
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train low-rank adapters (PEFT) of this rank only.")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Modules to adapt, separated by commas. \\[default: PEFT's own]"),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep checkpoints here, and continue from the last one."),
    ] = None,
    force: Force = False,
    **given: Any,
) -> None:
    """Fine-tune on the contexts that a filter accepts before the model reads them.

    With --checkpoints a run that was stopped continues when the same command is given again.
    """
    name = method or ("standard" if given["learner"] is None else "igf-shifting")
    options.refuse_idle_of_methods(context, [name])
    if lora_rank is None:
        options.refuse_idle(context, "lora_targets", because="no --lora-rank is given")
    inputs = [model, *corpus, *(given["test"] or ()), given["learner"]]
    asked = {name: value for name, value in context.params.items() if name not in _NOT_ASKED}
    asked = json.loads(json.dumps(asked, default=str))  # paths as text
    igf.model_output(output, inputs=inputs, request=asked, force=force)
    settings = options.finetune_settings(context)
    with options.working("Steps", given["threads"]) as draw:
        train, held = options.train_and_held_out(context.params, "test", given["num_test"])
        tuned = igf.load_model(model)
        learned = options.learner_to_use(given["learner"])
        unlike = None if learned is None else igf.unlike_pairs(learned.record, tuned)
        if unlike is not None:
            tell(f"Warning: {unlike}")
        if lora_rank is not None:
            targets = None if lora_targets is None else options.names(lora_targets)
            tuned = igf.with_lora(tuned, rank=lora_rank, targets=targets)
        selection = igf.calibrated_selection(
            name,
            tuned,
            train,
            settings.context_length,
            learner=learned,
            share=given["share"],
            constant=given["threshold"],
            seed=settings.seed,
        )
        curve = igf.finetune_model(
            tuned,
            train,
            held,
            selection=selection,
            settings=settings,
            checkpoint=checkpoints,
            progress=lambda p: draw(
                p.step, p.total_steps, f"test perplexity {p.test_perplexity:.4g}"
            ),
        )
        folder = igf.save_model(tuned, output, inputs=inputs, request=asked, force=force)
    people().print(_curve_in_words(name, curve, folder))
    if given["json"]:
        document = {"method": name, "selection": selection.to_json(), **curve.to_json()}
        print_json({**document, "settings": asdict(settings), "output": str(folder)})


def _curve_in_words(name: str, curve: Any, folder: Path) -> str:
    first, last = curve.perplexities()[0], curve.perplexities()[-1]
    return (
        f"{name}: test perplexity {first:.5g} → {last:.5g} in {curve.steps[-1]} steps, "
        f"{curve.tokens_trained:,} ids trained on of {curve.tokens_judged:,} judged by the filter; "
        f"the model is in {folder}"
    )


@takes_options(*options.TUNING_OPTIONS, but_not=_OF_FINETUNE_ALONE)
def experiment(
    context: typer.Context,
    corpus: options.Corpus,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The experiment's folder.")
    ],
    methods: Annotated[
        str,
        typer.Option(help=f"Separated by commas; the first is the baseline: {options.METHODS}."),
    ] = "standard,igf-constant,igf-shifting,igf-quantile,random-skip,high-loss,perplexity-band",
    seeds: Annotated[
        int, typer.Option(min=2, help="Fine-tunings per method: seeds 0 to N-1.")
    ] = 12,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="The learner's pairs; what they cost is recorded with the methods' cost."
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the plot and the report.")] = "",
    seconds_limit: Annotated[
        float | None,
        typer.Option(help="Stop after the fine-tuning that exceeds it; the next call continues."),
    ] = None,
    **given: Any,
) -> None:
    """Compare ways to select contexts, each method on the same seeds and the same test contexts.

    An experiment that was stopped continues when the same command is given again.
    """
    options.refuse_idle_of_methods(context, options.names(methods))
    inputs = [model, *corpus, *(given["test"] or ()), given["learner"], pairs]
    igf.check_experiment_output(output, inputs=inputs)
    with options.working("Runs", given["threads"]) as draw:
        plan = igf.ExperimentPlan(
            methods=tuple(options.names(methods)),
            seeds=tuple(range(seeds)),
            settings=options.finetune_settings(context),
            share=given["share"],
            constant=given["threshold"],
            confidence=confidence,
        )
        train, held = options.train_and_held_out(context.params, "test", given["num_test"])
        document = igf.run_experiment(
            igf.load_model(model),
            train,
            held,
            plan=plan,
            output=output,
            learner=options.learner_to_use(given["learner"]),
            labelling=_labelling(pairs),
            model_name=model,
            title=title,
            seconds_limit=seconds_limit,
            progress=lambda p: draw(p.num_runs, p.total_runs, f"{p.method}, seed {p.seed}"),
        )
        if document["methods"]:
            igf.draw_experiment(document, output)
    people().print(_table(document))
    people().print(f"The experiment is {document['status']}, in {output}")
    if given["json"]:
        print_json(document)


def _labelling(pairs: Path | None) -> dict[str, Any] | None:
    if pairs is None:
        return None
    found = igf.Pairs.open(pairs)
    return {"num_pairs": len(found), "mode": found.record.get("mode"), **igf.cost_of(pairs)}


def _table(document: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("method", "seeds", "final perplexity", "accepted", "seconds", "ratio", "p (Holm)"):
        table.add_column(name, justify="left" if name == "method" else "right")
    compared = {row["method"]: row for row in document["comparisons"]}
    for method, found in document["methods"].items():
        ratio = p_value = "-"
        if (row := compared.get(method)) is not None:
            ratio = f"{row['ratio']:.4f} \\[{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
            p_value = "not known" if row["p_t_holm"] is None else f"{row['p_t_holm']:.2g}"
        low, high = found["low_perplexity"][-1], found["high_perplexity"][-1]
        table.add_row(
            method,
            str(found["num_seeds"]),
            escape(with_interval(found["median_perplexity"][-1], low, high)),
            f"{found['acceptance']:.0%}",
            f"{found['seconds']['select'] + found['seconds']['train']:.1f}",
            ratio,
            p_value,
        )
    return table
