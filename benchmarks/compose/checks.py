"""What ingredients guarantee, looked for in a finished run."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compose.draft import Built, Stages, train
from benchmarks.compose.ingredients import DELTA, lora_config
from benchmarks.compose.world import other_side
from jaxforget.data.sampling import id_keys
from jaxforget.debiasing.composition import merged
from jaxforget.debiasing.modules import from_places
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.models.layers import LowRank
from jaxforget.privacy.accounting import Mechanism
from jaxforget.privacy.noise import set_privacy
from jaxforget.training.step import PyTree
from jaxforget.training.trainable import path_str

ERRORS = 4.0  # standard errors that a measured deviation may be off


class Found(NamedTuple):
    """A guarantee, how far the run is from it, and how far it may be."""

    guarantee: str
    deviation: float
    limit: float = 0.0
    said: str = ""

    @property
    def holds(self) -> bool:
        return self.deviation <= self.limit  # no for NaN


Check = Callable[[Built, Stages], Iterator[Found]]


def bits_apart(one: PyTree, other: PyTree) -> int:
    """Count the numbers whose bits differ."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(int((np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32)).sum()) for a, b in pairs)


def vector(tree: PyTree) -> np.ndarray:
    """Flatten to float64."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def left_by(stages: Stages) -> dict[tuple[int, int], PyTree]:
    return {where: stages[where].moving for where in sorted(stages)}


def deletion(built: Built, stages: Stages) -> Iterator[Found]:
    """A deleted record is gone as if it had never been there."""
    draft, records = built.draft, built.draft.world.records
    last = draft.slices - 1
    # One record of a first slice and one of a last, whose stage goes on from what is kept.
    gone = [next(r for r in records if built.where[r.id] == place) for place in ((0, 0), (draft.shards - 1, last))]
    rest = [record for record in records if record not in gone]
    touched = {(k, stage) for k, cut in (built.where[r.id] for r in gone) for stage in range(cut, draft.slices)}
    kept = {where: stage for where, stage in stages.items() if where not in touched}
    served, scratch = train(built, rest, kept), train(built, rest[::-1])
    yield Found("deleting a record = training without it", bits_apart(left_by(served), left_by(scratch)),
                said=f"{len(touched)} of {len(stages)} stages trained again")  # fmt: skip
    same = [where for where in touched if not bits_apart(served[where].moving, stages[where].moving)]
    yield Found("every stage that saw it changes", len(same))
    words = {text for record in gone for text in (record.text, other_side(record.text))}
    still = [r for k in range(draft.shards) for r in built.texts(rest, k, last).records if r.text in words]
    yield Found("its counterfactual goes with it", len(still))


def core(built: Built, stages: Stages) -> Iterator[Found]:
    """What may not move keeps its bits."""
    draft, layout = built.draft, built.draft.world.layout
    yield Found("the frozen core keeps its bits", bits_apart(built.frozen["model"], draft.parts["model"]))
    start_N = layout.join(draft.parts["model"]).view(np.uint32)
    moved = [np.flatnonzero(layout.join(model).view(np.uint32) != start_N) for model in built.models(stages, stripped)]
    beyond = sum(len(np.setdiff1d(places, np.asarray(draft.moves, np.int64))) for places in moved)
    yield Found("nothing moves that may not", beyond)
    if draft.moves:
        share = min(len(places) for places in moved) / len(draft.moves)
        yield Found("what may move does", 1.0 - share, 0.1, f"{share:.1%} of {len(draft.moves)} places")


def stripped(model: PyTree) -> PyTree:
    """Take adapters off."""
    is_adapter = lambda leaf: isinstance(leaf, LowRank)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.kernel if is_adapter(leaf) else leaf, model, is_leaf=is_adapter)


def as_module(built: Built, stages: Stages) -> Iterator[Found]:
    """What was trained is a module: switched on by its file's values it gives the model."""
    draft, world = built.draft, built.draft.world
    base, apart = draft.parts["model"], 0.0
    for model in built.models(stages, stripped):
        value_P = (world.layout.join(model) - world.layout.join(base))[world.places]
        on = merged(base, {"one": from_places(world.layout, world.places, value_P, base)})
        apart = max(apart, float(np.max(np.abs(world.layout.join(on) - world.layout.join(model)))))
    yield Found("as a module on the core it is the same model", apart, 1e-7)
    yield Found("without modules the core is itself", bits_apart(merged(base, {}), base))


