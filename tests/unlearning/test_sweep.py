"""Sweeps: a member is the run it would be alone, and one that diverges harms no other."""

import jax
import numpy as np
import pytest
import toys
from toys import OTHER, PARAMS, SETTING

from jaxforget.errors import UserError
from jaxforget.training import stage
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, adjust
from jaxforget.unlearning.run import unlearn
from jaxforget.unlearning.sweep import Member, grid, strengthened, sweep

CONFIG = TrainConfig(epochs=3, schedule="linear", warmup=0.2, weight_decay=0.01)
SEEDS = [SETTING, SETTING._replace(params=OTHER, seed=5)]
METHOD = adjust(METHODS, ("pdu.warmup_epochs=1", "pdu.epsilon=0.5"))


def alone(method, one: Member, directory, monkeypatch):
    monkeypatch.setattr(stage.hub, "save", lambda *args, **settings: None)  # it knows no toys
    params, record = unlearn(
        directory, strengthened(method, one.strength), one.setting, CONFIG, everything(),
        learning_rate=one.learning_rate, watched={}, target=None, evaluate_every=0, curve=None,
        save_tokenizer=lambda path: None, checkpoints=directory / "checkpoints",
    )  # fmt: skip
    return params, record


# Plain, a frozen part, a stored column, a part that moves, another model than the one that moves, two frozen models.
@pytest.mark.parametrize("name", ["ascent_descent_indist", "ascent_kl_indist", "npo", "pdu", "task_vector", "whp"])
def test_a_member_is_the_run_alone(name, tmp_path, monkeypatch):
    runs = grid(METHOD[name], SEEDS, (1e-2, 3e-2), (1.0, 4.0))
    seen = {}
    found = sweep(METHOD[name], runs, CONFIG, everything(), how="map", evaluate_every=2,
                  evaluate=lambda step, params: seen.setdefault(step, params))  # fmt: skip
    assert len(found.params) == len(runs) == (4 if name in ("task_vector", "whp") else 8)
    assert sorted(seen) == [0, 2, 4, 6] and found.notes == [None] * len(runs)
    for k in (1, len(runs) - 2):  # of either seed, rate and strength
        params, record = alone(METHOD[name], runs[k], tmp_path / str(k), monkeypatch)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found.params[k], params)
        assert record["train_tokens"] * len(runs) == pytest.approx(found.outcome.tokens, rel=0.05)
    for k, one in enumerate(runs):
        jax.tree.map(np.testing.assert_array_equal, seen[0][k], one.setting.params)
        jax.tree.map(np.testing.assert_array_equal, seen[6][k], found.params[k])
    heads = [params["head"]["kernel"] for params in found.params]
    assert all(not np.allclose(x, y, atol=1e-4) for i, x in enumerate(heads) for y in heads[:i])  # no two the same


def test_a_member_that_diverges_is_alone_in_it():
    runs = [Member(SETTING, 1e-2), Member(SETTING, 1e30), Member(SETTING, 1e-2)]
    found = sweep(METHODS["npo"], runs, CONFIG, everything(), how="map")
    assert found.notes[0] is None and found.notes[2] is None and "not finite" in found.notes[1]
    jax.tree.map(np.testing.assert_array_equal, found.params[0], found.params[2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params[0]))


def test_strength_is_the_weight_of_the_retain_term():
    assert strengthened(METHODS["npo"], 4.0).retain_weight == 4.0 * METHODS["npo"].retain_weight
    assert [one.strength for one in grid(METHODS["gradient_ascent"], [SETTING], (1.0, 2.0), (1.0, 4.0))] == [1.0, 1.0]
    with pytest.raises(UserError, match="strength is 0"):
        strengthened(METHODS["npo"], 0.0)


def test_members_of_another_program_are_refused():
    other = SETTING._replace(model=toys.Layered(width=4), params=toys.Layered(width=4).init(jax.random.key(0)))
    with pytest.raises(ValueError, match="one program"):
        sweep(METHODS["npo"], [Member(SETTING, 1e-2), Member(other, 1e-2)], CONFIG, everything())
    assert PARAMS is SETTING.params
