"""Optimisers of unlearning are torch's, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from worlds import GOLDEN

from jaxforget.influence.optimizers import SCALINGS, ascent_optimizer
from jaxforget.training.optimizer import set_schedule
from jaxforget.training.step import State

NAMES = {
    "sgd": "sgd", "momentum": "sgd_momentum09_dampening09", "rmsprop": "rmsprop_alpha099_eps1e8_outside_sqrt",
    "adam": "adam_b1_09_b2_0999_eps1e8",
    "adafactor": "adafactor_clip1_decay08_no_first_moment_no_param_scale_no_relative_step",
}  # fmt: skip


def follow(optimizer, params, gradients, rate):
    """Apply updates one after the other; yields the parameters."""
    state = optimizer.init(params)
    state = set_schedule(State(None, None, state, None, None), learning_rate=rate, total=1).opt_state
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


@pytest.mark.skipif(GOLDEN is None, reason="the golden file is not beside the checkout")
@pytest.mark.parametrize("name", NAMES)
def test_golden_trajectories(name):
    golden = GOLDEN["optimiser_trajectories"]
    with jax.enable_x64(True):
        gradients = [jnp.array(g) for g in golden["gradients"]]
        found = list(follow(ascent_optimizer(name), jnp.zeros(golden["param_shape"]), gradients, golden["lr"]))
    # The file has ten decimals; optax computes the decay of Adafactor in single precision.
    expected, atol = golden["params_after_each_step"][NAMES[name]], 1e-9 if name == "adafactor" else 2e-10
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def layers(seed, stack=3):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 6), "bias": (6,)}
    blocks = {name: rng.normal(size=(stack, *shape)).astype(np.float32) for name, shape in shapes.items()}
    top = {"table": rng.normal(size=(5, 4)).astype(np.float32), "scale": rng.normal(size=4).astype(np.float32)}
    return {"model": {"blocks": blocks, **top}}


def test_a_stack_of_layers_is_scaled_layer_by_layer():
    """Adafactor factors matrices, not biases, and clips tensor by tensor: a stacked leaf is many tensors."""
    gradients = [layers(seed) for seed in (1, 2)]
    stacked = list(follow(ascent_optimizer("adafactor"), layers(0), gradients, 0.01))[-1]

    def taken(tree, layer):
        model = tree["model"]
        return {"l": {n: x[layer] for n, x in model["blocks"].items()}, "t": model["table"], "s": model["scale"]}

    for layer in range(3):
        alone = [taken(g, layer) for g in gradients]
        expected = list(follow(ascent_optimizer("adafactor"), taken(layers(0), layer), alone, 0.01))[-1]
        for one, other in zip(jax.tree.leaves(taken(stacked, layer)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_first_directions():
    """One step of Adam is the sign of the gradient, of RMSProp ten times that, whatever the gradient's size."""
    gradient = jnp.array([3.0, -1e-3, 40.0, -7.0])
    for name, size in [("adam", 1.0), ("rmsprop", 10.0)]:
        moved = next(follow(ascent_optimizer(name), jnp.zeros(4), [gradient], 1e-3))
        np.testing.assert_allclose(moved, -size * 1e-3 * np.sign(gradient), rtol=1e-3)


@pytest.mark.parity
@pytest.mark.parametrize("name", SCALINGS)
def test_against_torch(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    start = rng.normal(size=(7, 5)).astype(np.float32)
    gradients = [(rng.normal(size=(7, 5)) * 10.0 ** rng.uniform(-4, 1, (7, 5))).astype(np.float32) for _ in range(6)]
    tensor = torch.nn.Parameter(torch.tensor(start))
    make = {
        "adam": lambda: torch.optim.Adam([tensor], lr=0.01),
        "rmsprop": lambda: torch.optim.RMSprop([tensor], lr=0.01, alpha=0.99),
        "sgd": lambda: torch.optim.SGD([tensor], lr=0.01),
        "momentum": lambda: torch.optim.SGD([tensor], lr=0.01, momentum=0.9, dampening=0.9),
        "adafactor": lambda: pytest.importorskip("transformers.optimization").Adafactor(
            [tensor], lr=0.01, scale_parameter=False, relative_step=False
        ),
    }
    theirs = make[name]()
    followed = follow(ascent_optimizer(name), jnp.array(start), gradients, 0.01)
    for ours, gradient in zip(followed, gradients, strict=True):
        tensor.grad = torch.tensor(gradient)
        theirs.step()
        np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=2e-5, atol=2e-6)
