"""Runs of several methods: what moves, what is kept on disk, and going on after a kill."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toys
from toys import PARAMS, SETTING

import train.unlearn
from jaxforget.models import hub
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.sparse import lay_out
from jaxforget.training.step import make_step
from jaxforget.training.trainable import path_str
from jaxforget.unlearning.pdu import PDU
from jaxforget.unlearning.recipe import moves, optimized


def test_a_dual_resumes_bit_for_bit(tmp_path):
    """Killed at a step where lambda has moved, with adapters as what moves besides."""
    recipe = PDU(epsilon=2.5, eta=0.7, warmup_epochs=0, retain_weight=3.0).recipe(SETTING)
    optimizer = optimized(adamw(OptimizerConfig(learning_rate=0.01)), tuple(recipe.optimizers.items()))
    step = make_step(recipe.objective, moves(toys.MOVING["lora"], ("dual",)), mean_gradient(4), optimizer)
    batches = toys.Batches(recipe.streams, 4, 0)

    def begin():
        state, frozen = step.init(jax.random.key(0), {"model": PARAMS, **recipe.parts})
        return set_schedule(state, learning_rate=0.01, total=batches.steps), frozen

    undisturbed = fit(step, *begin(), batches, chunk=4).state

    class Killed(Exception):
        pass

    def kill(at, metrics):
        if at == 6:
            raise Killed

    with Checkpoints(tmp_path / "run") as store, pytest.raises(Killed):
        fit(step, *begin(), batches, chunk=4, checkpoints=store, checkpoint_every=3, log=kill)
    resumed = []
    with Checkpoints(tmp_path / "run") as store:
        how = {"checkpoints": store, "checkpoint_every": 3, "resumed": resumed.append}
        state = fit(step, *begin(), batches, chunk=4, **how).state
    assert resumed == [3]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, undisturbed.trainable)
    assert float(state.trainable["others"]["dual"]) not in (0.0, 3.0)


SMOKE = ("--preset", "smoke", "--train.epochs", 1, "--epochs", 1, "--stop-at", "never")


@pytest.mark.slow  # for its programs
def test_adapters_under_every_kind_of_method(in_process):
    """A stored reference, sampled answers, hidden states, a dual variable, a model made of what was trained, two."""
    methods = ("npo", "alt_po", "rmu", "pdu", "task_vector", "whp")
    out = in_process(train.unlearn, "adapters", *SMOKE, "--methods", *methods, "--lora.rank", 2).out
    models = out / "seed0" / "models"
    _, original = hub.load(models / "original")
    for name in methods:
        _, params = hub.load(models / name)
        changed = {path for (path, x), (_, y) in zip(jax.tree_util.tree_leaves_with_path(params),
                                                     jax.tree_util.tree_leaves_with_path(original), strict=True)
                   if not np.array_equal(x, y)}  # fmt: skip
        assert {path_str(path) for path in changed} == {
            "blocks/attn/q/kernel", "blocks/attn/v/kernel"}, name  # fmt: skip
    kept = sorted(path.name for path in (out / "seed0" / "reference").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["alternatives", "nll", "reinforced", *["sequence_logp"] * 2]


@pytest.mark.slow  # for its programs
def test_a_sparse_difference_changes_its_places_alone(in_process):
    """Of the matrices it may change, by a method with a reference and one that saves what `finish` makes."""
    sparse = (*SMOKE, "--methods", "npo", "task_vector", "--trainable", ".*/kernel", "--density", 0.01)
    out = in_process(train.unlearn, "sparse", *sparse).out
    models = out / "seed0" / "models"
    original, *changed = (hub.load(models / name)[1] for name in ("original", "npo", "task_vector"))
    (kept,) = (out / "seed0" / "reference").glob("places-*.npz")
    layout = lay_out(original, (".*/kernel",), {})
    place_P = np.load(kept)["place"]
    assert len(place_P) == round(0.01 * layout.size)
    for params in changed:
        moved_N = layout.join(params).view(np.uint32) != layout.join(original).view(np.uint32)
        assert set(np.flatnonzero(moved_N)) <= set(place_P) and moved_N.sum() > 0.9 * len(place_P)
        outside = [np.array_equal(x.view(np.uint32), y.view(np.uint32)) for (path, x), (_, y) in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves_with_path(original), strict=True)
            if path_str(path) not in layout.paths]  # fmt: skip
        assert outside and all(outside)


@pytest.mark.slow  # for its programs
def test_all_methods_run(in_process):
    """Every row of METHODS on the generated corpus: a finished row and a place on the page."""
    out = in_process(train.unlearn, "all", *SMOKE, "--methods", "all").out
    page = (out / "report.html").read_text()
    for name in toys.METHODS:
        assert (out / "seed0" / "models" / name / "model.safetensors").exists()
        assert re.search(rf">{name}<", page), name


@pytest.mark.parametrize("flags, words", [
    (("--trainable", "blocks/attn/x/.*"), "trainable pattern 'blocks/attn/x/.*' matches no parameter"),
    (("--trainable", "blocks/.*", "--lora.rank", 2), "--trainable and --lora.rank exclude each other"),
    (("--lora.rank", 2, "--lora.targets", "x"), "LoRA target 'x' matches no layer"),
    (("--density", 0.1, "--lora.rank", 2), "--density and --lora.rank exclude each other"),
    (("--density", 0), "density is 0.0; it must be above 0 and at most 1"),
    (("--density", 1e-9), "density 1e-09 of [0-9]+ parameters keeps none; give more"),
    (("--methods", "rmu", "--settings", "rmu.layer=2"), "method rmu: layer is 2; the model has blocks 0 to 1"),
    (("--methods", "dpo", "--settings", "dpo.field=other"), "method dpo: .*has no text in field 'other'"),
    (("--methods", "npo", "--settings", "npo.beta=0"), "--settings npo.beta=0: beta is 0.0; it must be above 0"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.unlearn.command.main(train.unlearn.run, train.unlearn.PRESETS,
                                   [*map(str, ("--preset", "smoke", *flags, "--out", tmp_path / "out"))])  # fmt: skip
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert re.search(words, said.replace("\n", " ")) and "Traceback" not in said


def test_curves_are_those_of_the_first_seed_at_the_rate_that_it_kept():
    """Over seeds the mean of the rates may be that of a run which nobody kept."""
    lines = [{"stage": stage, "step": 1, "seed": seed, "forget_nll": 1.0}
             for stage in ("original", "npo@0.0001", "npo@0.0002", "npo@0.0003", "rmu") for seed in (0, 1)]
    out = SimpleNamespace(metrics=lambda: [*lines, {"stage": "rmu", "step": 2, "seed": 0, "loss": 3.0}])
    rows = [{"name": "original"}, {"name": "npo", "learning_rate": 3e-4}, {"name": "rmu", "learning_rate": None}]
    kept = train.unlearn._curves(out, 0, rows)
    assert [(one["stage"], one["seed"]) for one in kept] == [("original", 0), ("npo", 0), ("rmu", 0)]
    assert kept[1]["step"] == 1
