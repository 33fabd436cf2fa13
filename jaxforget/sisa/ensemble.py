"""An ensemble directory, opened: which stages it needs, training those it lacks, and its members.

    config.json, results.json, …  of the run that trained it
    base/           the initial model and its tokenizer, a Hugging Face directory
    ledger.sqlite   records, requests, finished stages
    stages/         one checkpoint a stage, named by its key
    members/        the models as Hugging Face directories, if wanted
    lock            held by the process that trains

Shapes: K members of one program, W its width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxforget import files
from jaxforget.data.text import encode
from jaxforget.data.tokens import Examples, concatenate, load_tokenizer
from jaxforget.errors import RunError, UserError
from jaxforget.models import hub
from jaxforget.models.layers import merge
from jaxforget.models.sharding import check_members, host
from jaxforget.report.run import from_plain
from jaxforget.sisa.ledger import Ledger
from jaxforget.sisa.recipe import Recipe, stage_keys
from jaxforget.sisa.store import Finished, Scratch, Store
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import Checkpoints, PyTree, digest
from jaxforget.training.ensemble import MemberBatches, member, members, stack
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import set_schedule
from jaxforget.training.start import tokenizer_files
from jaxforget.training.step import Parts, State

Keys = list[list[str | None]]  # by shard and stage
Encoded = dict[tuple[int, int], Examples | None]  # by shard and slice; None where it has no record


class Trained(NamedTuple):
    """A stage that was trained."""

    shard: int
    stage: int
    steps: int
    visits: int  # examples visited, counted once an epoch
    seconds: float  # of the program that trained it, shared with the other members in it


@contextmanager
def locked(directory: Path, wait: bool, tell: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs from training in this directory. The lock goes with the (first) process, however that ends."""
    import filelock

    lock = filelock.FileLock(Path(directory) / "lock")

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                raise UserError(f"{directory} is in use by another process; try again when it is done") from None
            tell(f"another process works on {directory}; waiting for it")
            lock.acquire()

    files.through_first(acquire)
    try:
        yield
    finally:
        lock.release()


