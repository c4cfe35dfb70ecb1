"""The corpus and the models of the IGF benchmarks: State of the Union addresses by year.

    objective  2000-2012      test  2013-2026      train  up to 1999 (or as a setting says)

`python bench/igf_corpus.py` trains the small GPT-2. Nothing is downloaded.
"""

import re
from pathlib import Path
from typing import Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from perplexit.cli.demo_files import TEXT_FILE, TEXT_PACKAGE, packaged_file
from perplexit.igf.articles import Articles, read_articles
from perplexit.igf.language_model import load_model
from perplexit.igf.losses import context_losses

OBJECTIVE_YEARS = (2000, 2012)
TEST_YEARS = (2013, 2026)
VOCAB_SIZE = 2048


def speeches_of(first: int, last: int) -> list[Path]:
    """Return the addresses of these years, oldest first."""
    folder = packaged_file(TEXT_PACKAGE, TEXT_FILE).parent
    dated = [(int(re.match(r"\d+", p.name)[0]), p) for p in folder.glob("*.txt")]  # type: ignore[index]
    return [path for year, path in sorted(dated) if first <= year <= last]


def articles_of(first: int, last: int, tokenizer: Path) -> Articles:
    """Return the addresses of these years as token ids."""
    return read_articles(speeches_of(first, last), tokenizer)


def small_gpt2(folder: Path, last_year: int) -> Path:
    """Train a GPT-2 of 1.1 million parameters on addresses up to 1899 or 1999; keep it in `folder`.

    1899: a byte-level BPE of 2,048 ids from the same addresses, four layers of width 128, no
    dropout, 1,000 steps of 16 windows of 64 ids. 1999: that model and tokenizer, 400 steps more
    on all addresses up to then.
    """
    target = folder / f"gpt2-{last_year}"
    if (target / "config.json").exists():
        return target
    if last_year == 1899:
        tokenizer = _train_tokenizer(speeches_of(1790, last_year))
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "n_positions": 256,
            "n_embd": 128,
            "n_layer": 4,
        }
        sizes |= {"n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes))
        steps, rate = 1000, 2e-3
    else:
        start = small_gpt2(folder, 1899)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        torch.manual_seed(1)
        model = load_model(start)
        steps, rate = 400, 1e-3
    tokenizer.save_pretrained(target)
    _tune(model, articles_of(1790, last_year, target), steps, rate)
    model.save_pretrained(target)
    return target


def _tune(model: nn.Module, articles: Articles, steps: int, rate: float) -> None:
    """Take AdamW steps with one cycle of the learning rate, on 16 windows of 64 ids each."""
    flat = torch.cat([torch.from_numpy(ids) for ids in articles.ids]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(0, len(flat) - 64, (16,))
        loss = context_losses(model, torch.stack([flat[s : s + 64] for s in starts])).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {float(loss.detach()):.3f}", flush=True)


def _train_tokenizer(files: list[Path]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(f) for f in files], trainer)
    make: Any = PreTrainedTokenizerFast  # transformers leaves its arguments untyped
    return make(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def main(folder: Path = Path("build/igf"), last_year: int = 1899, threads: int = 2) -> None:
    """Train the small GPT-2 of the IGF benchmarks on old addresses: up to 1899 or to 1999."""
    torch.set_num_threads(threads)
    small_gpt2(folder, last_year)


if __name__ == "__main__":
    typer.run(main)
