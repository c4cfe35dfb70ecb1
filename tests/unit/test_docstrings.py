"""Docstrings of functions begin with a verb in the imperative: "Return …", "Score …"."""

import ast
from collections.abc import Iterator
from pathlib import Path

import perplexit

SOURCES = Path(perplexit.__file__).parent
VERBS = frozenset(
    """
Abort Add Allocate Begin Bring Call Change Check Choose Close Collect Commit Compare Compile
Complete Compute Convert Copy Count Cut Describe Divide Do Download Draw Drop End Enter Estimate
Export Feed Fill Find Fine-tune Fold Forbid Free Give Go Group Hide Hold Import Keep Label
Launch Leave Let List Load Lock Make Map Mean Measure Move Name Note Open Overwrite Pack Pad
Parse Prepare Print Put Quantize Raise Read Record Refuse Release Remember Remove Rename Render
Replace Reset Reshape Restore Return Round Run Save Say Score See Send Serve Set Share Show Skip
Spell Split Start Stop Switch Take Tell Tokenise Trace Train Turn Use Wait Warn Wrap Write Yield
""".split()
)


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
