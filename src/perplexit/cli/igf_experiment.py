"""`perplexit igf experiment`: methods × seeds → curves, paired tests, costs, a figure."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.output import people, print_json, stdout_kept_clean, with_interval

EXAMPLES = examples(
    "perplexit igf experiment addresses/ --model gpt2/ --learner learner -o experiment/",
    "perplexit igf experiment old/ --test new/ --model gpt2/ --methods standard,random-skip "
    "--seeds 5 --steps 30 -o experiment/",
)


def experiment(
    context: typer.Context,
    corpus: options.Corpus,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The experiment's folder.")
    ],
    learner: Annotated[
        Path | None, typer.Option(help="A secondary learner, for the igf methods.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="By commas; the first is what the others are compared with: standard, "
            "igf-constant, igf-shifting, igf-quantile, random-skip, high-loss, perplexity-band."
        ),
    ] = "standard,igf-constant,igf-shifting,igf-quantile,random-skip,high-loss,perplexity-band",
    seeds: Annotated[int, typer.Option(min=2, help="Fine-tunings a method: seeds 0 to N-1.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Accepted contexts a step.")] = 16,
    context_length: Annotated[int, typer.Option(min=2, help="Ids of a context.")] = 32,
    min_length: Annotated[
        int, typer.Option(min=1, help="Test articles are longer than this, in ids.")
    ] = 1026,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, no weight decay.")] = 5e-5,
    eval_interval: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 10,
    threshold: Annotated[
        float, typer.Option(help="Of igf-constant, and of igf-shifting's first 10 steps.")
    ] = 1.0,
    share: Annotated[
        float, typer.Option(help="Of candidates accepted, for quantile, random and loss methods.")
    ] = 0.25,
    test: options.TestCorpus = None,
    num_test: Annotated[int, typer.Option(min=1, help="Test contexts.")] = 100,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    pairs: Annotated[
        Path | None,
        typer.Option(help="The learner's pairs: their cost is recorded beside the methods'."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the figure and the report.")] = "",
    seconds_limit: Annotated[
        float | None,
        typer.Option(help="Stop after the fine-tuning that passes it; the next call goes on."),
    ] = None,
    tokenizer: options.TokenizerOption = None,
    allow_pickle: options.AllowPickle = False,
    threads: options.Threads = None,
    json: options.AsJson = False,
) -> None:
    """Compare ways to select contexts, each method on the same seeds and the same test contexts.

    An experiment that was stopped continues when the same command is given again.
    """
    options.refuse_idle_of_methods(context, options.names(methods))
    igf.check_experiment_output(output, inputs=[model, *corpus, *(test or ()), learner, pairs])
    with continued_by("the same command"), stdout_kept_clean(), options.bar("Runs") as draw:
        options.use_threads(threads)
        plan = igf.ExperimentPlan(
            methods=tuple(options.names(methods)),
            seeds=tuple(range(seeds)),
            settings=igf.FinetuneSettings(
                steps=steps,
                batch_size=batch_size,
                context_length=context_length,
                learning_rate=learning_rate,
                eval_interval=eval_interval,
            ),
            share=share,
            constant=threshold,
            confidence=confidence,
        )
        train, held = igf.train_and_test(
            options.one_or_many(corpus),
            None if not test else options.one_or_many(test),
            number=num_test,
            length=context_length,
            min_len=min_length,
            tokenizer=tokenizer or model,
            allow_pickle=allow_pickle,
        )
        document = igf.run_experiment(
            igf.load_model(model),
            train,
            held,
            plan=plan,
            output=output,
            learner=options.learner_to_use(learner),
            labelling=_labelling(pairs),
            model_name=model,
            title=title,
            seconds_limit=seconds_limit,
            progress=None
            if draw is None
            else lambda p: draw(p.num_runs, p.total_runs, f"{p.method}, seed {p.seed}"),
        )
        if document["methods"]:
            igf.draw_experiment(document, output)
    people().print(_table(document))
    people().print(f"The experiment is {document['status']}, in {output}")
    if json:
        print_json(document)


def _labelling(pairs: Path | None) -> dict[str, Any] | None:
    if pairs is None:
        return None
    found = igf.Pairs.open(pairs)
    side = igf.tensor_path(pairs).with_suffix(".seconds.json")
    cost = json_module.loads(side.read_text(encoding="utf-8")) if side.exists() else {}
    return {"num_pairs": len(found), "mode": found.record.get("mode"), **cost}


def _table(document: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("method", "seeds", "final perplexity", "accepted", "seconds", "ratio", "p (Holm)"):
        table.add_column(name, justify="left" if name == "method" else "right")
    compared = {row["method"]: row for row in document["comparisons"]}
    for method, found in document["methods"].items():
        row = compared.get(method)
        low, high = found["low_perplexity"][-1], found["high_perplexity"][-1]
        table.add_row(
            method,
            str(found["num_seeds"]),
            escape(with_interval(found["median_perplexity"][-1], low, high)),
            f"{found['acceptance']:.0%}",
            f"{found['seconds']['select'] + found['seconds']['train']:.1f}",
            "-"
            if row is None
            else f"{row['ratio']:.4f} \\[{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]",
            "-" if row is None else _p(row["p_t_holm"]),
        )
    return table


def _p(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2g}"
