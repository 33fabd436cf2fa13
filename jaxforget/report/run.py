"""A run directory: config.json, metrics.jsonl, results.json, each written so that a kill leaves no half file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import time
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from jaxforget import files
from jaxforget.errors import UserError
from jaxforget.files import write_atomic

SCHEMA = 1
NOT_COMPARED = ("out", "resume")  # settings that do not change the numbers


def plain(value: Any) -> Any:
    """Turn settings and results into JSON values; NaN and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """Build settings of a type from the JSON values that `plain` made of them."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def device_name() -> str:
    """Describe what the numbers were computed on."""
    import jax

    devices, mesh, count = jax.devices(), jax.sharding.get_mesh(), jax.process_count()
    name = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        name = f"cpu, {os.cpu_count()} cores"
    if not mesh.empty:
        name += ", mesh " + ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return name + (f", {count} processes" if count > 1 else "")


class Run:
    """The directory of one command. Opening it checks that nothing is overwritten; `begin` creates it."""

    def __init__(self, command: str, config: Any, out: Path | None, resume: bool | None):
        """Look at `out`. resume: continue what is there; None for a command whose directory is never continued."""
        self.command, self.config = command, plain(config)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.directory = Path(out) if out else Path("runs") / f"{command}-{stamp}"
        self.started = time.perf_counter()
        import jax

        if jax.process_count() > 1 and not out:
            raise UserError("several processes need --out DIR, the same for all")
        if resume and not out:
            raise UserError("--resume needs --out DIR, the directory of the run to continue")
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--out {self.directory} is a file; give a directory")
        self.resumed = bool(resume) and (self.directory / "config.json").exists()
        if self.resumed:
            self._check_same_config()
        elif self.directory.exists() and any(not _half_written(path) for path in self.directory.iterdir()):
            hints = {True: "it has no config.json to resume from, or ", False: "use --resume to continue it, or "}
            hint = "" if resume is None else hints[resume]
            raise UserError(f"--out {self.directory} is not empty; {hint}choose another directory")
        self._metrics: TextIO | None = None

    def begin(self) -> None:
        """Make the directory and write config.json. Called once the input has been read and found good."""
        files.wait_for_all()  # each has looked at the directory
        if not self.resumed:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {self.directory} cannot be created: {error.strerror}") from error
            about = {"command": self.command, "schema": SCHEMA, "config": self.config, **environment()}
            write_atomic(self.directory / "config.json", json.dumps(about, indent=2) + "\n")

    def _check_same_config(self) -> None:
        path = self.directory / "config.json"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            command, before = saved["command"], _flat(saved["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a run's config.json; choose another --out") from error
        if command != self.command:
            raise UserError(f"--out {self.directory} belongs to {command}, not to {self.command}")
        now = _flat(json.loads(json.dumps(self.config)))
        names = sorted({*before, *now} - set(NOT_COMPARED))
        changed = [
            f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(f"--resume needs the settings the run was started with: {'; '.join(changed)}")

    # metrics.jsonl

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        """Append one line. Lines reach the file before the checkpoint that follows them."""
        if not files.leads():
            return
        path = self.directory / "metrics.jsonl"
        if self._metrics is None:
            self._metrics = open(path, "a", encoding="utf-8")
        try:
            self._metrics.write(json.dumps(plain({"stage": stage, "step": step, **metrics})) + "\n")
            self._metrics.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it tries once more to write
                self._metrics.close()
            self._metrics = None
            error.filename = str(path)
            raise

    def metrics(self) -> list[dict[str, Any]]:
        """Read back every complete line."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was cut by a kill

    def rewind(self, stage: str, step: int, **tags: Any) -> None:
        """Drop the lines of a stage after `step`, or all of them at step 0: the resumed run writes them again."""

        def stale(line: dict[str, Any]) -> bool:
            mine = line["stage"] == stage and all(line.get(tag) == value for tag, value in tags.items())
            return mine and (step == 0 or line["step"] > step)

        kept = [line for line in self.metrics() if not stale(line)]
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        write_atomic(self.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    # results.json

    def finish(self, rows: Iterable[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Write results.json: the contract every command shares."""
        document = {
            "command": self.command,
            "schema": SCHEMA,
            "config": self.config,
            "device": device_name(),
            "seconds": round(time.perf_counter() - self.started, 3),
            "results": plain(list(rows)),
            **plain(more),
        }
        write_atomic(self.directory / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
        return document


def _half_written(path: Path) -> bool:
    """Say whether a file is what a kill in the middle of writing the first config.json leaves."""
    return path.name.startswith(".config.json.")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Spell nested settings as `train.epochs`, so that a difference is one setting and not a whole group."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def program() -> str | None:
    """Return the command that this process is, such as `train.unlearn`, or None where it is something else."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return name if name.startswith(("train.", "eval.", "benchmarks.")) else None


def environment() -> dict[str, Any]:
    """Versions and device, for config.json."""
    from importlib.metadata import version

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"versions": versions, "device": device_name()}
