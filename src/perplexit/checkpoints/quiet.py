"""Libraries without their progress bars and hints, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from transformers.utils import logging


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Let only errors of that logger through inside the block."""
    logger = getLogger(name)
    level = logger.level
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let only errors reach stderr inside the block, and restore the settings afterwards."""
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with quiet_logger("accelerate"):  # it reports every layer that goes to disk
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
