"""`perplexit igf collect` and `perplexit igf train`: labelled contexts, and a learner of them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, people, print_json
from perplexit.igf.training_options import NetworkOptions

COLLECT_EXAMPLES = examples(
    "perplexit igf collect addresses/ --model gpt2/ -o pairs.safetensors --num-pairs 200",
    "perplexit igf collect old/ --objective new/ --model gpt2/ --mode first-order -o p.safetensors",
    "perplexit igf collect old/ --model gpt2/ --mode directional --optimizer sgd -o p.safetensors",
)
TRAIN_EXAMPLES = examples(
    "perplexit igf train pairs.safetensors -o learner",
    "perplexit igf train pairs.safetensors --kind cnn --model gpt2/ -o learner-cnn",
)

Mode = Literal["exact", "first-order", "directional"]
Optimizer = Literal["adamw", "sgd"]


@takes_options(options.ContextOptions, options.CommandOptions)
def collect(
    context: typer.Context,
    corpus: options.Corpus,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The pairs' safetensors file.")
    ],
    objective: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CORPUS",
            help="Articles of the kind that the model should become good at. "
            "\\[default: a hash split of CORPUS]",
        ),
    ] = None,
    num_pairs: Annotated[int, typer.Option(min=1, help="How many contexts to label.")] = 200,
    mode: Annotated[
        Mode,
        typer.Option(
            help="exact takes the step and measures; first-order: a forward and a backward pass "
            "per label; directional: for SGD, two forward passes."
        ),
    ] = "exact",
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(help="\\[default: adamw; sgd for the directional mode]"),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the one step.")] = 5e-5,
    clip_norm: Annotated[
        str | None,
        typer.Option(
            metavar="X|none", help="Limit on the gradient's norm. \\[default: 3; none for sgd]"
        ),
    ] = None,
    objective_size: Annotated[
        int, typer.Option(min=1, help="Number of contexts of the objective.")
    ] = 100,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="Measure with dropout on, as the original did.")
    ] = False,
    **given: Any,
) -> None:
    """Label contexts with their information gain: how much one step on each helps the objective.

    A collection that was stopped continues when the same command is given again.
    """
    igf.pairs_output(output, inputs=[model, *corpus, *(objective or ())])
    with options.working("Pairs", given["threads"]) as draw:
        seed = given["seed"]
        train, goal = options.train_and_held_out(
            context.params, "objective", objective_size, seed=seed
        )
        pairs = igf.collect_pairs(
            igf.load_model(model),
            igf.ContextStream(train, given["context_length"], seed).take(0, num_pairs),
            goal,
            output=output,
            mode=mode,
            rule=_rule(mode, optimizer, learning_rate, clip_norm),
            dropout=dropout,
            seed=seed,
            model_name=model,
            progress=lambda p: draw(
                p.num_pairs, p.total_pairs, f"mean {p.mean_gain_nats:.2e} nats"
            ),
        )
    document = _document(pairs, output)
    people().print(
        f"{len(pairs)} pairs in {output}: gain {document['statistics']['nats']['mean']:.3e} nats, "
        f"standard deviation {document['statistics']['nats']['std']:.3e}; objective perplexity "
        f"{document['objective_perplexity']:.4g}"
    )
    if given["json"]:
        print_json(document)


def _rule(
    mode: Mode, optimizer: Optimizer | None, learning_rate: float, clip_norm: str | None
) -> Any:
    chosen = optimizer or ("sgd" if mode == "directional" else "adamw")
    limit = 3.0 if chosen == "adamw" else None
    if clip_norm is not None:
        limit = options.clip_norm(clip_norm)
    return igf.StepRule(chosen, learning_rate, clip_norm=limit)


def _document(pairs: Any, output: Path) -> dict[str, Any]:
    record = igf.Pairs.open(output).record
    document = {key: value for key, value in record.items() if key != "version"}
    cost = igf.cost_of(output)
    document |= {"cost": cost} if cost else {}
    return {**document, "output": str(igf.tensor_path(output)), "num_pairs": len(pairs)}


@takes_options(NetworkOptions, options.CommandOptions)
def train(
    context: typer.Context,
    pairs: Annotated[
        Path, typer.Argument(metavar="PAIRS", help="A file made by `perplexit igf collect`.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The learner (.safetensors, .json)."),
    ],
    kind: Annotated[
        Literal["ridge", "cnn"],
        typer.Option(help="ridge: linear in token counts; cnn: the paper's network."),
    ] = "ridge",
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model whose embeddings the cnn starts from."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="The z-score at which precision is reported.")
    ] = 1.0,
    force: Force = False,
    **given: Any,
) -> None:
    """Train a secondary learner; articles are held out, and the best learner on them is kept."""
    network = {name: given[name] for name in NetworkOptions.__annotations__}
    if kind == "ridge":
        options.refuse_idle(context, *network, because="ridge is solved in one step")
    igf.learner_output(output, inputs=[pairs, model], force=force)
    with options.working("Training", given["threads"], resumable=False) as draw:
        learner = igf.train_learner(
            igf.load_pairs(pairs, allow_pickle=given["allow_pickle"]),
            kind=kind,
            model=None if model is None else igf.load_model(model),
            threshold=threshold,
            seed=given["seed"],
            progress=lambda p: draw(p.number, p.total, f"held-out error {p.choose_mse:.4f}"),
            **network,
        )
        path = igf.save_learner(learner, output)
    people().print(f"{kind} learner in {path}: {_scores_in_words(learner.record['scores'])}")
    options.tell_doubt(learner)
    if given["json"]:
        print_json({"learner": kind, "output": str(path), **learner.record})


def _scores_in_words(scores: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return (
        f"on {scores['num_pairs']} pairs of {scores['num_articles']} held-out articles R² "
        f"{shown(scores['r2'])}, Spearman {shown(scores['spearman'])}, precision at "
        f"{scores['threshold']:+g}: {shown(scores['precision'])} of {scores['accepted']:.1%} "
        f"accepted (base rate {scores['base_rate']:.3f})"
    )
