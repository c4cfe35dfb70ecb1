"""docs/python.md as it stands: every snippet runs, and every public verb is in one."""

import re
from pathlib import Path

import pytest

import perplexit as px
from perplexit import errors

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
TEXT = "The committee met on Tuesday, and it discussed the budget of the coming year at length. "


@pytest.mark.slow
def test_every_snippet_of_the_page_runs(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "smollm2").symlink_to(tiny_llama_dir)
    (tmp_path / "speech.txt").write_text(TEXT * 20)
    (tmp_path / "other.txt").write_text("Nobody else was there. " * 30)
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert isinstance(names["run"], px.Run)


def test_every_public_verb_is_in_a_snippet() -> None:
    """Classes of sessions and records, which verbs give, are left out."""
    shown = set(re.findall(r"\bpx\.(\w+)", "".join(SNIPPETS)))
    verbs = {
        name
        for name in px._HOME_OF
        if not hasattr(errors, name) and not isinstance(getattr(px, name), type)
    }
    assert verbs - shown == {"check_id_lines_output"}  # a check that the command line makes
