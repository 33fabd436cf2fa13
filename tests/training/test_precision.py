"""Stated precision: float32 parameters, optimizer state, logits and losses; products in the compute dtype."""

import jax
import jax.numpy as jnp
import pytest
from conftest import make_examples

from jaxforget.models import Model
from jaxforget.models.llama import Config
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig, adamw
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything

CONFIG = Config(
    vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip


def products(jaxpr):
    """Every dot_general of a jaxpr, those inside scans and calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_master_weights_are_float32_and_products_are_in_the_compute_dtype(dtype):
    model = Model(CONFIG, dtype=dtype)
    step = make_step(next_token(model), everything(), mean_gradient(2), adamw(OptimizerConfig()))
    state, frozen = step.init(jax.random.key(0), {"model": model.init(jax.random.key(1))})
    batches = Batches((Stream(make_examples(4), 4),), 1, 0)
    batch = {name: jnp.asarray(value[0]) for name, value in batches.take(0, 1, 1).items()}
    moved, metrics = jax.eval_shape(step.update, state, frozen, batch)
    assert jax.tree.map(lambda x: x.dtype, moved) == jax.tree.map(lambda x: x.dtype, state)
    floats = [leaf.dtype for leaf in jax.tree.leaves(moved) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32

    params = model.init(jax.random.key(1))
    assert jax.eval_shape(model.logits, params, batch["tokens"]).dtype == jnp.float32
    forward = jax.make_jaxpr(model.logits)(params, batch["tokens"])
    inputs = {variable.aval.dtype for equation in products(forward.jaxpr) for variable in equation.invars}
    assert inputs == {jnp.dtype(dtype)}
