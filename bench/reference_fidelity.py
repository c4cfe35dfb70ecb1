"""How exact a stored reference is on a real model, and a model to hold against it.

    python bench/reference_fidelity.py damage MODEL OUT          noise into one weight matrix
    python bench/reference_fidelity.py check INPUT MODEL CANDIDATE RUN...

`check` prints, for each RUN of CANDIDATE that was held against a reference of MODEL, how far its KL
column is from float64 KL of whole logits, over every sixth window.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM

import perplexit as px

LAYER, SHARE = 12, 0.5
EVERY = 6
app = typer.Typer()


@app.command()
def damage(model: Path, output: Path) -> None:
    """Add noise of half its standard deviation to one layer's down projection."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    weight = network.model.layers[LAYER].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * weight.std() * SHARE)
    network.save_pretrained(output)


@app.command()
def check(tokens: Path, model: Path, candidate: Path, runs: list[Path]) -> None:
    """Print the largest and the mean difference of each run's KL column."""
    file, load = px.TokenFile.open(tokens), AutoModelForCausalLM.from_pretrained
    networks: list[Any] = [load(path, dtype=torch.float32) for path in (model, candidate)]
    columns = [px.Run.open(run).tokens for run in runs]
    errors: list[list[np.ndarray]] = [[] for _ in runs]
    for index in range(0, file.num_windows, EVERY):
        window = file.window_ids(index)
        with torch.no_grad():
            ids = torch.tensor([window.ids_T.tolist()])
            logits = [m(ids).logits[0][window.targets_N - 1].double() for m in networks]
        p, q = (x.log_softmax(-1) for x in logits)
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        for found, rows in zip(errors, columns, strict=True):
            assert rows.kl is not None  # the candidates were evaluated with --reference
            found.append(np.abs(kl - rows.kl[rows.window == index]))
    for run, found in zip(runs, errors, strict=True):
        error = np.concatenate(found)
        print(f"{run}: {len(error):,} tokens, largest {error.max():.1e}, mean {error.mean():.1e}")


if __name__ == "__main__":
    app()
