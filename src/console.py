"""Everything a run says goes through logging: to the screen through one rich console, and to the run's `log.txt`."""

import logging

from rich import get_console
from rich.console import Console

__all__ = ["ConsoleHandler", "leave_log_file"]


class ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, unwrapped, so that a path can be copied whole; errors go to stderr."""

    _errors = Console(stderr=True)

    def emit(self, record: logging.LogRecord) -> None:
        console = get_console() if record.levelno < logging.ERROR else self._errors
        console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def leave_log_file() -> None:
    """From now on say everything to the screen only."""
    for handler in logging.root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logging.root.removeHandler(handler)
            handler.close()
