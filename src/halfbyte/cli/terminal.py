"""What every command shares: two consoles, errors as one line, progress with the time left, JSON out."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import rich.progress
import typer
from rich.console import Console
from rich.text import Text

from halfbyte.errors import HalfbyteError, OutputError
from halfbyte.evaluation.units import duration

Progress = Callable[[int, int, str], None]

INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say it in one red line on stderr and end the program."""
    err.print(Text(" ".join(message.split()), style="red"), soft_wrap=True)
    raise typer.Exit(code)


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with what a user can mend said in one line instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HalfbyteError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("stopped", INTERRUPTED)

    return wrapped


def write_json(value: Any, file: Path) -> None:
    """Write plain values to a file, or to stdout where it is `-`. OutputError where it cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if str(file) == "-":
        typer.echo(text)
        return
    try:
        file.expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{file} cannot be written ({cause.strerror}): give --json another file") from cause


def console_beside(json_file: Path | None) -> Console:
    """Where tables go: stdout, unless that is for JSON."""
    return err if json_file is not None and str(json_file) == "-" else out


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr, or a line for each step where that is a file."""
    left = TimeLeft()
    if not err.is_terminal:

        def line(done: int, total: int, what: str) -> None:
            err.print(f"{what}{left(done, total)}", soft_wrap=True)

        yield line
        return
    columns = ("{task.description}", rich.progress.BarColumn(), "{task.percentage:>3.0f} %{task.fields[left]}")
    with rich.progress.Progress(*columns, rich.progress.TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task("reading the model", total=None, left="")

        def move(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, left=left(done, total))

        yield move


def hush_transformers() -> None:
    """No bars of transformers' own between ours."""
    # transformers takes a second to import, which commands that do without it must not wait for.
    from transformers.utils import logging

    logging.disable_progress_bar()


class TimeLeft:
    """The time that the rest takes at the mean speed so far, in words."""

    def __init__(self) -> None:
        self._start: float | None = None

    def __call__(self, done: int, total: int) -> str:
        if self._start is None:
            self._start, self._first = time.monotonic(), done
        worked = done - self._first
        if worked <= 0 or done >= total:
            return ""
        return f", {duration((time.monotonic() - self._start) / worked * (total - done))} left"
