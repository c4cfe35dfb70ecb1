"""The command group: turns every stated error into one short message and an exit code."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from perplexit.declared_options import check_finite, check_whole
from perplexit.errors import PerplexitError, TrustWarning

INTERRUPTED = 130


class StatedErrors(TyperGroup):
    """A Typer group whose commands end with the exit codes that the documentation promises.

    0 done, 1 a stated error, 2 usage, 3 a gate failed, 130 Ctrl-C. A traceback is a defect.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for command in self.commands.values():
            command.invoke = _with_numbers_checked(command.invoke)  # type: ignore

    def invoke(self, ctx: Any) -> Any:
        """Run a command; raises typer.Exit with the code of what stopped it."""
        try:
            with _trust_in_one_line():
                return super().invoke(ctx)
        except PerplexitError as error:
            _complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            raise  # the reader of a pipe went away: Typer ends quietly
        except OSError as error:
            _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _complain("interrupted; nothing that was finished is lost", kind="Stopped")
            raise typer.Exit(INTERRUPTED) from None


def _with_numbers_checked(invoke: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a command's `invoke` that first holds every number to its option's range."""

    def checked(ctx: Any) -> Any:
        for name, value in ctx.params.items():
            if type(value) is int:
                check_whole(name, value, shown=_option(name))
            elif type(value) is float:
                check_finite(_option(name), value)
        return invoke(ctx)

    return checked


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def continued_by(command: str) -> Iterator[None]:
    """Turn Ctrl-C into exit code 130 and a message with the command that continues the work."""
    try:
        yield
    except KeyboardInterrupt:
        _complain(f"interrupted; to continue where it was: {command}", kind="Stopped")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _trust_in_one_line() -> Iterator[None]:
    """Print a TrustWarning as one line for people, without the place in the code."""
    shown_otherwise = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, TrustWarning):
            _complain(str(message), kind="Warning")
        else:
            shown_otherwise(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("default", TrustWarning)
        warnings.showwarning = show
        yield


def examples(*lines: str) -> str:
    """Return an epilog for `--help` with one example per line (Typer joins adjacent lines)."""
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in lines)])


def _complain(message: str, *, kind: str = "Error") -> None:
    print(f"{kind}: {message}", file=sys.stderr)
