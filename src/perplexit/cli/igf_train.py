"""`perplexit igf train`: train a secondary learner on pairs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, people, print_json
from perplexit.igf.training_options import NetworkOptions

EXAMPLES = examples(
    "perplexit igf train pairs.safetensors -o learner",
    "perplexit igf train pairs.safetensors --kind cnn --model gpt2/ -o learner-cnn",
)


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
    people().print(f"{kind} learner in {path}: {_sentence(learner.record['scores'])}")
    options.tell_doubt(learner)
    if given["json"]:
        print_json({"learner": kind, "output": str(path), **learner.record})


def _sentence(scores: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return (
        f"on {scores['num_pairs']} pairs of {scores['num_articles']} held-out articles R² "
        f"{shown(scores['r2'])}, Spearman {shown(scores['spearman'])}, precision at "
        f"{scores['threshold']:+g}: {shown(scores['precision'])} of {scores['accepted']:.1%} "
        f"accepted (base rate {scores['base_rate']:.3f})"
    )
