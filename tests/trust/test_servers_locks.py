"""Development dependencies: one version each, with the hashes of its files, the same everywhere."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted(ROOT.glob("requirements-*.lock"))
PINNED = [*LOCKS, ROOT / "requirements-demo.txt", ROOT / "requirements-test.txt"]
_ENTRY = re.compile(r"^([a-z0-9._-]+)(?:\[[a-z,]+\])?==([^ ;\\]+)", re.MULTILINE)


def _name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def _versions(path: Path) -> dict[str, str]:
    return {_name(name): version for name, version in _ENTRY.findall(path.read_text())}


def test_there_is_a_lock_for_the_environment_and_for_each_extra_that_compiles() -> None:
    makefile = (ROOT / "Makefile").read_text()
    compiled = re.search(r"^COMPILED_EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert compiled
    wanted = {"dev", *compiled[1].split()}
    assert {path.stem.removeprefix("requirements-") for path in LOCKS} == wanted
    assert "--require-hashes" in makefile


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.name)
def test_every_package_is_one_version_with_the_hashes_of_its_files(path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    assert lines
    for line in lines:
        requirement, *hashes = line.split("--hash=")
        assert _ENTRY.match(requirement), line
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes), line


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.name)
def test_no_lock_names_a_host_or_a_folder(path: Path) -> None:
    assert not re.search(r"://|index-url|find-links|file:|@ ", path.read_text())


def test_the_locks_and_the_constraints_agree() -> None:
    """`make lock` writes the locks again after a change of constraints-dev.txt."""
    constraints = _versions(ROOT / "constraints-dev.txt")
    found: dict[str, str] = {}
    for path in LOCKS:
        for name, version in _versions(path).items():
            assert found.setdefault(name, version) == version, f"{name} in {path.name}"
            assert constraints.get(name, version) == version, f"{name} in {path.name}: make lock"
    assert set(constraints) - set(found) == {"torch"}, "make lock"


def test_everything_that_is_asked_for_is_locked() -> None:
    """Torch aside: which of its builds is right depends on the machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"]]
    for extra, requirements in project["project"]["optional-dependencies"].items():
        asked += [] if extra == "liger" else requirements  # CUDA kernels
    for group in project["dependency-groups"].values():
        asked += [requirement for requirement in group if isinstance(requirement, str)]
    locked = {name for path in LOCKS for name in _versions(path)}
    assert {_name(requirement) for requirement in asked} - locked == {"perplexit", "torch"}
