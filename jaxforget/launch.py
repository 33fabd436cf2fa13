"""The processes of a run and the mesh over their devices: flags that every command has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from jaxforget.errors import UserError

SILENCE = 30  # seconds without a sign of life after which a process counts as dead


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
        if coordinator in (None, "auto"):
            return
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator is {coordinator!r}; write HOST:PORT, or auto")
        if not 0 <= self.process_id < self.processes:
            raise UserError(f"--process-id is {self.process_id}; it must be from 0 to --processes - 1, which is "
                            f"{self.processes - 1}")  # fmt: skip


@contextlib.contextmanager
def launched(config: LaunchConfig) -> Iterator[None]:
    """Join the processes and set the mesh. To be entered before anything is computed."""
    import jax

    from jaxforget.models.sharding import make_mesh

    if config.coordinator:
        known = {"coordinator_address": config.coordinator, "num_processes": config.processes,
                 "process_id": config.process_id} if config.coordinator != "auto" else {}  # fmt: skip
        try:
            jax.distributed.initialize(**known, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE)
        except Exception as error:  # unreachable, refused, not detected: the library has an exception for each
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--coordinator {config.coordinator}: the processes could not be joined: {why}") from None
        if not config.mesh:
            raise UserError(f"several processes need --mesh over all their {jax.device_count()} devices, such as "
                            f"--mesh data={jax.device_count()}")  # fmt: skip
    with jax.set_mesh(make_mesh(config.mesh)) if config.mesh else contextlib.nullcontext():
        yield
