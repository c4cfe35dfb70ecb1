"""Tiny checkpoints written tensor by tensor, and their float64 oracle: for the tests of loading."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import oracle_details, random_window

VOCAB_SIZE = 257
WINDOWS = [random_window(seed, 24 + 5 * seed, VOCAB_SIZE, index=seed) for seed in range(4)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    """A tiny Llama whose every part shows in the loss: its biases are drawn too."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.8)
    return model.eval()


def saved(model: nn.Module, folder: Path) -> Path:
    """The folder, with the model in it as save_pretrained writes it."""
    model.save_pretrained(folder)
    return folder


def edited(
    folder: Path,
    target: Path,
    *,
    tensors: Any = None,
    config: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a checkpoint with other tensors (a function of the old ones) and config fields."""
    shutil.copytree(folder, target)
    if tensors is not None:
        path = target / "model.safetensors"
        written = {k: v.contiguous() for k, v in tensors(load_file(path)).items()}
        save_file(written, path, metadata={"format": "pt"})
    path = target / "config.json"
    fields = {**json.loads(path.read_text()), **(config or {})}
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in without}))
    return target


def oracle(model: nn.Module, windows: list[WindowIds] = WINDOWS) -> np.ndarray:
    """The nll of every target by a float64 copy of the model, one window at a time."""
    double: Any = model.double().eval()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # the grouped product has no float64
    return np.concatenate([oracle_details(double, window).nll_N for window in windows])


def oracle_of(folder: Path, windows: list[WindowIds] = WINDOWS) -> np.ndarray:
    """The same of a freshly loaded folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return oracle(model, windows)


def losses(address: Any, windows: list[WindowIds] = WINDOWS, **options: Any) -> np.ndarray:
    """The nll of every target by a session on the address."""
    session = PytorchInferenceSession(address, **options)
    try:
        return np.concatenate(session.token_nll(windows))
    finally:
        session.close()