def base_digest(directory: Path) -> str:
    """Digest what an ensemble starts from: the weights, the configuration and the tokenizer, file by file."""
    total = hashlib.sha256()
    for file in sorted(path for path in Path(directory).iterdir() if path.is_file()):
        with open(file, "rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


class Ensemble:
    """An ensemble in a directory. A context manager, to close its ledger."""

    def __init__(self, directory: str | Path):
        """Open it. Raises UserError where there is none, or where it is not what it was when it was trained."""
        self.directory = Path(directory)
        self.ledger = Ledger(self.directory)
        self.recipe: Recipe = from_plain(Recipe, json.loads(self.ledger.meta("recipe")))
        self._check()
        self.model, self._initial = hub.load(self.directory / "base")
        self.model = self.recipe.compute.apply(self.model)
        self.tokenizer = load_tokenizer(self.directory / "base")
        self.step = self.recipe.step(self.model, self.tokenizer.mask_token_id)
        self._frozen: Parts = {}  # of the newest stage
        self.store = Store(self.directory / "stages", self.ledger)

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *error: Any) -> None:
        self.ledger.__exit__(*error)

    def _check(self) -> None:
        """Raise UserError when settings or the initial model were changed since training."""
        path = self.directory / "config.json"
        try:
            now = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read; restore the file that training wrote") from error
        was = json.loads(self.ledger.meta("config"))
        changed = [name for name in was if name not in ("out", "resume") and now.get(name) != was[name]]
        if changed:
            raise UserError(f"{path} has changed since training ({', '.join(changed)}); restore it, or train anew")
        if not (self.directory / "base").is_dir() or base_digest(self.directory / "base") != self.recipe.start:
            raise UserError(f"{self.directory / 'base'} has changed since training; restore it, or train anew")

    # ------------------------------------------------------------------------------------------- stages

    def needed(self, without: Iterable[str] = ()) -> Keys:
        """Return the keys of the stages that the surviving records need, less the records `without`."""
        ids = self.ledger.ids(self.recipe.shards, self.recipe.slices, without)
        return [stage_keys(self.recipe, shard, cuts) for shard, cuts in enumerate(ids)]

    def missing(self, keys: Keys) -> list[tuple[int, int]]:
        """Return the stages (shard, stage) that the store lacks."""
        have = self.store.have()
        return [
            (shard, stage)
            for shard, row in enumerate(keys)
            for stage, key in enumerate(row)
            if key is not None and key not in have
        ]

    def train(
        self,
        without: Iterable[str] = (),
        *,
        scratch: Scratch | None = None,
        checkpoint_every: int = 0,
        log: Callable[[str, int, dict], None] = lambda tag, step, metrics: None,
        resumed: Callable[[str, int], None] = lambda tag, step: None,
        show: Callable[[Any], None] = lambda progress: None,
    ) -> list[Trained]:
        """Train what is missing for the surviving records, less `without`: all of it at first, little after a deletion.

        Members that lack the same stage train together, `width` in one program. scratch: a store to train everything
        into instead, from nothing. checkpoint_every: steps between checkpoints inside a stage, 0 for none.
        """
        check_members(self.recipe.width)
        without = set(without)
        store, recipe = scratch or self.store, self.recipe
        keys = self.needed(without)
        encoded: Encoded = {}
        trained: list[Trained] = []
        for stage in range(recipe.slices):
            for group in range(0, recipe.shards, recipe.width):
                have = store.have()
                active = {
                    shard: key
                    for shard in range(group, min(group + recipe.width, recipe.shards))
                    if (key := keys[shard][stage]) is not None and key not in have
                }
                if active:
                    trained += self._train_stage(
                        store, keys, stage, active, encoded, without, checkpoint_every, log, resumed, show
                    )
        return trained

    def _train_stage(
        self,
        store: Store | Scratch,
        keys: Keys,
        stage: int,
        active: dict[int, str],  # shard -> key
        encoded: Encoded,
        without: set[str],
        checkpoint_every: int,
        log: Callable[[str, int, dict], None],
        resumed: Callable[[str, int], None],
        show: Callable[[Any], None],
    ) -> list[Trained]:
        recipe, width = self.recipe, self.recipe.width
        before = {shard: self._before(store, keys, shard, stage) for shard in active}
        batches = {shard: self._batches(shard, stage, encoded, without) for shard in active}
        slots: list[Any] = [before[min(active)]] * width  # what idle slots hold does not matter
        rows: list[Batches | None] = [None] * width
        for shard in active:
            slots[shard % width], rows[shard % width] = before[shard], batches[shard]
        states = [
            set_schedule(state, learning_rate=recipe.train.learning_rate, total=batch.steps if batch else 1)
            for state, batch in zip(slots, rows, strict=True)
        ]
        tag = f"slice {stage}" if recipe.width >= recipe.shards else f"slice {stage} shards {list(active)}"
        working = self.directory / "working" / _digest_of(active.values())
        long = checkpoint_every and max(b.steps for b in rows if b) > checkpoint_every and store is self.store
        try:
            with Checkpoints(working) if long else _nothing() as checkpoints:
                outcome = fit(
                    members(self.step, recipe.members), stack(states), self._frozen, MemberBatches(tuple(rows)),
                    checkpoints=checkpoints, checkpoint_every=checkpoint_every if long else 0,
                    log=lambda step, metrics: log(tag, step, metrics),
                    resumed=lambda step: resumed(tag, step), show=show,
                )  # fmt: skip
        except RunError as error:
            raise RunError(f"slice {stage}, shards {', '.join(map(str, active))}: {error}") from error
        done = [
            Trained(shard, stage, batch.steps, len(batch.streams[0].examples) * batch.epochs, outcome.seconds)
            for shard, batch in batches.items()
        ]
        store.put(
            Finished(active[one.shard], one.shard, stage, member(outcome.state.trainable, one.shard % width),
                     one.steps, one.visits)
            for one in done
        )  # fmt: skip
        if store is self.store:
            files.remove(self.directory / "working")
        return done

    def _before(self, store: Store | Scratch, keys: Keys, shard: int, stage: int) -> State:
        """Return the state a stage starts from: the parameters that the stage before left, and a fresh optimizer."""
        state, self._frozen = self.step.init(self.recipe.stage_key(shard, stage), {"model": self._initial})
        key = keys[shard][stage - 1] if stage else None
        state = state if key is None else state._replace(trainable=store.get(key, state.trainable))
        return host(state)  # until all members are put, each on its own devices

    def _batches(self, shard: int, stage: int, encoded: Encoded, without: set[str]) -> Batches:
        parts = []
        for cut in range(stage + 1):
            if (shard, cut) not in encoded:
                rows = [row for row in self.ledger.records(shard, cut, without) if row.rows]
                encoded[shard, cut] = self.encode([row.record for row in rows]) if rows else None
            if (part := encoded[shard, cut]) is not None:
                parts.append(part)
        stream = Stream(concatenate(parts), self.recipe.train.batch_size)
        seed = self.recipe.stage_seed(shard, stage)
        return Batches((stream,), self.recipe.epochs[stage], seed, self.recipe.weighting)

    def encode(
        self, records: Sequence, *, where: str = "records", tell: Callable[[str], None] = lambda message: None
    ) -> Examples:
        """Tokenise records for the ensemble's task."""
        examples = encode(
            records, self.tokenizer, self.recipe.text, context=self.model.max_length, where=where, tell=tell,
            task=self.recipe.task, labels=self.recipe.labels,
            start_id=getattr(self.model.config, "decoder_start_token_id", 0),
        )  # fmt: skip
        widest = {name: max(width, examples.columns[name].shape[1]) for name, width in self.recipe.widths.items()}
        return examples.widen({name: width for name, width in widest.items() if name in examples.columns})

    # ------------------------------------------------------------------------------------------- members

    def final_keys(self) -> dict[int, str]:
        """Return shard -> key of its last stage, of the shards that take part in the vote.

        A shard that deletions have emptied drops out.
        """
        keys = [row[-1] for row in self.needed()]
        return {shard: key for shard, (key, size) in enumerate(zip(keys, self.sizes(), strict=True)) if key and size}

    def sizes(self, without: Iterable[str] = ()) -> np.ndarray:
        """Return how many examples each shard trains on, int64 (K,), without some of the records."""
        return self.ledger.counts(self.recipe.shards, self.recipe.slices, without).sum(axis=1)

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Read stages from the disk: key -> digest of the parameters. Raises RunError for one that is damaged."""
        state, _ = self.step.init(self.recipe.stage_key(0, 0), {"model": self._initial})
        return {key: digest(self.store.get(key, state.trainable)) for key in keys}

    def params(self, shard: int) -> PyTree:
        """Load the parameters of a member, adapters merged."""
        key = self.final_keys()[shard]
        state, frozen = self.step.init(self.recipe.stage_key(shard, 0), {"model": self._initial})
        moving = self.store.get(key, state.trainable)
        return host(merge(self.step.combine(frozen, moving)["model"]))

    def weights(self, by: str = "equal") -> np.ndarray:
        """Return the weight of every taking-part member: 1 each, or its share of the surviving examples.

        Both are functions of the surviving records alone, so the vote forgets what its members forget.
        """
        sizes = self.sizes().astype(np.float32)
        sizes = sizes[sizes > 0]
        return np.ones_like(sizes) if by == "equal" else sizes / sizes.sum()

    def export(self) -> None:
        """Bring the Hugging Face directories of members/ up to date."""
        final, root = self.final_keys(), self.directory / "members"
        root.mkdir(exist_ok=True)
        wanted = {f"shard-{shard}": (shard, key) for shard, key in final.items()}
        # Of emptied shards, and what a kill left half-written.
        files.remove(*(path for path in root.iterdir() if path.name not in wanted))

        def stale() -> set[str]:
            notes = {name: root / name / "stage.json" for name in wanted}
            return {name for name, note in notes.items()
                    if not (note.exists() and json.loads(note.read_text())["key"] == wanted[name][1])}  # fmt: skip

        for name in sorted(files.through_first(stale)):
            shard, key = wanted[name]
            params = self.params(shard)
            files.remove(root / name)
            about = json.dumps({"shard": shard, "key": key}) + "\n"
            beside = tokenizer_files(self.tokenizer.save_pretrained) | {"stage.json": about}
            hub.save(root / name, self.model, params, extra_files=beside)


@contextmanager
def _nothing():
    yield None


def _digest_of(keys: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:32]
