"""Every composition of benchmarks.compose keeps what its ingredients promise, and a promise that is broken is found."""

import functools

import jax.numpy as jnp
import pytest
import running

import benchmarks.compose as compose
from benchmarks.compose import COMPOSITIONS, INGREDIENTS, PAIRS, TRIPLES, checks, composed, guarantees
from benchmarks.compose.draft import Built, train
from benchmarks.compose.ingredients import MICRO
from benchmarks.compose.world import World
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import private_gradient, set_privacy
from jaxforget.training.step import Trainable

QUICK = (("sparse", "sisa"),)


@pytest.fixture(scope="module")
def world():
    return World(compose.PRESETS["default"]())


def case(names):
    marks = [pytest.mark.slow] * (names not in QUICK) + [pytest.mark.mesh] * ("mesh" in names)
    return pytest.param(names, marks=marks, id="+".join(names))


@pytest.mark.parametrize("names", [case(names) for names in COMPOSITIONS])
def test_what_ingredients_promise_holds_together(names, world):
    found = list(guarantees(composed(world, names), names))
    assert {row["ingredient"] for row in found} == set(names)  # each was asked
    assert not [row for row in found if not row["holds"]]


def test_every_pair_is_there():
    assert len(PAIRS) == len(INGREDIENTS) * (len(INGREDIENTS) - 1) // 2 and len(TRIPLES) >= 4
    assert len(set(COMPOSITIONS)) == len(COMPOSITIONS)
    for names in COMPOSITIONS:
        assert compose.parse("+".join(reversed(names))) == names  # in the order of the table: no row twice


# --------------------------------------------------------------------------------------------------- broken promises
def touches_the_core(draft):
    """The last norm moves with the values."""
    inner = draft.trainables[-1]

    def combine(frozen, moving, key=None):
        model = inner.combine(frozen, moving, key)["model"]
        scale = model["final_norm"]["scale"] + moving["value"][0]
        return {**frozen, "model": {**model, "final_norm": {"scale": scale}}}

    return draft._replace(trainables=(*draft.trainables[:-1], Trainable(inner.init, combine)))


def reads_all_records(draft):
    """Every stage reads all records, deleted ones too."""
    return draft._replace(augment=lambda records: draft.augment(draft.world.records))


def descends(draft):
    """The sign that makes unlearning of training is lost."""
    return draft._replace(objective=lambda parts, batch, key: -draft.objective(parts, batch, key))


def weighs_alike(draft):
    """The weights of streams play no part."""
    def losses(parts, batch, key):
        return draft.objective(parts, {**batch, "factor": jnp.ones_like(batch["factor"])}, key)

    return draft._replace(objective=losses)


def clips_rows(draft):
    """A record and its counterfactual are clipped apart."""
    units = float(draft.world.config.batch_size)
    return draft._replace(gradient=private_gradient(Clipping("bookkeep"), units, 2 * MICRO))


def halves_noise(draft):
    config = draft.world.config
    write = functools.partial(set_privacy, bound=config.clip, multiplier=config.noise / 2)
    return draft._replace(prepare=lambda state: write(draft.prepare(state)))


@pytest.mark.parametrize("names, breaks, check, said", [
    (("sisa",), reads_all_records, checks.deletion,
     {"every stage that saw it changes", "its counterfactual goes with it"}),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        (("unlearning", "lora"), descends, checks.forgets, {"forget loss rises more, by 0.1 nats a token"}),
        (("unlearning", "lora"), weighs_alike, checks.forgets, {"forget texts of weight 0 say nothing"}),
        (("cda", "dp"), clips_rows, checks.private, {"a record changes the sum by C and no more"}),
        (("cda", "dp"), halves_noise, checks.private, {"noise is sigma C over the batch, standard errors"}),
    )),
])  # fmt: skip
def test_a_broken_promise_is_found(names, breaks, check, said, world):
    built = Built(composed(world, names, [breaks]))
    assert {found.guarantee for found in check(built, train(built, world.records)) if not found.holds} == said


def test_a_broken_promise_ends_the_command_with_1(in_process, monkeypatch, tmp_path, capsys):
    sparse = INGREDIENTS["sparse"]
    monkeypatch.setitem(INGREDIENTS, "sparse", sparse._replace(add=lambda draft: touches_the_core(sparse.add(draft))))
    with pytest.raises(SystemExit) as stop:
        in_process(compose, "out", "--compositions", "sparse", "sparse+mesh")
    assert stop.value.code == 1 and "sparse: nothing moves that may not (16)" in capsys.readouterr().err
    document = running.results(tmp_path / "out")
    broken = [row["guarantee"] for row in document["guarantees"] if not row["holds"]]
    assert "nothing moves that may not" in broken
    ran, not_run = document["results"]
    assert ran["guarantees"] - ran["hold"] == len(broken) and ran["name"] == "sparse"
    assert not_run == {"name": "sparse + mesh", "nearest_its_limit": "not run: needs JAX_NUM_CPU_DEVICES=8"}
    assert "nothing moves that may not" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("flags, said", [
    (("--compositions", "sparse+magic"), "--compositions sparse+magic: no ingredient 'magic'; there are cda, "),
    (("--shards", 0), "--shards is 0"),
    (("--clip", 0), "clip is 0.0; it must be above 0"),
    (("--records", 31), "--records is 31; give at least 32, a batch for every slice of a shard"),
    (("--mesh", "data=1"), "--mesh is for all of a run; here --meshes are those of the compositions that have one"),
])  # fmt: skip
def test_refused_in_one_sentence(in_process, capsys, tmp_path, flags, said):
    with pytest.raises(SystemExit) as stop:
        in_process(compose, "refused", *flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
