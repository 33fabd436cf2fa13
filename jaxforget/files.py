"""Files that appear complete or not at all, written by one process.

Of several processes that run one program on one file system, the first writes. The others wait for it, so that every
process finds the same files: all of them must call these functions, in the same order.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxforget.errors import RunError, UserError

T = TypeVar("T")


def leads() -> bool:
    """Say whether this process writes and speaks."""
    import jax

    return jax.process_index() == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("files")


def through_first(act: Callable[[], T]) -> T:
    """Let the first process act. All get what it returns, or the UserError or RunError it raises.

    For what may look otherwise from another process: a database, a lock, what lies in a directory. `act` must not wait
    for the others.
    """
    import jax

    if jax.process_count() == 1:
        return act()
    from jax.experimental import multihost_utils

    told = b""
    if leads():
        try:
            told = pickle.dumps((act(), None))
        except (UserError, RunError) as error:
            told = pickle.dumps((None, error))
    # Lengths first: what is sent must have one shape everywhere.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    padded = np.frombuffer(told.ljust(length, b"\0"), np.uint8)
    value, raised = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if raised is not None:
        raise raised
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file by one rename."""
    if leads():
        write_alone(path, content)
    wait_for_all()


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz by one rename."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # numpy's stubs take any name here for its `allow_pickle`
    write_atomic(path, content.getvalue())


def write_alone(path: Path, content: str | bytes) -> None:
    """Write a file by one rename in this process, whatever others do: one that is not shared."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a failed write does not say of what
        raise


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Give a directory to write into that appears under its name by one rename.

    What a process that does not lead writes into its own is dropped. Raises UserError where `directory` exists and is
    not empty.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory; choose another")
    wait_for_all()  # before anybody writes, so that all see the same
    if leads():
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, directory)  # also over an empty directory
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    else:
        with tempfile.TemporaryDirectory() as dropped:
            yield Path(dropped)
    wait_for_all()


def remove(*paths: str | Path) -> None:
    """Remove files and directories, those that are there."""
    for path in map(Path, paths) if leads() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    wait_for_all()
