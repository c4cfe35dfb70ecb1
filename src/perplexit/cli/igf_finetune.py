"""`perplexit igf finetune`: fine-tune a model on the contexts that a filter accepts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, people, print_json, tell

_NOT_ASKED = ("output", "checkpoints", "threads", "json", "force")  # they do not change the weights
EXAMPLES = examples(
    "perplexit igf finetune addresses/ --model gpt2/ --learner learner -o tuned/",
    "perplexit igf finetune old/ --test new/ --model gpt2/ --method standard -o tuned/",
    "perplexit igf finetune old/ --model smollm2/ --learner learner --lora-rank 8 -o adapter/",
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
        typer.Option(help="Modules to adapt, divided by commas. \\[default: PEFT's own]"),
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
    people().print(_sentence(name, curve, folder))
    if given["json"]:
        document = {"method": name, "selection": selection.to_json(), **curve.to_json()}
        print_json({**document, "settings": asdict(settings), "output": str(folder)})


def _sentence(name: str, curve: Any, folder: Path) -> str:
    first, last = curve.perplexities()[0], curve.perplexities()[-1]
    return (
        f"{name}: test perplexity {first:.5g} → {last:.5g} in {curve.steps[-1]} steps, "
        f"{curve.tokens_trained:,} ids trained on of {curve.tokens_judged:,} judged by the filter; "
        f"the model is in {folder}"
    )
