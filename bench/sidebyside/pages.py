"""The generated parts of a Markdown page, each between two marks of its own."""

from collections.abc import Iterable
from pathlib import Path


def write_part(page: Path, part: str, lines: Iterable[str]) -> None:
    """Put the lines between `<!-- PART: begin -->` and `<!-- PART: end -->`, and nothing else.

    Raises ValueError where the page has no such marks.
    """
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"expected the lines {begin} and {end} in {page}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    written = "\n".join(lines)
    page.write_text(f"{head}{begin}\n\n{written}\n\n{end}{tail}", encoding="utf-8")
