"""What compilers print and raise, turned into silence and one kind of error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from perplexit.checkpoints.quiet import quiet_logger
from perplexit.errors import CompilationError


@contextmanager
def stated_by(ability: str, *, logger: str) -> Iterator[None]:
    """Raise CompilationError for whatever fails inside the block; hide warnings and remarks.

    ability: of the compiler, as it follows "expected a model that": "PyTorch can export".
    logger:  whose remarks on packages and deprecations are not the user's; errors still show.
    """
    try:
        with quiet_logger(logger), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CompilationError:
        raise
    except Exception as error:  # the compilers' errors have no common root
        first_line = str(error).strip().partition("\n")[0]
        raise CompilationError(
            f"expected a model that {ability}; {type(error).__name__}: {first_line}. "
            "Evaluate the checkpoint with PyTorch instead (hf:…)"
        ) from error
