"""How far a bench is."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Telling:
    """A bar over the sections with what is going on; plain lines where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("bench", total=total)

    def __call__(self, what: str) -> None:
        self.bar.update(self.task, description=what)
        if not self.console.is_terminal and "round" not in what:
            self.console.print(what, highlight=False)

    def done(self, what: str) -> None:
        self(what)
        self.bar.advance(self.task)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
