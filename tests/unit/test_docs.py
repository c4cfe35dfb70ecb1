"""The documentation says what is so: links, commands, options, traps, figures."""

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from perplexit.cli.app import app

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402 - a script, not a package

# Traps of the parts that exist; the others belong to parts that are still to come.
COVERED = {*range(1, 15), *range(18, 21), *range(22, 28), 30, 31, 33, 34, 35, 40}


def _examples() -> Iterator[str]:
    """Every `perplexit …` line in the documentation's shell blocks."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield from (
                line.partition("#")[0].strip()
                for line in block.splitlines()
                if line.startswith("perplexit ") and "[" not in line and "{" not in line
            )


def test_the_command_page_is_what_the_commands_say() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == generate.command_page(), "run `make docs`"


def test_no_link_is_broken() -> None:
    assert list(generate.broken_links()) == []


def test_every_measured_figure_names_a_command_that_exists() -> None:
    assert list(generate.figures_without_command()) == []


@pytest.mark.parametrize("example", sorted(set(_examples())))
def test_every_example_uses_commands_and_options_that_exist(example: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(example)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    unknown = {word for word in words if word.startswith("-")} - known - {"--help"}
    assert unknown == set()


@pytest.mark.parametrize("number", sorted(COVERED))
def test_every_trap_of_what_exists_has_a_test(number: int) -> None:
    assert generate.trap_tests().get(number), f"no test is marked trap({number})"


def test_the_trap_page_lists_the_tests() -> None:
    page = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
    assert page == generate.trap_page(page), "run `make docs`"


def test_make_setup_installs_every_extra() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:COMPILED_)?EXTRAS +:= (.*)$", makefile, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = extras["project"]["optional-dependencies"].keys() - {"all", "liger"}  # CUDA alone
    assert {name for line in listed for name in re.split(r"[, ]", line)} == declared


def test_all_is_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras.pop("all")
    extras.pop("liger")  # kernels that run on CUDA alone
    assert everything == f"perplexit[{','.join(extras)}]"


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("# A\n[b](b.md) [a](#a) [c](#c) [web](https://x.org)\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert list(generate.broken_links()) == [
        "README.md: b.md is not there",
        "README.md: #c names no heading",
    ]


def test_a_figure_without_its_command_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Makefile").write_text("demo:\n\ttrue\n")
    table = "| figure | measured by |\n|---|---|\n| 1 s | `make demo` |\n| 2 s | `make it` |\n"
    (tmp_path / "README.md").write_text(table)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    found = list(generate.figures_without_command())
    assert len(found) == 1
    assert "make it" in found[0]
