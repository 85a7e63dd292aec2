"""Everything a run says goes through logging: to the screen through one rich console, and to the run's `log.txt`."""

import logging

from rich import get_console

__all__ = ["ConsoleHandler"]


class ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, unwrapped, so that a path can be copied whole."""

    def emit(self, record: logging.LogRecord) -> None:
        get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)
