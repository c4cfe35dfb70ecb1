"""A follower of a tensor-parallel group: loads its part of the model and takes every step."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.checkpoints.module_call import num_embeddings
from perplexit.errors import PerplexitError
from perplexit.sessions.pytorch.device_choice import scoring_settings
from perplexit.sessions.pytorch.forward_probe import find_forward
from perplexit.sessions.pytorch.tensor_parallel import (
    accelerator_type,
    check_split,
    end_with_leader,
    join,
    take_steps,
)


def follow(told: str) -> None:
    """Serve the leader that started this process with `told`, a JSON object, until it stops."""
    end_with_leader()
    try:
        _follow(json.loads(told))
    except PerplexitError:  # the leader meets the same, and says it
        sys.exit(1)


def _follow(settings: dict[str, Any]) -> None:
    rank, size, dtype = settings["rank"], settings["size"], settings["dtype"]
    kind = accelerator_type()
    device = torch.device(kind, rank) if kind != "cpu" else torch.device("cpu")
    join(rank, size, settings["port"], device)
    module = load_checkpoint(
        settings["model"], dtype=dtype, device=None, options=settings["options"], split_over=size
    ).model
    check_split(module, size)
    with scoring_settings(module, settings["threads"], owned=True):
        # The same probe as the leader's, step by step: it runs the layers too.
        forward, _ = find_forward(module, num_embeddings(module) or 2)
        take_steps(forward, device, getattr(torch, dtype))
    dist.destroy_process_group()