def low_rank(built: Built, stages: Stages) -> Iterator[Found]:
    """Merged adapters act as adapters, and have their rank."""
    world, model = built.draft.world, built.draft.world.start.model
    config = lora_config(world.config)
    batch = {name: column[:8] for name, column in world.encode(world.records).columns.items() if name != "key"}
    logits = jax.jit(model.batch_logits)
    apart, beyond, count = 0.0, 0.0, 0
    pairs = zip(built.models(stages), built.models(stages, lambda x: x), built.models(stages, stripped), strict=True)
    for dense, on, off in pairs:
        expected = logits(on, batch)
        apart = max(apart, float(jnp.max(jnp.abs(logits(dense, batch) - expected) / (1.0 + jnp.abs(expected)))))
        for path, one in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, dense, off)):
            if not config.adapts(path_str(path)):
                beyond = max(beyond, float(np.abs(one).max()))
                continue
            size = np.linalg.svd(one.astype(np.float64), compute_uv=False)  # of stacked layers each
            count += int((size[..., 0] > 0).sum())
            beyond = max(beyond, float((size[..., config.rank] / size[..., 0]).max()))
    yield Found("merged = unmerged, logits", apart, 1e-5)
    yield Found("the change has the adapters' rank", beyond if count else math.inf, 1e-5, f"{count} kernels")


def forgets(built: Built, stages: Stages) -> Iterator[Found]:
    """Losses rise where they are to, and a weight of 0 is silence."""
    draft, world = built.draft, built.draft.world
    found = world.encode(draft.augment(world.records).records)
    forget_N = np.asarray([identity.startswith("f") for identity in found.ids])
    whose_N = np.asarray([built.where[whole_id(identity)][0] for identity in found.ids])

    def nll(params, chosen_N) -> float:
        return language_metrics(token_scores(world.start.model, params, found.take(chosen_N)))["nll"]

    rises = []
    for k, model in enumerate(built.models(stages)):
        sets = (forget_N & (whose_N == k), ~forget_N & (whose_N == k))
        rises.append([nll(model, one) - nll(draft.parts["model"], one) for one in sets])
    forget, retain = min(rises, key=lambda both: both[0] - both[1])
    yield Found("forget loss rises more, by 0.1 nats a token", max(0.0, 0.1 - (forget - retain)),
                said=f"{forget:+.2f}, retain loss {retain:+.2f}")  # fmt: skip

    def mute(examples):
        first, *others = draft.streams(examples)
        return (first._replace(factor=0.0), *others)

    keys = short_keys([one for one in found.ids if one.startswith("f")])

    def heard(as_drafted: Built) -> int:
        """Count the numbers of the first gradients that change with the tokens of forget texts."""
        batches = first_batches(as_drafted)
        turned = [{**batch, "tokens": np.where(np.isin(batch["key"], keys)[:, None], batch["tokens"][:, ::-1],
                                               batch["tokens"])} for batch in batches]  # fmt: skip
        return bits_apart(built.gradients(batches), built.gradients(turned))

    loud, quiet = heard(built), heard(Built(draft._replace(streams=mute)))
    yield Found("forget texts of weight 0 say nothing", quiet if loud else math.inf, said=f"else {loud} numbers change")


def whole_id(identity: str) -> str:
    return identity.removesuffix("#cda")


def short_keys(ids: Sequence[str]) -> list[int]:
    """Return the keys that batches have for ids."""
    return id_keys(ids).astype(np.uint32).tolist()


def first_batches(built: Built) -> list[dict[str, np.ndarray]]:
    """Return the first batch of every member's last stage."""
    draft = built.draft
    rows = [built.batches(draft.world.records, k, draft.slices - 1) for k in range(draft.shards)]
    return [{name: column[0] for name, column in one.take(0, 1, 1).items()} for one in rows]


def paired(built: Built, stages: Stages) -> Iterator[Found]:
    """Every stage sees both sides of every text alike."""
    draft, alone, uneven = built.draft, 0, 0
    for k, stage in itertools.product(range(draft.shards), range(draft.slices)):
        found = built.texts(draft.world.records, k, stage).records
        texts = {record.text for record in found}
        alone += sum(other_side(text) not in texts for text in texts)
        batches = built.batches(draft.world.records, k, stage)
        taken = batches.take(0, batches.steps, batches.steps)
        keys, visits = np.unique(taken["key"][taken["weight"] > 0], return_counts=True)
        count = dict(zip(keys.tolist(), visits.tolist(), strict=True))
        own = zip(found, short_keys([record.id for record in found]), strict=True)
        seen = {record.text: count.get(key, 0) for record, key in own}
        uneven = max(uneven, *(abs(n - seen.get(other_side(text), n)) for text, n in seen.items()))
    yield Found("every text has its other side in the same stage", alone)
    yield Found("both are visited equally often", uneven, 1.0)  # a stream that goes round may end between the two


