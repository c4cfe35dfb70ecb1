"""Checkpoints, each made once, in a process that ends with it."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.cli.demo_files import MODEL_FILE, MODEL_PACKAGE, packaged_file


def demo_model(folder: Path | None = None) -> Path:
    """Return the packaged SmolLM2-135M-Instruct, its weights as float32, in a folder of its own."""
    del folder
    return Path(dequantized_folder(packaged_file(MODEL_PACKAGE, MODEL_FILE)))


def random_gpt2(folder: Path) -> Path:
    """Make a GPT-2 of 124M parameters with random weights: its shapes and costs, no language."""
    return _random(folder, GPT2LMHeadModel, GPT2Config())


def random_llama(folder: Path, config: dict[str, Any]) -> Path:
    """Make a Llama of that configuration with random weights."""
    return _random(folder, LlamaForCausalLM, LlamaConfig(**config))


def _random(folder: Path, architecture: Any, config: Any) -> Path:
    if not (folder / "config.json").exists():
        set_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = architecture(config).to(config.dtype or torch.float32)
        model.save_pretrained(folder)
    return folder
