"""Docstrings of functions begin with a verb in the imperative: "Return …", "Score …"."""

import ast
from collections.abc import Iterator
from pathlib import Path

import perplexit

SOURCES = Path(perplexit.__file__).parent
VERBS = frozenset((Path(__file__).parent.parent / "docstring_verbs.txt").read_text().split())


def _first_words() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    place = f"{path.relative_to(SOURCES)}:{node.lineno}"
                    yield place, docstring.split()[0].rstrip(".,:;")


def test_every_function_says_what_it_does_with_a_verb() -> None:
    others = [f"{place} {word}" for place, word in _first_words() if word not in VERBS]
    assert others == []
