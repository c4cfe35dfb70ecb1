"""SIGKILL at random moments: the next call ends with the same results and leaves nothing behind.

A server that has the libraries loaded, and no thread, forks a child for each command, so that the
moments fall into the work and not into the imports.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from perplexit.atomic_files import is_temporary
from tests.proofs.share import SEED, times

NUM_KILLS = 100
NOT_COMPARED = ("created", "seconds", "tokens_per_second", "peak_memory_bytes", "folder")


@dataclass(frozen=True)
class Command:
    """A command's words; `results` gives what must be equal, by name, from its folder."""

    words: Callable[[Path, Path], list[str]]
    results: Callable[[Path], dict[str, object]]


def of_run(folder: Path) -> dict[str, object]:
    run = folder / "run"
    record = json.loads((run / "run.json").read_text())
    found: dict[str, object] = {
        key: value
        for key, value in record.items()
        if key not in (*NOT_COMPARED, "num_windows_resumed", "input_path", "tokens_sha256")
    }
    found["tokens"] = (run / "tokens.parquet").read_bytes()
    for path in sorted((run / "reference").glob("*.safetensors")):
        found[path.name] = path.read_bytes()
    return found


def of_files(*patterns: str) -> Callable[[Path], dict[str, object]]:
    def read(folder: Path) -> dict[str, object]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for pattern in patterns
            for path in sorted(folder.glob(pattern))
        }

    return read


def evaluation(*options: str) -> Command:
    return Command(
        lambda data, folder: [
            *("eval", str(data / "model"), str(data / "in.safetensors")),
            *("--run", str(folder / "run"), "--threads", "1", "--batch-size", "2", *options),
        ],
        of_run,
    )


IGF = ["--context-length", "12", "--min-length", "40"]
COMMANDS = {
    "eval": evaluation(),
    "eval --save-reference": evaluation("--save-reference"),
    "eval --top-k": evaluation("--top-k", "3"),
    "eval cached": evaluation("--mode", "cached", "--prompt-len", "4", "--decode-chunk", "4"),
    "prepare": Command(
        lambda data, folder: [
            *("prepare", str(data / "corpus.jsonl"), "--tokenizer", str(data / "model")),
            *("-o", str(folder / "out.safetensors"), "--max-length", "64"),
        ],
        of_files("out.safetensors"),
    ),
    "compile": Command(
        lambda data, folder: [
            *("compile", str(data / "model"), "--to", "onnx", "-o", str(folder / "program")),
        ],
        of_files("program/*.onnx*"),
    ),
    "igf collect": Command(
        lambda data, folder: [
            *("igf", "collect", str(data / "articles.jsonl"), "--model", str(data / "model")),
            *("-o", str(folder / "pairs.safetensors"), "--num-pairs", "40", *IGF),
        ],
        of_files("pairs.safetensors"),
    ),
    "igf finetune": Command(
        lambda data, folder: [
            *("igf", "finetune", str(data / "articles.jsonl"), "--model", str(data / "model")),
            *("-o", str(folder / "tuned"), "--checkpoints", str(folder / "checkpoints"), *IGF),
            *("--steps", "8", "--batch-size", "2", "--eval-interval", "2"),
        ],
        of_files("tuned/*.safetensors"),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import perplexit as px  # noqa: PLC0415
    from tests.tiny_models import save_tiny_model  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("kills")
    save_tiny_model("llama", folder / "model")
    words = ["a", "loss", "of", "one", "token", "in", "the", "window", "that", "it", "has", "seen"]
    draw = random.Random(1)
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 70))) for _ in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines * 10)
    (folder / "articles.jsonl").write_text(lines)
    px.prepare(texts, tokenizer=folder / "model", max_length=32, output=folder / "in.safetensors")
    return folder


FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["torch", "transformers", "onnx", "perplexit.cli.app", __name__])


def run_command(words: list[str], temporary: Path, cache: Path) -> None:
    """Run the command in this process, which was forked for it, and leave with its exit code."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    os.environ["PERPLEXIT_CACHE"] = str(cache)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed with the process
    sys.stderr = (temporary.parent / "log").open("a")
    from perplexit.cli.app import app  # noqa: PLC0415 - the child's own
    from perplexit.runs import store  # noqa: PLC0415

    store.SECONDS_BETWEEN_PARTS = 0.0
    sys.exit(app(words, standalone_mode=False))


def started(words: list[str], temporary: Path) -> multiprocessing.process.BaseProcess:
    """Return the process that runs the command with its own temporary folder."""
    cache = temporary.parent.parent / "cache"
    child = FORKING.Process(target=run_command, args=(words, temporary, cache))
    child.start()
    return child


def finished(words: list[str], temporary: Path) -> float:
    """Run the command to its end and return the seconds it took."""
    began = time.monotonic()
    child = started(words, temporary)
    child.join()
    assert child.exitcode == 0, (temporary.parent / "log").read_text()
    return time.monotonic() - began


def killed_after(delay: float, words: list[str], temporary: Path) -> bool:
    """Run the command and kill it after `delay` seconds; whether it was still at work then."""
    child = started(words, temporary)
    time.sleep(delay)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def moments() -> list[tuple[str, int]]:
    """(command, seed) of each kill: the commands in turn."""
    names = list(COMMANDS)
    return [(names[index % len(names)], SEED + index) for index in range(times(NUM_KILLS))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_kill_at_any_moment_loses_nothing_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    whole: dict[str, tuple[float, dict[str, object], set[str]]] = {}
    kept: dict[str, set[str]] = {}  # what an engine itself leaves in the temporary folder
    for name in {name for name, _ in moments()}:
        folder, temporary = tmp_path / name / "out", tmp_path / name / "tmp"
        folder.mkdir(parents=True)
        temporary.mkdir()
        words = COMMANDS[name].words(data, folder)
        finished(words, temporary)
        results, names = COMMANDS[name].results(folder), contents(folder)
        assert results
        shutil.rmtree(folder)
        folder.mkdir()
        seconds = finished(words, temporary)  # the second time nothing is compiled or cached
        whole[name] = (seconds, results, names)
        assert COMMANDS[name].results(folder) == results, f"{name} is not repeatable"
        kept[name] = contents(temporary)
    for name, seed in moments():
        seconds, results, names = whole[name]
        folder = tmp_path / f"{name} {seed}" / "out"
        temporary = folder.parent / "tmp"
        for new in (folder, temporary):
            new.mkdir(parents=True)
        words = COMMANDS[name].words(data, folder)
        delay = random.Random(seed).uniform(0, seconds)
        while not killed_after(delay, words, temporary):  # it had ended: the machine is quicker now
            delay *= 0.7
            shutil.rmtree(folder)
            folder.mkdir()
        finished(words, temporary)
        assert COMMANDS[name].results(folder) == results, (name, seed)
        left = contents(folder) - names
        assert not left, (name, seed, left)
        assert contents(temporary) <= kept[name], (name, seed)
        hidden = [path for path in (tmp_path / "cache").rglob("*") if is_temporary(path.name)]
        assert not hidden, (name, seed)
        shutil.rmtree(folder.parent)
