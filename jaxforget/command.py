"""The frame all commands share: flags from a dataclass, presets, one-sentence errors, progress, the final table."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from jaxforget.errors import RunError, UserError
from jaxforget.files import leads, wait_for_all
from jaxforget.launch import LaunchConfig, joined, launched, leave
from jaxforget.report.page import cell
from jaxforget.report.run import program


def main(run: Callable[[Any], None], presets: Mapping[str, Any], argv: Sequence[str] | None = None) -> None:
    """Parse flags over a preset (`--preset NAME`, else the first) and run.

    Exit codes: 0 done; 1 the run failed (a non-finite loss, say); 2 the input or a flag is wrong, in one sentence.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name = _preset_name(argv, presets)
        import tyro

        listed = "; ".join(f"{key}: {(make.__doc__ or '').strip().splitlines()[0]}" for key, make in presets.items())
        told = tyro.conf.arg(help=f"Settings that other flags change. {listed}.")
        choice: Any = Annotated[Literal[tuple(presets)], told]
        _lists_once(argv, type(presets[name]()))
        preset = presets[name]()
        flags = {"config": preset, "launch": LaunchConfig()}
        unnamed = [(field, Annotated[type(value), tyro.conf.arg(name="")], value) for field, value in flags.items()]
        both: Any = tyro.cli(
            dataclasses.make_dataclass("Flags", [("preset", choice, name), *unnamed]),
            args=argv,
            prog=program(),
            description=(type(preset).__doc__ or "").strip(),
        )
        configure_jax()
        with launched(both.launch, both.config):
            if not leads():
                sys.stdout = open(os.devnull, "w")  # one process speaks for all; errors are told by each
            run(both.config)
            wait_for_all()  # for as long as it takes: the library's own end of processes has a time limit
    except UserError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read it has gone, as in `--help | head`
        leave(1)
    except KeyboardInterrupt:
        _fail("interrupted; run again with --resume", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room and use --resume", 1)
        if not joined():
            raise
        traceback.print_exc()
        leave(1)


def script() -> None:
    """Run the command that this program is named after: `train.unlearn` is `python -m train.unlearn`."""
    module = importlib.import_module(Path(sys.argv[0]).name)
    main(module.run, module.PRESETS)


def _preset_name(argv: list[str], presets: Mapping[str, Any]) -> str:
    """Take --preset out of argv and return its value."""
    for index, word in enumerate(argv):
        if word == "--preset" or word.startswith("--preset="):
            value = word.partition("=")[2] if "=" in word else (argv[index + 1] if index + 1 < len(argv) else "")
            del argv[index : index + (1 if "=" in word else 2)]
            if value not in presets:
                raise UserError(f"unknown --preset {value!r}; valid presets are {', '.join(presets)}")
            return value
    return next(iter(presets))


def _lists_once(argv: list[str], kind: type) -> None:
    """Raise UserError for a flag of many values that is given twice: the first values would be lost without a word."""
    lists = set(_lists(kind))
    given = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for flag in given:
        if flag.removeprefix("--").rpartition(".")[2] in lists and given.count(flag) > 1:
            raise UserError(f"{flag} is given twice; give it once, followed by all its values")


def _lists(kind: type) -> Iterator[str]:
    """Name the fields with many values, without what stands before their dots."""
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _lists(hint)
        elif typing.get_origin(hint) is tuple:
            yield name.replace("_", "-")


def _fail(message: object, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    leave(code)


def configure_jax() -> None:
    """Keep compiled programs between processes, so that a second run starts at once; silence advice we do not need."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxforget" / "xla"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback from every thread besides raising what we tell
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def at_least(low: int, **settings: int) -> None:
    """Raise UserError naming the flag unless every setting is at least `low` and below 2**31."""
    for name, value in settings.items():
        if not low <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {low} and below 2**31")


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[Any], None]]:
    """Show a bar with rate and time left. Yields `show(progress)` for the training loop.

    Without a terminal it prints a line at most every ten seconds.
    """
    if sys.stderr.isatty() and leads():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>14}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=None, rate="")

            def move(now: Any) -> None:
                rate = f"{now.tokens_per_second:,.0f} tok/s"
                bar.update(task, completed=now.step, total=now.steps, rate=rate)

            yield move
        return
    last = time.monotonic()

    def show(now: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            left = now.seconds / max(now.step, 1) * (now.steps - now.step)
            say(f"{label}: step {now.step}/{now.steps}, {now.tokens_per_second:,.0f} tokens/s, {left:,.0f} s left")

    yield show


def say(message: str) -> None:
    """Tell the user something that is not a result."""
    if leads():
        print(message, file=sys.stderr, flush=True)


def print_table(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], title: str) -> None:
    """End a command with its numbers: the first columns that fit the terminal, no number cut short."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    table, room = Table(title=title, title_justify="left"), console.width - 1
    columns: list[list[str]] = []
    for field in fields:
        head, column = field.replace("_", " "), [cell(row.get(field), row.get(f"{field}_ci95")) for row in rows]
        # Names and numbers stand whole, sentences may go over several lines.
        width = max(map(len, (*head.split(), *(text if field == "name" else text[:18] for text in column))))
        room -= width + 3
        if room < 0 and columns:
            table.caption = f"{len(fields) - len(columns)} more columns in results.json"
            break
        table.add_column(head, justify="left" if field == "name" else "right", min_width=width)
        columns.append(column)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    console.print(table)
