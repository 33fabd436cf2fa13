"""Orbax checkpoints of a run: written in the background, complete or absent, never half. Only this file knows Orbax."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxforget.errors import RunError
from jaxforget.models import sharding

PyTree = Any


def digest(tree: PyTree) -> str:
    """Return the SHA-256 of a pytree of arrays: paths, types, shapes and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(sharding.host(leaf))
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def save_tree(directory: Path, tree: PyTree) -> None:
    """Write one pytree of arrays as a checkpoint of its own. Raises RunError with the reason, such as a full disk."""
    from orbax.checkpoint import v1 as ocp

    try:
        ocp.save(Path(directory).absolute(), jax.tree.map(jax.numpy.asarray, tree), overwrite=True)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise RunError(f"{directory} cannot be written ({_reason(error)})") from error


def load_tree(directory: Path, like: PyTree) -> PyTree:
    """Load what `save_tree` wrote, with the shapes of `like`, to the host. Raises RunError for a damaged checkpoint."""
    from orbax.checkpoint import v1 as ocp

    mesh = sharding.current()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:  # of several processes each gets all of it
        here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    try:
        tree = ocp.load(Path(directory).absolute(), shapes)
    except Exception as error:
        raise RunError(f"{directory} cannot be read ({_reason(error)})") from error
    # Loaded arrays are committed to their device, and a program compiled for fresh ones would be compiled again.
    return sharding.host(tree)


def _reason(error: Exception) -> str:
    text = str(error)
    found = re.search(r"No space left on device|File too large|Permission denied|Disk quota exceeded", text)
    return found[0] if found else (text.split("\n")[0][:200].rstrip(". ") or type(error).__name__)


class Checkpoints:
    """The newest states of one run in a directory. A context manager: leaving it waits for pending writes.

    A write runs in the background, so that `save` and leaving raise RunError where an earlier one failed.
    """

    def __init__(self, directory: Path, keep: int = 1):
        from orbax.checkpoint import v1 as ocp

        policies, self._directory = ocp.training, directory
        self._store = policies.Checkpointer(
            Path(directory).absolute(),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,  # what a killed process left half-written
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self._told("written"):
            self._store.close()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what Orbax raises into one sentence."""
        try:
            yield
        except Exception as error:
            raise RunError(f"{self._directory} cannot be {what} ({_reason(error)})") from error

    def save(self, step: int, state: PyTree, notes: dict | None = None) -> None:
        """Start writing `state`; its buffers may be donated as soon as this returns."""
        with self._told("written"):
            self._store.save_async(step, state, custom_metadata=notes or {})

    def restore(self, like: PyTree) -> tuple[PyTree, dict] | None:
        """Load the newest complete state onto the shapes and shardings of `like`, or None when there is none."""
        if self._store.latest is None:
            return None
        step = self._store.latest.step

        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        with self._told("read; remove it to train this part from its beginning"):
            state = self._store.load(step, jax.tree.map(abstract, like))
            return state, self._store.metadata(step).custom_metadata or {}
