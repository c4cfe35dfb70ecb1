"""A run that is killed at any moment goes on where it was and ends with the same figures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import perplexit as px
from perplexit.atomic_files import is_temporary
from perplexit.errors import ResumeError, RunError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs import store
from perplexit.runs.store import RunStore
from tests.toy_sessions import BigramSession

NOT_COMPARED = ("created", "seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    rng = random.Random(0)
    words = ["the", "loss", "of", "a", "token", "is", "what", "one", "forward", "pass", "sees"]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(60)]
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(texts, tokenizer=byte_tokenizer_json, max_length=32, stride=16, output=output)


@pytest.fixture
def commit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_BETWEEN_PARTS", 0.0)


class StopsAfter(BigramSession):
    """Raises after so many batches, as Ctrl-C or a crash would."""

    def __init__(self, num_batches: int, error: BaseException, **settings: object) -> None:
        super().__init__(**settings)
        self.num_batches, self.error = num_batches, error

    def token_nll(self, windows):
        if len(self.batches) == self.num_batches:
            raise self.error
        return super().token_nll(windows)


def comparable(folder: Path) -> dict[str, object]:
    record = json.loads((folder / "run.json").read_text())
    return {k: v for k, v in record.items() if k not in (*NOT_COMPARED, "num_windows_resumed")}


def assert_same_results(folder: Path, whole: Path) -> None:
    assert comparable(folder) == comparable(whole)
    assert (folder / "tokens.parquet").read_bytes() == (whole / "tokens.parquet").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), SystemExit(143)])
def test_an_interrupted_run_goes_on(
    tokens: TokenFile, tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        px.evaluate(StopsAfter(7, error), tokens, run=tmp_path / "run", batch_size=4)
    assert px.Run.open(tmp_path / "run").status == "interrupted"
    with pytest.raises(RunError, match="interrupted"):
        _ = px.Run.open(tmp_path / "run").tokens
    session = BigramSession()
    resumed = px.evaluate(session, tokens, run=tmp_path / "run", batch_size=4)
    assert resumed.num_windows_resumed == 28
    assert len([w for batch in session.batches for w in batch]) == tokens.num_windows - 28
    px.evaluate(BigramSession(), tokens, run=tmp_path / "whole", batch_size=4)
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_a_halved_batch_is_repeated_after_a_resume(
    tokens: TokenFile, tmp_path: Path, commit_at_once: None
) -> None:
    memory = {"memory_ids": 100, "memory_from_batch": 2}
    session = StopsAfter(5, KeyboardInterrupt(), **memory)
    with pytest.raises(KeyboardInterrupt):
        px.evaluate(session, tokens, run=tmp_path / "run", batch_size=16)
    planned = px.Run.open(tmp_path / "run").batch_plan
    assert len(planned["limits"]) > 1
    resumed = px.evaluate(BigramSession(**memory), tokens, run=tmp_path / "run")
    assert resumed.batch_plan == planned
    px.evaluate(BigramSession(**memory), tokens, run=tmp_path / "whole", batch_size=16)
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_part_is_scored_again(
    tokens: TokenFile, tmp_path: Path, commit_at_once: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        px.evaluate(StopsAfter(6, KeyboardInterrupt()), tokens, run=tmp_path / "run", batch_size=4)
    parts = sorted((tmp_path / "run" / "parts").iterdir())
    assert len(parts) == 6
    damaged = bytearray(parts[2].read_bytes())
    damaged[-1] ^= 1
    parts[2].write_bytes(bytes(damaged))
    parts[4].unlink()
    resumed = px.evaluate(BigramSession(), tokens, run=tmp_path / "run", batch_size=4)
    assert resumed.num_windows_resumed == 16
    px.evaluate(BigramSession(), tokens, run=tmp_path / "whole", batch_size=4)
    assert_same_results(tmp_path / "run", tmp_path / "whole")


@pytest.mark.trap(26)
def test_trap_26_an_interrupted_run_is_not_gone_on_with_on_another_input(
    tokens: TokenFile, tmp_path: Path, byte_tokenizer_json: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        px.evaluate(StopsAfter(3, KeyboardInterrupt()), tokens, run=tmp_path / "run")
    other = px.prepare(
        ["another text altogether"] * 3,
        tokenizer=byte_tokenizer_json,
        max_length=32,
        output=tmp_path / "other.safetensors",
    )
    with pytest.raises(ResumeError, match="input_fingerprint"):
        px.evaluate(BigramSession(), other, run=tmp_path / "run")


def test_two_processes_do_not_write_to_one_run(tokens: TokenFile, tmp_path: Path) -> None:
    with RunStore(tmp_path / "run"), pytest.raises(RunError, match="another process"):
        px.evaluate(BigramSession(), tokens, run=tmp_path / "run")


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments_changes_nothing(
    tokens: TokenFile, tmp_path: Path
) -> None:
    """Every second process is killed at a random moment of its start, the others while they score.

    The last one is killed once a part is stored, so that there is something to go on from however
    slow the machine is.
    """
    folder, rng = tmp_path / "run", random.Random(20)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.faults.killable_evaluation"]
        words = [*command, str(tokens.path), str(folder), "0.15"]
        return subprocess.Popen(words, stdout=subprocess.PIPE)

    def kill(process: subprocess.Popen[bytes]) -> None:
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

    for number in range(20):
        process = start()
        if number % 2:
            assert process.stdout.readline() == b"scoring\n"
        time.sleep(rng.uniform(0.0, 1.0))
        kill(process)
    process = start()
    while not any(not is_temporary(path.name) for path in folder.glob("parts/*")):
        time.sleep(0.01)
        assert process.poll() is None
    kill(process)
    process = start()
    process.communicate(timeout=120)
    assert process.returncode == 0
    px.evaluate(BigramSession(), tokens.path, run=tmp_path / "whole", batch_size=2, top_k=2)
    assert_same_results(folder, tmp_path / "whole")
    assert px.Run.open(folder).num_windows_resumed > 0
