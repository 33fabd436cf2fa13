"""Finished stages by key: what a deletion starts again from.

A stage is a checkpoint directory and, once that is complete, a row of the ledger with the digest of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxforget import files
from jaxforget.errors import RunError
from jaxforget.sisa.ledger import Ledger
from jaxforget.training.checkpoints import PyTree, digest, load_tree, save_tree


class Finished(NamedTuple):
    """A stage that was trained, to be kept."""

    key: str
    shard: int
    stage: int
    tree: PyTree
    steps: int
    visits: int


class Store:
    """The stages in an ensemble's directory. A class, for `Scratch` to stand in for it."""

    def __init__(self, directory: Path, ledger: Ledger):
        self.directory, self.ledger = Path(directory), ledger

    def _path(self, key: str) -> Path:
        return self.directory / key[:32]

    def have(self) -> set[str]:
        """Return the keys of the stages that are there."""
        stages = self.ledger.stages()
        return files.through_first(lambda: {key for key in stages if self._path(key).is_dir()})

    def put(self, stages: Iterable[Finished]) -> None:
        """Keep the parameters of the stages that one program trained: of all or, killed before the end, of none.

        So a resumed run trains them side by side again, and its log is that of an undisturbed one.
        """
        rows = []
        for key, shard, stage, tree, steps, visits in stages:
            try:
                save_tree(self._path(key), tree)
            except RunError as error:
                raise RunError(f"shard {shard}, slice {stage}: the checkpoint {error}; free what it needs and "
                               "run again with --resume") from error  # fmt: skip
            rows.append((key, shard, stage, digest(tree), steps, visits))
        self.ledger.add_stages(rows)

    def get(self, key: str, like: PyTree) -> PyTree:
        """Load a stage. A damaged one is removed, and RunError says so: the next run trains it again."""
        row = self.ledger.stages()[key]
        try:
            tree = load_tree(self._path(key), like)
            if digest(tree) == row["digest"]:
                return tree
            reason = "its parameters are not those that were saved"
        except RunError as error:
            reason = str(error)
        self.ledger.drop_stages([key])
        files.remove(self._path(key))
        raise RunError(f"shard {row['shard']}, slice {row['stage']}: the checkpoint is damaged and was removed; "
                       f"run again with --resume to train it again ({reason})")  # fmt: skip

    def digests(self) -> dict[str, str]:
        """Return key -> digest of parameters."""
        return {key: row["digest"] for key, row in self.ledger.stages().items()}

    def keep_only(self, keys: Iterable[str]) -> None:
        """Erase every other stage, and whatever else lies in the directory."""
        keys = set(keys)
        self.ledger.drop_stages([key for key in self.ledger.stages() if key not in keys])
        kept = {self._path(key).name for key in keys}
        files.remove(*(path for path in self.directory.glob("*") if path.name not in kept))


class Scratch:
    """Stages in memory, of which only digests stay: for training from scratch to compare with."""

    def __init__(self):
        self._trees: dict[tuple[int, str], PyTree] = {}
        self._digests: dict[str, str] = {}

    def have(self) -> set[str]:
        """Return the keys of the stages that are there."""
        return set(self._digests)

    def put(self, stages: Iterable[Finished]) -> None:
        """Keep the digests for good, the parameters until the next stage of the shard is there."""
        for key, shard, _, tree, _, _ in stages:
            self._digests[key] = digest(tree)
            self._trees = {k: v for k, v in self._trees.items() if k[0] != shard} | {(shard, key): tree}

    def get(self, key: str, like: PyTree) -> PyTree:
        """Return a stage put last."""
        return next(tree for (_, name), tree in self._trees.items() if name == key)

    def digests(self) -> dict[str, str]:
        """Return key -> digest of parameters."""
        return dict(self._digests)
