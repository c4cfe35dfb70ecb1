"""`perplexit igf finetune`: a model, tuned on what the filter lets through."""

from pathlib import Path
from typing import Annotated, Any

import typer

from perplexit import igf
from perplexit.cli import igf_options as options
from perplexit.cli.command_group import continued_by, examples
from perplexit.cli.output import Force, people, print_json, stdout_kept_clean, tell

_NOT_ASKED = ("output", "checkpoints", "threads", "json", "force")  # of what decides the weights
EXAMPLES = examples(
    "perplexit igf finetune addresses/ --model gpt2/ --learner learner -o tuned/",
    "perplexit igf finetune old/ --test new/ --model gpt2/ --method standard -o tuned/",
    "perplexit igf finetune old/ --model smollm2/ --learner learner --lora-rank 8 -o adapter/",
)


def finetune(
    context: typer.Context,
    corpus: options.Corpus,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the model is written.")
    ],
    learner: Annotated[
        Path | None, typer.Option(help="A secondary learner; none: standard fine-tuning.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="standard, igf-constant, igf-shifting, igf-quantile, random-skip, high-loss or "
            "perplexity-band. \\[default: igf-shifting with a learner, else standard]"
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Of igf-constant, and of igf-shifting's first 10 steps.")
    ] = 1.0,
    share: Annotated[
        float, typer.Option(help="Of candidates accepted, for quantile, random and loss methods.")
    ] = 0.25,
    test: options.TestCorpus = None,
    num_test: Annotated[int, typer.Option(min=1, help="Test contexts.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Accepted contexts a step.")] = 16,
    micro_batch: Annotated[int, typer.Option(min=1, help="Contexts a forward pass.")] = 16,
    context_length: Annotated[int, typer.Option(min=2, help="Ids of a context.")] = 32,
    min_length: Annotated[
        int, typer.Option(min=1, help="Test articles are longer than this, in ids.")
    ] = 1026,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, no weight decay.")] = 5e-5,
    eval_interval: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 10,
    dropout: Annotated[bool, typer.Option("--dropout", help="Train with dropout.")] = False,
    seed_compatible: Annotated[
        bool,
        typer.Option(
            "--seed-compatible",
            help="The original's gradient: cleared at every context, so the last one alone.",
        ),
    ] = False,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train low-rank adapters (PEFT) of this rank only.")
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Modules to adapt, by commas. \\[default: PEFT's own]")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep a checkpoint here, and continue from it."),
    ] = None,
    seed: options.Seed = 0,
    tokenizer: options.TokenizerOption = None,
    allow_pickle: options.AllowPickle = False,
    threads: options.Threads = None,
    force: Force = False,
    json: options.AsJson = False,
) -> None:
    """Fine-tune on the contexts that the filter accepts, before the model reads them.

    With --checkpoints a run that was stopped continues when the same command is given again.
    """
    name = method or ("standard" if learner is None else "igf-shifting")
    options.refuse_idle_of_methods(context, [name])
    if lora_rank is None:
        options.refuse_idle(context, "lora_targets", because="no --lora-rank is given")
    inputs = [model, *corpus, *(test or ()), learner]
    asked = {k: _plain(v) for k, v in context.params.items() if k not in _NOT_ASKED}
    igf.model_output(output, inputs=inputs, request=asked, force=force)
    with continued_by("the same command"), stdout_kept_clean(), options.bar("Steps") as draw:
        options.use_threads(threads)
        read = {"tokenizer": tokenizer or model, "allow_pickle": allow_pickle}
        train, held = igf.train_and_test(
            options.one_or_many(corpus),
            None if not test else options.one_or_many(test),
            number=num_test,
            length=context_length,
            min_len=min_length,
            **read,
        )
        tuned = igf.load_model(model)
        learned = options.learner_to_use(learner)
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
            context_length,
            learner=learned,
            share=share,
            constant=threshold,
            seed=seed,
        )
        settings = igf.FinetuneSettings(
            steps=steps,
            batch_size=batch_size,
            context_length=context_length,
            learning_rate=learning_rate,
            eval_interval=eval_interval,
            seed=seed,
            micro_batch=micro_batch,
            dropout=dropout,
            seed_compatible=seed_compatible,
        )
        curve = igf.finetune_model(
            tuned,
            train,
            held,
            selection=selection,
            settings=settings,
            checkpoint=checkpoints,
            progress=None
            if draw is None
            else lambda p: draw(p.step, p.total_steps, f"test perplexity {p.test_perplexity:.4g}"),
        )
        folder = igf.save_model(tuned, output, inputs=inputs, request=asked, force=force)
    people().print(_sentence(name, curve, folder))
    if json:
        document = {"method": name, "selection": selection.to_json(), **curve.to_json()}
        print_json({**document, "settings": settings.to_json(), "output": str(folder)})


def _plain(value: Any) -> Any:
    """An option's value as JSON holds it."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _sentence(name: str, curve: Any, folder: Path) -> str:
    first, last = curve.perplexities()[0], curve.perplexities()[-1]
    return (
        f"{name}: test perplexity {first:.5g} → {last:.5g} in {curve.steps[-1]} steps, "
        f"{curve.tokens_trained:,} ids learnt from of {curve.tokens_judged:,} looked at; "
        f"the model is in {folder}"
    )
