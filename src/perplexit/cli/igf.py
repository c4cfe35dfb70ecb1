"""`perplexit igf`: the group of commands for Information Gain Filtration."""

import typer

from perplexit.cli import igf_collect, igf_experiment, igf_finetune, igf_train
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
app.command("collect", epilog=igf_collect.EXAMPLES)(igf_collect.collect)
app.command("train", epilog=igf_train.EXAMPLES)(igf_train.train)
app.command("finetune", epilog=igf_finetune.EXAMPLES)(igf_finetune.finetune)
app.command("experiment", epilog=igf_experiment.EXAMPLES)(igf_experiment.experiment)
