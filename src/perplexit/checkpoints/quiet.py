"""Transformers without its progress bars and hints, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let only errors reach stderr inside the block, and restore the settings afterwards."""
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    accelerate = getLogger("accelerate")  # it reports every layer that goes to disk
    accelerate_level = accelerate.level
    accelerate.setLevel(ERROR)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        accelerate.setLevel(accelerate_level)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
