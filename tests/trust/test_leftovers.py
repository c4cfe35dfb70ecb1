"""D8: what a killed process or a full disk leaves behind is removed by the next call."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perplexit import atomic_files as files
from perplexit.atomic_files import (
    RETIRED,
    TEMPORARY,
    TemporaryFolder,
    kept_folder,
    remove_leftovers,
    replaced_folder,
    temporary_folder,
    write_atomically,
)
from perplexit.inputs.tensor_container import TensorSpool
from perplexit.runs.store import PARTS_FOLDER, RunStore

_DIE = """
import os, signal
from pathlib import Path
from perplexit.atomic_files import *
from perplexit.atomic_files import TemporaryFolder
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
target = Path({target!r})
{body}
"""


def killed_while(body: str, target: Path) -> None:
    code = _DIE.format(target=str(target), body=body)
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def nothing_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())


@pytest.mark.parametrize(
    ("body", "again"),
    [
        ("write_atomically(target, die)", lambda t: write_atomically(t, lambda p: p.touch())),
        ("kept_folder(target, 'proof', die)", None),
        ("with temporary_folder(target) as f: (f / 'x').touch(); die()", None),
        ("with replaced_folder(target) as f: (f / 'x').touch(); die()", None),
    ],
)
def test_d8_what_a_kill_left_is_removed_by_the_next_writer(
    tmp_path: Path, body: str, again: Callable[[Path], None] | None
) -> None:
    target = tmp_path / "result"
    killed_while(body, target)
    assert len(names(tmp_path)) == 1
    assert names(tmp_path)[0].endswith(TEMPORARY)
    (again or (lambda t: write_atomically(t, lambda p: p.write_text("new"))))(target)
    assert names(tmp_path) == ["result"]


def test_d8_a_program_that_was_retired_is_brought_back(tmp_path: Path) -> None:
    target = tmp_path / "program"
    target.mkdir()
    (target / "old").touch()
    body = "Path.rename = lambda a, b, r=Path.rename: (r(a, b), b.suffix == RETIRED and die())\n"
    killed_while(body + "with replaced_folder(target) as f: (f / 'new').touch()", target)
    assert "program" not in names(tmp_path)
    assert any(name.endswith(RETIRED) for name in names(tmp_path))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["program"]
    assert names(target) == ["old"]


def test_d8_sibling_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    code = _DIE.format(
        target=str(tmp_path / "result"),
        body="import time\nwith temporary_folder(target):\n print('there', flush=True)\n"
        " time.sleep(60)",
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 1
        other.kill()
        other.wait()
    files._swept.clear()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_d8_sibling_another_machines_files_and_the_users_own_stay(tmp_path: Path) -> None:
    own = files._owner(os.getpid())
    host, pid, started = own.split("-")
    kept = [
        f".a.{'0' * 8}-{pid}-1.abcdefgh{TEMPORARY}",  # another machine's
        f".a.{own}.abcdefgh{TEMPORARY}",  # of this process
        f"a{TEMPORARY}",
        ".hidden",
        f".a.{host}-{pid}.abcdefgh{TEMPORARY}",
    ]
    for name in kept:
        (tmp_path / name).touch()
    reused = tmp_path / f".a.{host}-{pid}-{int(started) - 7200}.abcdefgh{TEMPORARY}"
    reused.touch()  # the process id is in use again, by a process that began later
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_d8_sibling_leftovers_of_a_run_folder_and_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / PARTS_FOLDER).mkdir(parents=True)
    for place in ("run.json", "parts/part-1.safetensors", "tokens.parquet"):
        killed_while("write_atomically(target, die)", folder / place)
    with RunStore(folder):
        assert names(folder) == [".lock", PARTS_FOLDER]
        assert names(folder / PARTS_FOLDER) == []


def test_d8_sibling_scratch_folders_of_the_system_s_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    killed_while("f = TemporaryFolder('input'); die()", tmp_path)
    killed_while("f = TemporaryFolder('reference'); die()", tmp_path)
    assert names(tmp_path)
    folder = TemporaryFolder("reference")
    assert names(tmp_path) == [Path(folder.name).name]
    folder.cleanup()
    TemporaryFolder("input").cleanup()
    assert names(tmp_path) == []


def test_d8_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in `write`, and again in `close`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))

    def fill() -> None:
        with TensorSpool(tmp_path / "out", {"ids": ("I32", ())}) as spool:
            for _ in range(100):
                spool.append("ids", np.zeros(999, np.int32))

    try:
        with pytest.raises(OSError, match="File too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_d8_sibling_looking_costs_once_per_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", lambda path: path.touch())
    host, pid, _ = files._owner(os.getpid()).split("-")
    late = tmp_path / f".a.{host}-{pid}-5.abcdefgh{TEMPORARY}"
    late.touch()
    began = time.monotonic()
    for _ in range(50):
        remove_leftovers(tmp_path)
    assert late.exists()
    assert time.monotonic() - began < 5
    with temporary_folder(tmp_path / "b"), replaced_folder(tmp_path / "c"):
        pass
    kept_folder(tmp_path / "d", "proof", lambda staging: (staging / "proof").touch())
    assert names(tmp_path) == [late.name, "a", "c", "d"]
