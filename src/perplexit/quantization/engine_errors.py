"""An engine's own exceptions as Perplexit's: out of memory, or a program that does not run."""

from perplexit.errors import EngineOutOfMemoryError, ModelError, PerplexitError

_OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "could not allocate",
    "failed to allocate memory",
    "not enough memory",
    "out of memory",
)


def engine_error(engine: str, task: str, error: Exception) -> PerplexitError:
    """Return EngineOutOfMemoryError or ModelError, with the first line of the engine's message.

    task: what the engine was to do, such as "load the program".
    """
    said = next((line for line in str(error).splitlines() if line.strip()), repr(error)).strip()
    if isinstance(error, MemoryError) or any(x in str(error).lower() for x in _OUT_OF_MEMORY):
        return EngineOutOfMemoryError(f"{engine} ran out of memory and failed to {task}: {said}")
    return ModelError(f"{engine} failed to {task}: {said}")
