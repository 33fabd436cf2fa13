"""Orbax checkpoints of a run: written in the background, complete or absent, never half. Only this file knows Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

PyTree = Any


class Checkpoints:
    """The newest states of one run in a directory. A context manager: leaving it waits for pending writes."""

    def __init__(self, directory: Path, keep: int = 1):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training
        self._store = policies.Checkpointer(
            Path(directory).absolute(),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,  # what a killed process left half-written
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._store.close()

    def save(self, step: int, state: PyTree, notes: dict | None = None) -> None:
        """Start writing `state`; its buffers may be donated as soon as this returns."""
        self._store.save_async(step, state, custom_metadata=notes or {})

    def restore(self, like: PyTree) -> tuple[PyTree, dict] | None:
        """Load the newest complete state onto the shapes and shardings of `like`, or None when there is none."""
        if self._store.latest is None:
            return None
        step = self._store.latest.step

        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        state = self._store.load(step, jax.tree.map(abstract, like))
        return state, self._store.metadata(step).custom_metadata or {}
