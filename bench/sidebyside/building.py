"""Checkpoints and compiled programs, each made once, in a process that ends with it."""

from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import perplexit as px
from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.cli.demo_files import MODEL_FILE, MODEL_PACKAGE, packaged_file


def demo_model() -> Path:
    """SmolLM2-135M-Instruct as packaged, its weights as float32."""
    return Path(dequantized_folder(packaged_file(MODEL_PACKAGE, MODEL_FILE)))


def random_gpt2(folder: Path) -> Path:
    """GPT-2 of 124M parameters with random weights: its shapes and costs, no language."""
    if not (folder / "config.json").exists():
        set_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


def compiled(model: Path, folder: Path, to: str, quantization: str | None) -> Path:
    """The checkpoint as a program, with the head inside where the engine can."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        px.compile(model, to=to, output=folder, quantization=quantization, perplexity=to != "gguf")
    return folder
