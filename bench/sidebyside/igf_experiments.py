"""The experiments of information gain filtration: labels, learners, methods × seeds, figures.

Addresses by year: objective 2000-2012, test 2013-2026, candidates up to 1999. A killed call
continues where it was.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import perplexit.igf as igf
from perplexit.igf.articles import Articles
from perplexit.igf.losses import context_losses
from sidebyside.alternation import Bench, say
from sidebyside.contenders import TABLES
from sidebyside.igf_labels import OBJECTIVE_YEARS, POOL_YEARS
from sidebyside.workloads import speech_files

TEST_YEARS = (2013, 2026)
VOCAB_SIZE = 2048


def experiment(bench: Bench, name: str) -> dict[str, Any]:
    """Make labels, both learners, the experiment and its figure; return a row for each method."""
    torch.set_num_threads(bench.threads)
    asked, folder = TABLES["experiments"][name], bench.subfolder("igf-quick" * bench.quick or "igf")
    if bench.quick:
        asked = asked | TABLES["quick_experiment"]
    years, out = asked["model_years"], folder / name
    out.mkdir(exist_ok=True)
    path = small_gpt2(folder, years, 30 if bench.quick else 1000) if years else bench.model("demo")
    model, train = igf.load_model(path), igf.read_articles(speech_files(*POOL_YEARS), path)
    pairs = igf.collect_pairs(
        model,
        igf.ContextStream(train, 32, seed=1_000_000).take(0, asked["num_pairs"]),
        igf.objective_contexts(igf.read_articles(speech_files(*OBJECTIVE_YEARS), path), seed=3),
        output=out / "pairs.safetensors",
        mode="first-order",
        rule=igf.StepRule(learning_rate=asked["pair_rate"]),
        model_name=asked["title"],
    )
    learners = {kind: _learner(kind, pairs, model, asked, out) for kind in ("ridge", "cnn")}
    seconds = json.loads((out / "pairs.seconds.json").read_text("utf-8"))
    test = igf.read_articles(speech_files(*TEST_YEARS), path)
    document = igf.run_experiment(
        model,
        train,
        igf.objective_contexts(test, number=asked["num_test"], seed=4),
        plan=igf.ExperimentPlan(
            methods=tuple(asked["methods"]),
            seeds=tuple(range(asked["num_seeds"])),
            settings=igf.FinetuneSettings(**asked["finetune"]),
        ),
        output=out / "experiment",
        learner=learners["ridge"],
        labelling={**seconds, "num_pairs": len(pairs), "mode": "first-order"},
        model_name="a GPT-2 of 4 layers" if years else "SmolLM2-135M-Instruct",
        title=asked["title"],
    )
    igf.draw_experiment(document, out / "experiment")
    compared = {row["method"]: row for row in document["comparisons"]}
    rows = [_row(name, m, compared.get(name, {})) for name, m in document["methods"].items()]
    scores = {kind: learner.record["scores"] for kind, learner in learners.items()}
    return {"rows": rows, "learners": scores}


def _learner(kind: Any, pairs: Any, model: Any, asked: dict[str, Any], out: Path) -> Any:
    """Return the learner that was trained before, or train it."""
    if not (out / f"{kind}.json").exists():
        options = {"learning_rate": asked["learner_rate"], "max_epochs": 40, "batch_size": 32}
        igf.save_learner(igf.train_learner(pairs, kind=kind, model=model, **options), out / kind)
    return igf.load_learner(out / kind)


def _row(method: str, found: dict[str, Any], compared: dict[str, Any]) -> dict[str, Any]:
    """Return a method's final perplexity, its ratio to the first one's, and its cost."""
    return {
        "method": method,
        "accepted": found["acceptance"],
        "perplexity": [found[f"{end}_perplexity"][-1] for end in ("low", "median", "high")],
        "ratio": [compared.get(f"ratio{end}") for end in ("_low", "", "_high")],
        "p (t)": compared.get("p_t_holm"),
        "p (Wilcoxon)": compared.get("p_wilcoxon_holm"),
        "seeds better": compared.get("seeds_better"),
        "of": found["num_seeds"],
        "seconds": ", ".join(f"{part} {s:.1f}" for part, s in found["seconds"].items()),
    }


def small_gpt2(folder: Path, last_year: int, steps: int) -> Path:
    """Train a GPT-2 of 1.1 million parameters on addresses up to 1899 or 1999; keep it in `folder`.

    1899: a byte-level BPE of 2,048 ids from the same addresses, four layers of width 128, no
    dropout, steps of 16 windows of 64 ids. 1999: that model and tokenizer, 0.4 times as many
    steps more on all addresses up to then.
    """
    target = folder / f"gpt2-{last_year}"
    if (target / "config.json").exists():
        return target
    if last_year == 1899:
        tokenizer = _trained_tokenizer(speech_files(1790, last_year))
        sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_positions": 256, "n_embd": 128}
        sizes |= {"n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes))
        rate = 2e-3
    else:
        start = small_gpt2(folder, 1899, steps)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        torch.manual_seed(1)
        model = igf.load_model(start)
        steps, rate = steps * 2 // 5, 1e-3
    tokenizer.save_pretrained(target)
    _tune(model, igf.read_articles(speech_files(1790, last_year), target), steps, rate)
    model.save_pretrained(target)
    return target


def _tune(model: nn.Module, articles: Articles, steps: int, rate: float) -> None:
    """Take AdamW steps with one cycle of the learning rate, on 16 windows of 64 ids each."""
    flat = torch.cat([torch.from_numpy(ids) for ids in articles.ids]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(flat) - 64, (16,))
        loss = context_losses(model, torch.stack([flat[s : s + 64] for s in starts])).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    say(f"small GPT-2: loss {float(loss.detach()):.3f} after {steps} steps")


def _trained_tokenizer(files: list[Path]) -> Any:
    tokenizer: Any = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    options = {"min_frequency": 0, "show_progress": False, "special_tokens": [end]}
    tokenizer.train([str(file) for file in files], vocab_size=VOCAB_SIZE, **options)
    make: Any = PreTrainedTokenizerFast  # transformers leaves its arguments untyped
    return make(tokenizer_object=tokenizer._tokenizer, eos_token=end)
