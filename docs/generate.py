"""Write the generated documentation, or with --check say what is out of date (exit code 1).

    docs/cli.md     every command with its arguments, options and examples, from the Typer app
    docs/traps.md   the last column: the tests that bear each trap's marker
    docs/file-formats.md   the table of the columns of `tokens.parquet`

`--check` also follows every relative link, and looks up the command beside every measured figure.
"""

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from perplexit.cli.app import app
from perplexit.token_columns import TOKEN_COLUMNS, Needs

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def command_page() -> str:
    """docs/cli.md."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="perplexit")
    lines = ["# The command line", "", "Written by `make docs` from the commands themselves.", ""]
    for name, command in _commands("perplexit", group, context):
        lines += _command_section(name, command, typer.Context(command, info_name=name))
    return "\n".join(lines).rstrip() + "\n"


def _commands(name: str, command: Any, context: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from _commands(f"{name} {child.name}", child, context)


def _command_section(name: str, command: Any, context: Any) -> list[str]:
    lines = [f"## {name}", "", _plain(command.help or ""), "", "```sh"]
    lines += [f"{name} {' '.join(command.collect_usage_pieces(context))}", "```", ""]
    rows = [p.get_help_record(context) for p in command.get_params(context)]
    rows = [row for row in rows if row is not None]
    if rows:
        lines += ["| | |", "|---|---|"]
        lines += [f"| `{_cell(left)}` | {_cell(_plain(right))} |" for left, right in rows] + [""]
    subcommands = getattr(command, "commands", {}).values()
    if subcommands:
        lines += ["| command | |", "|---|---|"]
        lines += [
            f"| `{c.name}` | {_cell(_plain(c.get_short_help_str(200)))} |" for c in subcommands
        ] + [""]
    if command.epilog:
        shown = [_plain(line) for line in command.epilog.split("\n\n")[1:]]
        lines += ["```sh", *shown, "```", ""]
    return lines


def _plain(text: str) -> str:
    return text.replace("\\[", "[").strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def trap_page(page: str) -> str:
    """docs/traps.md with its last column filled in from the tests' markers."""
    tests = trap_tests()
    lines = []
    for line in page.splitlines():
        match = re.match(r"\| *(\d+) *\|", line)
        if match is None:
            lines.append(line)
            continue
        named = ", ".join(f"`{name}`" for name in tests.get(int(match[1]), [])) or "not yet"
        lines.append(" | ".join([*line.split(" | ")[:2], f"{named} |"]))
    return "\n".join(lines) + "\n"


def format_page(page: str) -> str:
    """docs/file-formats.md with the table of per-token columns filled in from their schema."""
    lines = ["| column | type | unit | needs | meaning | not known |", "|---|---|---|---|---|---|"]
    for column in TOKEN_COLUMNS.values():
        kind = f"list of {column.dtype}" if column.is_list else column.dtype
        cells = [f"`{column.name}`", kind, column.unit, column.needs, column.meaning]
        absent = "null" if column.needs not in (Needs.INPUT, Needs.LOSS) else column.unknown
        lines.append(f"| {' | '.join([*cells, absent])} |")
    begin, end = "<!-- columns -->", "<!-- end of columns -->"
    before, _, rest = page.partition(begin)
    return "\n".join([before + begin, *lines, end + rest.partition(end)[2]])


def trap_tests() -> dict[int, list[str]]:
    """The tests marked `trap(N)`, by N, as `folder/file.py::name`."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for number in _trap_numbers(node.decorator_list):
                    found[number].append(f"{path.relative_to(ROOT / 'tests')}::{node.name}")
    return dict(found)


def _trap_numbers(decorators: list[ast.expr]) -> Iterator[int]:
    for decorator in decorators:
        for node in ast.walk(decorator):  # also inside pytest.param(marks=...)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "trap"
            ):
                yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def broken_links() -> Iterator[str]:
    """A sentence for every relative link that leads nowhere."""
    for page in _pages():
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                yield f"{page.relative_to(ROOT)}: {target} is not there"
            elif anchor and anchor not in _anchors(file):
                yield f"{page.relative_to(ROOT)}: {target} names no heading"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def figures_without_command() -> Iterator[str]:
    """A sentence for every row of a table headed `measured by` whose command does not exist."""
    for page in _pages():
        column = None
        for line in page.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            if not line.startswith("|"):
                column = None
            elif "measured by" in cells:
                column = cells.index("measured by")
            elif column is not None and not set(line) <= set("|-: "):
                command = cells[column].strip("`") if len(cells) > column else ""
                if not command_exists(command):
                    yield f"{page.relative_to(ROOT)}: {line.strip()}: no command `{command}`"


def command_exists(command: str) -> bool:
    """Whether `make TARGET`, `perplexit COMMAND …`, `pytest PATH` or `python PATH` can be run."""
    program, _, rest = command.partition(" ")
    words = [word for word in rest.split() if not word.startswith("-")]
    if program == "make" and words:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        return all(re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE) for word in words)
    if program == "perplexit" and words:
        return words[0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if program in {"python", "pytest"} and words:
        return (ROOT / words[0].partition("::")[0]).exists()
    return False


def _pages() -> list[Path]:
    return [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]


def _generated() -> dict[Path, str]:
    traps, formats = ROOT / "docs" / "traps.md", ROOT / "docs" / "file-formats.md"
    return {
        formats: format_page(formats.read_text(encoding="utf-8")),
        ROOT / "docs" / "cli.md": command_page(),
        traps: trap_page(traps.read_text(encoding="utf-8")),
    }


def main() -> int:
    """0 where everything is in order (or was written)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    complaints = []
    for path, text in _generated().items():
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            complaints.append(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        elif not check:
            path.write_text(text, encoding="utf-8")
    if check:
        complaints += [*broken_links(), *figures_without_command()]
    print(*complaints, sep="\n", end="\n" if complaints else "", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
