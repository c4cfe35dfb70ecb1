"""`perplexit igf`: the group of commands for Information Gain Filtration."""

import typer

from perplexit.cli import igf_finetune, igf_learner
from perplexit.cli.command_group import StatedErrors, examples

app = typer.Typer(
    cls=StatedErrors,
    no_args_is_help=True,
    help="Learn which contexts teach a model most, and fine-tune on those.",
    epilog=examples(
        "perplexit igf collect addresses/ --model gpt2/ --mode first-order -o pairs.safetensors",
        "perplexit igf train pairs.safetensors -o learner",
        "perplexit igf finetune addresses/ --model gpt2/ --learner learner -o tuned/",
        "perplexit igf experiment addresses/ --model gpt2/ --learner learner -o experiment/",
    ),
)
app.command("collect", epilog=igf_learner.COLLECT_EXAMPLES)(igf_learner.collect)
app.command("train", epilog=igf_learner.TRAIN_EXAMPLES)(igf_learner.train)
app.command("finetune", epilog=igf_finetune.FINETUNE_EXAMPLES)(igf_finetune.finetune)
app.command("experiment", epilog=igf_finetune.EXPERIMENT_EXAMPLES)(igf_finetune.experiment)
