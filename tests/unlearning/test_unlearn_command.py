"""Runs of several methods: what moves, what is kept on disk, and going on after a kill."""

import re

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
from jaxforget.training.step import make_step
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
    """A stored reference, sampled answers, hidden states, a dual variable, a model made of what was trained, another."""
    methods = ("npo", "alt_po", "rmu", "pdu", "task_vector", "whp")
    out = in_process(train.unlearn, "adapters", *SMOKE, "--methods", *methods, "--lora.rank", 2).out
    models = out / "seed0" / "models"
    _, original = hub.load(models / "original")
    for name in methods:
        _, params = hub.load(models / name)
        changed = {path for (path, x), (_, y) in zip(jax.tree_util.tree_leaves_with_path(params),
                                                     jax.tree_util.tree_leaves_with_path(original), strict=True)
                   if not np.array_equal(x, y)}  # fmt: skip
        assert {jax.tree_util.keystr(path, simple=True, separator="/") for path in changed} == {
            "blocks/attn/q/kernel", "blocks/attn/v/kernel"}, name  # fmt: skip
    kept = sorted(path.name for path in (out / "seed0" / "reference").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["alternatives", "reinforced", "sequence_logp", "sequence_logp"]


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
