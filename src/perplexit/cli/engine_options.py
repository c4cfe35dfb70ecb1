"""The command line's options, made of the library's own declarations."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from perplexit.declared_options import Option, declared

Command = Callable[..., None]


def takes_options(*kinds: type[Any], but_not: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of `kinds` in place of its `**options`.

    They stand where `**options` stands: behind the command's own parameters.
    """
    options = {name: entry for kind in kinds for name, entry in declared(kind).items()}
    added = [_parameter(n, *entry) for n, entry in options.items() if n not in but_not]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

        def called(**given: Any) -> None:
            command(**given)

        called.__doc__, called.__name__ = command.__doc__, command.__name__
        called.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return called

    return decorate


def _parameter(name: str, hint: Any, option: Option) -> inspect.Parameter:
    flags = [option.flag] if option.flag else []
    if hint is bool:
        flags = [f"--{name.replace('_', '-')}"]
    typed = typer.Option(
        *flags, help=option.help.replace("[", r"\["), metavar=option.metavar, min=option.lowest
    )
    if Sequence[str] in get_args(hint):
        hint = list[str] | None
    if Path in get_args(hint):  # the command line reads one type
        hint = Path | None
    annotation = Annotated[hint, typed]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=option.default, annotation=annotation)
