"""Collections and fine-tunings that are killed go on and end in the same bytes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perplexit.checkpoints.module_identity import module_fingerprint
from perplexit.errors import CorpusError, ResumeError
from perplexit.igf.articles import Articles
from perplexit.igf.collection import collect_pairs
from perplexit.igf.finetuning import finetune_model
from perplexit.igf.optimizer_step import StepRule
from perplexit.igf.pairs import Pairs
from perplexit.igf.random_contexts import ContextStream, objective_contexts
from perplexit.igf.selection import random_skip
from perplexit.igf.training_options import FinetuneSettings
from perplexit.runs.parts_folder import lock_folder
from tests.tiny_models import TINY_MODELS

LENGTH = 12


def articles(seed: int, count: int = 6) -> Articles:
    random = [np.random.default_rng([seed, i]) for i in range(count)]
    return Articles.of([r.integers(2, 320, 60) for r in random])


TRAIN = articles(1)
OBJECTIVE = objective_contexts(articles(2), number=5, length=LENGTH, min_len=20)
TEST = objective_contexts(articles(3), number=5, length=LENGTH, min_len=20)
CONTEXTS = ContextStream(TRAIN, LENGTH, 7).take(0, 11)


def collect(output: Path, model: str = "gpt2", **options: object) -> Pairs:
    return collect_pairs(
        TINY_MODELS[model](), CONTEXTS, OBJECTIVE, output=output, part_size=3, **options
    )


@pytest.mark.parametrize("mode", ["exact", "first-order", "directional"])
def test_two_collections_give_the_same_file(tmp_path: Path, mode: str) -> None:
    for name in ("a", "b"):
        collect(tmp_path / f"{name}.safetensors", mode=mode)
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("a", "b"))
    assert first == second
    assert not (tmp_path / "a.safetensors.parts").exists()


@pytest.mark.parametrize("dropout", [False, True])
def test_a_collection_cut_at_any_part_resumes_to_the_same_file(
    tmp_path: Path, dropout: bool
) -> None:
    whole = tmp_path / "whole.safetensors"
    collect(whole, dropout=dropout)

    class Cut(BaseException):
        pass

    for stop_at in (3, 6, 9):
        output = tmp_path / f"cut-{stop_at}.safetensors"

        def stop(update, stop_at: int = stop_at) -> None:
            if update.num_pairs >= stop_at:
                raise Cut

        with pytest.raises(Cut):
            collect(output, dropout=dropout, progress=stop)
        assert not output.exists()
        seen = []
        collect(output, dropout=dropout, progress=seen.append)
        assert output.read_bytes() == whole.read_bytes()
        assert seen[0].num_pairs_resumed == stop_at


_COLLECT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.faults.test_igf_resume import collect
collect(Path(sys.argv[1]), progress=lambda update: time.sleep(0.4))
"""


def test_a_killed_collection_resumes_to_the_same_file(tmp_path: Path) -> None:
    collect(tmp_path / "whole.safetensors")
    output = tmp_path / "killed.safetensors"
    command = [sys.executable, "-c", _COLLECT, str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env=environment)
    parts = output.with_name(output.name + ".parts")
    deadline = time.monotonic() + 120
    while not list(parts.glob("part-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert 1 <= len(list(parts.glob("part-*.safetensors"))) < 4
    collect(output)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_damaged_part_is_measured_again(tmp_path: Path) -> None:
    collect(tmp_path / "whole.safetensors")
    output = tmp_path / "pairs.safetensors"

    def stop(update) -> None:
        if update.num_pairs >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(output, progress=stop)
    part = next(iter(sorted((tmp_path / "pairs.safetensors.parts").glob("part-*"))))
    part.write_bytes(part.read_bytes()[:30])
    collect(output)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_second_process_does_not_write_to_the_same_collection(tmp_path: Path) -> None:
    output = tmp_path / "pairs.safetensors"
    with (
        lock_folder(tmp_path / "pairs.safetensors.parts", "collection", "wait", ResumeError),
        pytest.raises(ResumeError, match="another process is writing to the collection"),
    ):
        collect(output)
    collect(output)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "pairs.safetensors",
        "pairs.seconds.json",
    ]


@pytest.mark.trap(26)
@pytest.mark.parametrize(
    "change",
    [
        {"rule": StepRule(learning_rate=1e-3)},
        {"mode": "first-order"},
        {"model": "llama"},
        {"dropout": True},
    ],
)
def test_parts_of_other_conditions_are_not_taken_over(tmp_path: Path, change: dict) -> None:
    output = tmp_path / "pairs.safetensors"

    def stop(update) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(output, progress=stop)
    with pytest.raises(ResumeError, match="differ; name another output"):
        collect(output, **change)
    collect(output)
    with pytest.raises(ResumeError, match="differ; name another output"):
        collect(output, **change)


def test_objective_and_candidates_never_share_an_article() -> None:
    leak = objective_contexts(TRAIN, number=5, length=LENGTH, min_len=20)
    with pytest.raises(CorpusError, match="both in objective and in contexts"):
        collect_pairs(TINY_MODELS["gpt2"](), CONTEXTS, leak)


SETTINGS = FinetuneSettings(
    steps=6, batch_size=3, context_length=LENGTH, eval_interval=2, learning_rate=1e-3
)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_cut_finetuning_resumes_to_the_same_weights(tmp_path: Path, dropout: bool) -> None:
    settings = replace(SETTINGS, dropout=dropout)
    whole = TINY_MODELS["gpt2"]()
    expected = finetune_model(whole, TRAIN, TEST, selection=random_skip(0.5), settings=settings)

    def stop(update) -> None:
        if update.step == 5:
            raise KeyboardInterrupt

    options = {"selection": random_skip(0.5), "settings": settings, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, progress=stop, **options)
    model = TINY_MODELS["gpt2"]()
    curve = finetune_model(model, TRAIN, TEST, **options)
    assert curve.num_steps_resumed == 4
    assert curve.test_loss == expected.test_loss
    assert curve.num_candidates == expected.num_candidates
    assert module_fingerprint(model) == module_fingerprint(whole)


def test_a_checkpoint_of_another_finetuning_is_refused(tmp_path: Path) -> None:
    finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, settings=SETTINGS, checkpoint=tmp_path)
    other = replace(SETTINGS, seed=5)
    with pytest.raises(ResumeError, match=r"settings\.seed \(0 and 5\) differ"):
        finetune_model(TINY_MODELS["gpt2"](), TRAIN, TEST, settings=other, checkpoint=tmp_path)
    longer = replace(SETTINGS, steps=8)  # more steps of the same are no other fine-tuning
    model = TINY_MODELS["gpt2"]()
    curve = finetune_model(model, TRAIN, TEST, settings=longer, checkpoint=tmp_path)
    assert curve.steps == [0, 2, 4, 6, 8]
