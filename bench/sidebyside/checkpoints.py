"""Checkpoints, each made once: SmolLM2, random weights, and a small GPT-2 that is trained here."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

import perplexit.igf as igf
from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.cli.demo_files import MODEL_FILE, MODEL_PACKAGE, packaged_file
from perplexit.igf.losses import context_losses
from sidebyside.alternation import say
from sidebyside.contenders import TABLES
from sidebyside.workloads import speech_files

_random: Any = AutoModelForCausalLM.from_config  # transformers leaves its arguments untyped
_tokenizer: Any = PreTrainedTokenizerFast


def checkpoint(folder: Path, sizes: dict[str, Any]) -> Path:
    """Return the folder of a model with random weights: its shapes and costs, no language.

    sizes: a configuration of transformers; an empty one stands for the packaged
        SmolLM2-135M-Instruct, its weights as float32, in a folder of its own.
    """
    if not sizes:
        return Path(dequantized_folder(packaged_file(MODEL_PACKAGE, MODEL_FILE)))
    if not (folder / "config.json").exists():
        set_seed(0)
        config = AutoConfig.for_model(**sizes)
        dtype = config.dtype or torch.float32
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            _random(config, dtype=torch.float32).to(dtype).save_pretrained(folder)
    return folder


def small_gpt2(folder: Path, last_year: int, steps: int) -> Path:
    """Train a GPT-2 of 1.1 million parameters on addresses up to 1899 or 1999; keep it in `folder`.

    1899: a tokenizer from the same addresses, steps of 16 windows of 64 ids. 1999: that model and
    tokenizer, 0.4 times as many steps more on all addresses up to then.
    """
    target, files = folder / f"gpt2-{last_year}", speech_files(1790, last_year)
    if (target / "config.json").exists():
        return target
    if last_year == 1899:
        sizes, end = TABLES["small_gpt2"], "<|endoftext|>"
        encoder: Any = ByteLevelBPETokenizer()
        options = {"min_frequency": 0, "show_progress": False, "special_tokens": [end]}
        encoder.train([str(file) for file in files], vocab_size=sizes["vocab_size"], **options)
        tokenizer = _tokenizer(tokenizer_object=encoder._tokenizer, eos_token=end)
        torch.manual_seed(0)
        model = _random(AutoConfig.for_model(**sizes), dtype=torch.float32)
        rate = 2e-3
    else:
        start = small_gpt2(folder, 1899, steps)
        tokenizer = _tokenizer.from_pretrained(start)
        torch.manual_seed(1)
        model = igf.load_model(start)
        steps, rate = steps * 2 // 5, 1e-3
    tokenizer.save_pretrained(target)
    articles = igf.read_articles(files, target)
    _tune(model, torch.cat([torch.from_numpy(ids) for ids in articles.ids]).long(), steps, rate)
    model.save_pretrained(target)
    return target


def _tune(model: nn.Module, ids: torch.Tensor, steps: int, rate: float) -> None:
    """Take AdamW steps with one cycle of the learning rate, on 16 windows of 64 ids each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (16,))
        loss = context_losses(model, torch.stack([ids[s : s + 64] for s in starts])).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    say(f"small GPT-2: loss {float(loss.detach()):.3f} after {steps} steps")
