"""`perplexit eval` against a brute-force loop over `model.forward`, for random settings.

The loop knows nothing of Perplexit: it tokenises, puts the BOS where the policy says, walks over
the text by the protocol's definition, and takes a float64 log-softmax of whole logits.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from perplexit.cli.app import app
from perplexit.runs.run import Run

SENTENCES = [
    "Nobody had read this text before; it was written for this test alone.",
    "The ferry left at four, and with it the last chance to be home by dark.",
    "Wer zweimal misst, misst besser – 17 °C, 3⁄4 voll, naïve café, 你好, 🦊.",
    "\tint main(void) { return 42; }\n\n",
    "She counted the lamps: one, two, three, four, five, and then none.",
]


def losses_by_hand(
    model: torch.nn.Module, ids: list[int], max_length: int, stride: int, bos: str, bos_id: int
) -> dict[int, float]:
    """Target index → nll: windows of `max_length` ids every `stride`, each target scored once."""
    ahead = [bos_id] if bos == "first" else []
    text = ahead + ids
    room = max_length - 1 if bos == "every" else max_length
    advance = min(stride, max_length - 1)
    found: dict[int, float] = {}
    start = 0
    while True:
        stop = min(start + room, len(text))
        begin = max(0, stop - room)
        fed = ([bos_id] if bos == "every" else []) + text[begin:stop]
        offset = begin - (len(fed) - (stop - begin))
        with torch.no_grad():
            logits = model(torch.tensor([fed])).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        for position in range(1, len(fed)):
            target = offset + position - len(ahead)
            if target not in found:
                found[target] = -float(logprobs[position - 1, fed[position]])
        if stop == len(text):
            return found
        start += advance


def check(folder: Path, model_dir: Path, text: str, seed: int, longest: int) -> None:
    rng = random.Random(seed)
    max_length = rng.randint(2, longest)
    stride = rng.randint(1, max_length)
    bos = rng.choice(["none", "first", "every"])
    if bos == "every" and max_length == 2:
        stride = 1
    batch_size = rng.choice(["auto", "1", "3", "7"])
    corpus = folder / f"text-{seed}.txt"
    corpus.write_text(text, encoding="utf-8", newline="")
    prepared, run_dir = folder / f"{seed}.safetensors", folder / f"run-{seed}"
    prepare = f"prepare {corpus} --tokenizer {model_dir} -o {prepared} --max-length {max_length}"
    evaluate = f"eval {model_dir} {prepared} --run {run_dir} --batch-size {batch_size} --json"
    runner = CliRunner()
    for command in (f"{prepare} --stride {stride} --bos {bos}", f"{evaluate} --threads 1"):
        result = runner.invoke(app, command.split())
        assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    ids = (
        Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    bos_id = json.loads((model_dir / "config.json").read_text())["bos_token_id"]
    expected = losses_by_hand(model, ids, max_length, stride, bos, bos_id)
    rows = Run.open(run_dir).tokens
    assert rows.token_index.tolist() == sorted(expected)  # each declared target exactly once
    assert sorted(expected) == list(range(0 if bos != "none" else 1, len(ids)))
    by_hand = np.array([expected[index] for index in rows.token_index.tolist()])
    assert np.abs(rows.nll - by_hand).max() < 1e-4
    assert record["perplexity"] == pytest.approx(math.exp(by_hand.mean()), rel=1e-5)
    assert record["num_tokens"] == len(expected)


@pytest.mark.trap(7)
@pytest.mark.trap(11)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_gemma2_dir", "tiny_gpt2_dir"])
def test_trap_7_every_target_once_and_right(
    model: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text = " ".join(random.Random(seed).choices(SENTENCES, k=2 + seed % 4))
    check(tmp_path, request.getfixturevalue(model), text, seed, longest=64)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("seed", [100, 101])
def test_the_real_model_on_a_text_written_for_this_test(
    real_model_dir: Path, tmp_path: Path, seed: int
) -> None:
    check(tmp_path, real_model_dir, " ".join(SENTENCES * 3), seed, longest=128)
