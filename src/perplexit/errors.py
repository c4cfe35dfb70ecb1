"""Every exception that Perplexit raises on purpose.

Each message says three things: what was expected, what came, what to do. The command line prints
the message alone and exits with `exit_code`; a traceback means a bug in Perplexit.

All are PerplexitErrors. An OutputError is a UsageError too, a VocabularyError a ModelError, a
CacheMismatchError a CapabilityError, an UnknownPrecisionError a QuantizationError and a UsageError,
a ResumeError a RunError.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class PerplexitError(Exception):
    """The root of the tree: catch this to catch everything Perplexit raises on purpose."""

    exit_code = 1


class UsageError(PerplexitError, ValueError):
    """Arguments that contradict each other or lie outside their range (exit code 2)."""

    exit_code = 2


class OutputError(UsageError):
    """An output that would overwrite an input or something of the user's; raised before any work.

    Nothing is wrong with the command itself, so its exit code is 1.
    """

    exit_code = 1


class CorpusError(PerplexitError):
    """Text that cannot be read, lacks the named column, or holds no document."""


class TokenizerError(PerplexitError):
    """A tokenizer that cannot be loaded, or that returns no tokens for text."""


class TokenFileError(PerplexitError):
    """A token file that is damaged, of another version, or not a token file."""


class FingerprintMismatchError(PerplexitError):
    """Two inputs, texts or models that must be identical differ; the message says in what."""


class ModelError(PerplexitError):
    """A checkpoint or compiled program that cannot be loaded."""


class VocabularyError(ModelError):
    """Token ids that the model has no row for."""


class CapabilityError(PerplexitError):
    """A session was asked for something that it cannot do; raised before anything runs."""


class CacheMismatchError(CapabilityError):
    """A model gives other figures with its key/value cache than without."""


class QuantizationError(PerplexitError):
    """A precision that the engine does not have, or that would have quantized nothing."""


class UnknownPrecisionError(QuantizationError, UsageError):
    """A precision that no engine knows by that name (exit code 2, as for a dtype)."""

    exit_code = 2


class CompilationError(PerplexitError):
    """A compilation that failed, or whose program disagrees with the checkpoint."""


class EngineOutOfMemoryError(PerplexitError):
    """An engine ran out of memory; the batch is halved until one window alone does not fit."""


class NonFiniteError(PerplexitError):
    """A scored token's loss is NaN or infinite; the message names window, position and token."""


class EmptyScoreError(PerplexitError):
    """No token (or byte, or word) was scored, so the figure asked for does not exist."""


class RunError(PerplexitError):
    """A run folder that is damaged, incomplete, or of another schema version."""


class ResumeError(RunError):
    """A run folder made under other conditions than those asked for; the message lists them."""


class MemoryBoundError(PerplexitError):
    """A stated memory bound was exceeded; the message gives bound and peak."""


class MissingPackageError(PerplexitError, ImportError):
    """An optional package is missing; the message is the command that installs it."""


@contextmanager
def needing(what: str, install: str, package: str | None = None) -> Iterator[None]:
    """Raise MissingPackageError where an import inside the block fails, but not of Perplexit's own.

    what: what needs the package, as the message begins. package: None names the one that fails.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingPackageError) or (error.name or "").startswith("perplexit"):
            raise
        missing = package or error.name
        raise MissingPackageError(f"{what} needs the package {missing}: {install}") from error


class GateError(PerplexitError):
    """A comparison lies outside a bound that was stated for it."""

    exit_code = 3


class TrustWarning(UserWarning):
    """A file's own code is about to run with the user's rights: a pickle, or a native program."""