def private(built: Built, stages: Stages) -> Iterator[Found]:
    """The mechanism that is accounted for is the one that ran."""
    draft, config = built.draft, built.draft.world.config
    runs = [[built.batches(draft.world.records, k, s) for s in range(draft.slices)] for k in range(draft.shards)]
    batches = first_batches(built)
    quiet = functools.partial(set_privacy, bound=config.clip, multiplier=0.0)

    # Which rows are a record's, told by ids alone: a pair that was clipped as two would change the sum twice as much.
    ids = [record.id for record in draft.augment(draft.world.records).records]
    own = dict(zip(short_keys(ids), map(whole_id, ids), strict=True))
    drawn = [list(dict.fromkeys(own[key] for key in b["key"][b["weight"] > 0].tolist())) for b in batches]

    def without(batch, records: Collection[str]):
        kept_B = np.asarray([own[key] not in records for key in batch["key"].tolist()])
        return {**batch, "weight": batch["weight"] * kept_B}

    whole, changes = built.gradients(batches, quiet), []
    for n in range(max(map(len, drawn))):
        less = built.gradients([without(b, names[n : n + 1]) for b, names in zip(batches, drawn, strict=True)], quiet)
        changes += [float(np.linalg.norm(vector(a) - vector(b))) for a, b in zip(whole, less, strict=True)]
    most = max(changes) * config.batch_size / config.clip
    yield Found("a record changes the sum by C and no more", abs(most - 1.0), 1e-5)

    nothing = built.gradients([without(batch, set(own.values())) for batch in batches])
    noise = [vector(one) for one in nothing]
    expected, count = runs[0][-1].mechanism.noise_std / config.batch_size, len(noise[0])
    off = max(abs(one.std() / expected - 1.0) * math.sqrt(2 * count) for one in noise)
    yield Found("noise is sigma C over the batch, standard errors", off, ERRORS, f"{count} numbers")
    if draft.shards > 1:
        alike = max(abs(np.corrcoef(a, b)[0, 1]) for a, b in itertools.combinations(noise, 2)) * math.sqrt(count)
        yield Found("members' noises are unrelated, standard errors", alike, ERRORS)

    told = [tuple(run.mechanism for run in run_of_member) for run_of_member in runs]
    off = max(abs(one.steps - stages[k, s].steps) for k, row in enumerate(told) for s, one in enumerate(row))
    yield Found("steps accounted for = steps done", off)
    by_pld, by_rdp = (max(epsilon(row, name) for row in told) for name in ("pld", "rdp"))
    yield Found("a member's epsilon: PLD / RDP", by_pld / by_rdp, 1.0, f"epsilon {by_pld:.4g} at {DELTA:g}")


@functools.cache
def epsilon(stages: tuple[Mechanism, ...], accountant: str) -> float:
    """Account for the stages of a member together."""
    from dp_accounting import NeighboringRelation, pld, rdp

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if accountant == "pld":
        counter = pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    else:
        counter = rdp.RdpAccountant(neighboring_relation=relation)
    for one in stages:
        counter.compose(one.event())
    return float(counter.get_epsilon(stages[0].delta))


def as_on_one_device(built: Built, stages: Stages) -> Iterator[Found]:
    """Devices change the order of sums and nothing else."""
    draft, config = built.draft, built.draft.world.config

    def on(text: str | None) -> Stages:
        return train(Built(draft._replace(mesh=text)), draft.world.records)

    expected = vector(left_by(on(None)))
    for text, found in ((draft.mesh, stages), *((text, on(text)) for text in config.meshes[1:])):
        apart = float(np.max(np.abs(vector(left_by(found)) - expected) / (1.0 + np.abs(expected))))
        yield Found(f"{text}: as on one device", apart, 1e-5)
        yield Found(f"{text}: on all devices", devices_of(text) - min(stage.devices for stage in found.values()))


def devices_of(mesh: str | None) -> int:
    return math.prod(int(size) for size in re.findall(r"=\s*(\d+)", mesh or ""))  # 1 without a mesh
