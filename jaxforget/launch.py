"""The processes of a run and the mesh over their devices: flags that every command has."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

from jaxforget.errors import RunError, UserError
from jaxforget.models.sharding import make_mesh

PATIENCE = 300  # seconds in which all processes must have been started
SILENCE = 30  # seconds without a sign of life after which a process counts as dead
STOPPED = "another process of this run has stopped; start all of them again with --resume"
# What the library says, in errors of several types, when it no longer hears of another process.
GONE = re.compile(r"gloo|nccl|heartbeat|coordination service|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)
_kept: list = []  # C code does not keep what it may call


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where a command runs. It changes results only by rounding, and may differ when a run is resumed."""

    mesh: str | None = None
    """Devices along each axis, such as data=2,fsdp=4: data spreads rows, fsdp rows and parameters, tensor products,
    member the members of an ensemble or a sweep. Not given: one device."""
    coordinator: str | None = None
    """Run in several processes: HOST:PORT of the first, the same for all; auto takes what SLURM, Open MPI, Kubernetes
    or a TPU pod say. Default: JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """With --coordinator HOST:PORT: how many processes there are. Default: JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """With --coordinator HOST:PORT: which of them this is, from 0. Default: JAX_PROCESS_ID."""

    def __post_init__(self):
        coordinator = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        numbers = {"processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        for field, variable in numbers.items():
            value = getattr(self, field)
            if value is None and (text := os.environ.get(variable)) is not None:
                if not text.isdecimal():
                    raise UserError(f"{variable} is {text!r}; it must be a whole number")
                value = int(text)
            flag = f"--{field.replace('_', '-')}"
            if coordinator in (None, "auto") and getattr(self, field) is not None:
                raise UserError(f"{flag} goes with --coordinator HOST:PORT")
            if coordinator not in (None, "auto") and value is None:
                raise UserError(f"--coordinator {coordinator} needs {flag}, or {variable}")
            object.__setattr__(self, field, value)  # frozen for everybody else
        object.__setattr__(self, "coordinator", coordinator)
        if coordinator is None or coordinator == "auto" or self.process_id is None or self.processes is None:
            return
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator is {coordinator!r}; write HOST:PORT, the port below 65536, or auto")
        if not 0 <= self.process_id < self.processes:
            raise UserError(f"--process-id is {self.process_id}; it must be from 0 to --processes - 1, which is "
                            f"{self.processes - 1}")  # fmt: skip


@contextlib.contextmanager
def launched(config: LaunchConfig, settings: object) -> Iterator[None]:
    """Join the processes and set the mesh. To be entered before anything is computed.

    Raises UserError where the processes cannot be joined or have other settings, RunError once another has stopped.
    """
    if config.coordinator:
        _join(config)
        _require_same(f"{settings!r} {config.mesh}")
        if not config.mesh:
            raise UserError(f"--coordinator needs --mesh over the {jax.device_count()} devices of all processes, such "
                            f"as --mesh data={jax.device_count()}")  # fmt: skip
    try:
        with jax.set_mesh(make_mesh(config.mesh)) if config.mesh else contextlib.nullcontext():
            yield
    except Exception as error:
        if joined() and _of_another(error):
            raise RunError(STOPPED) from error
        raise


def _join(config: LaunchConfig) -> None:
    known = {"coordinator_address": config.coordinator, "num_processes": config.processes,
             "process_id": config.process_id} if config.coordinator != "auto" else {}  # fmt: skip
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending a process
    limits = {"initialization_timeout": PATIENCE, "heartbeat_timeout_seconds": SILENCE,
              "shutdown_timeout_seconds": SILENCE}  # fmt: skip
    _if_aborted(f"--coordinator {config.coordinator}: not all processes came together within {PATIENCE} seconds")
    try:
        jax.distributed.initialize(**known, **limits)
    except Exception as error:  # unreachable, refused, not detected: the library has an exception for each
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "" if known else "; write HOST:PORT with --processes and --process-id where nothing tells them"
        raise UserError(f"--coordinator {config.coordinator}: the processes cannot be joined ({why}){hint}") from None
    _if_aborted(STOPPED)


def _if_aborted(sentence: str) -> None:
    """End in a sentence, code 1, where the library aborts this process, as it does when another has died.

    It offers no other way: the callback it has cannot be one of Python's (jaxlib 0.10.2), whose own handlers of signals
    would run too late.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def tell(_: int) -> None:
        os.write(2, f"error: {sentence}\n".encode())
        os._exit(1)

    _kept[:] = [tell]
    ctypes.CDLL(None).signal(signal.SIGABRT, tell)


def _require_same(settings: str) -> None:
    """Raise UserError unless all processes have the same settings: they would wait for each other for ever."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(hashlib.sha256(settings.encode()).digest(), np.uint8)
    if (multihost_utils.process_allgather(mine) != mine).any():
        raise UserError("the processes of this run have different flags; only --process-id may differ")


def _of_another(error: BaseException | None) -> bool:
    """Say whether an error, or one that led to it, tells that another process is gone."""
    while error is not None:
        if not isinstance(error, (UserError, OSError)) and GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def joined() -> bool:
    """Say whether this process is one of several. Asks no device, so that it may be called at any time."""
    return jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """End this process after an error. Of several it does not wait for the others, as Python's exit would."""
    if not joined():
        raise SystemExit(code)
    if jax.process_index() == 0:
        time.sleep(1)  # its end is that of the others, who may be about to tell the same error
    sys.stderr.flush()
    os._exit(code)
