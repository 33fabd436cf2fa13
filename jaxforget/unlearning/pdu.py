"""Primal-dual unlearning: flatten the logits of forget text while the retain loss stays below a bound.

    L = w_f L_forget + lambda (L_retain - epsilon),   L_forget = mean over scored tokens of (max_v z - mean_v z)^2
    lambda <- max(0, lambda + eta (L_retain - epsilon)) at every step, after a warm-up

lambda is a part that moves: its gradient is L_retain - epsilon, and its optimizer a projected ascent. Source: arXiv
2506.05314, as PDU in the released code of arXiv 2506.12618, which masks unshifted logits by unshifted labels and so is
off by one; we take the logits that predict scored tokens. eta 1, every step, 5 epochs of warm-up are its settings;
lambda starts at 1 in its YAML file, its documentation advises 50 to 100.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxforget import checks
from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.metrics.language import language_metrics, token_scores
from jaxforget.models import Model
from jaxforget.training.objectives import sequence_mean
from jaxforget.training.step import Batch, Objective, Parts
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Recipe, Setting
from jaxforget.unlearning.reference import stored

SLACK = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PDU(retain.RetainConfig):
    retain_weight: float = 1.0
    """lambda at the start."""
    epsilon: float = 0.0
    """Bound on the retain loss, nats a token. 0: 1.1 times the starting model's, with retain_loss nll."""
    eta: float = 1.0
    """Rate of lambda."""
    warmup_epochs: int = 5
    """Passes over the forget set before lambda moves."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, epsilon=self.epsilon, eta=self.eta, warmup_epochs=self.warmup_epochs)
        if not self.epsilon and self.retain_loss != "nll":
            raise UserError(f"epsilon is 0; with retain_loss {self.retain_loss!r} it must be above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.retain_set,)

    def recipe(self, setting: Setting) -> Recipe:
        forget = setting.sets["forget"]
        # lambda is the weight of the retain rows, whatever it starts from.
        weighed = dataclasses.replace(self, retain_weight=1.0)
        streams = retain.streams(weighed, setting, forget, "token")
        epsilon = self.epsilon or SLACK * starting_loss(setting, self.retain_set)
        steps = self.warmup_epochs * -(-len(forget) // setting.rows)
        return Recipe(
            streams, pdu(setting.model, self.retain_loss),
            {**retain.reference_parts(weighed, setting), "dual": np.float32(self.retain_weight),
             "bound": np.float32(epsilon)},
            optimizers={"dual": projected_ascent(self.eta, steps)},
            reference_streams=(1,) if self.retain_loss == "kl" else (),
        )  # fmt: skip


def starting_loss(setting: Setting, name: str) -> float:
    """Return the starting model's loss on a set, nats a token."""
    examples = setting.sets[name]

    def compute():
        return {"nll": language_metrics(token_scores(setting.model, setting.params, examples))["nll"]}

    return float(stored(setting, "nll", examples, compute)["nll"])


@functools.cache
def pdu(model: Model, retain_loss: str) -> Objective:
    """Flatness of the logits on the first stream; lambda (retain loss - epsilon) on the second, times factor_B."""
    both = retain.both(model, flatness, retain_loss)

    def losses(parts, batch, key):
        loss_B = both(parts, batch, key)
        bounded_B = parts["dual"] * (loss_B - batch["factor"] * parts["bound"])
        return jnp.where(batch["stream"] == 0, loss_B, bounded_B)

    return losses


def flatness(parts: Parts, batch: Batch, logits_BTV: jax.Array) -> jax.Array:
    """losses_B = mean over scored tokens of (max_v z - mean_v z)^2."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    gap_BT = jnp.max(logits_BTV, axis=-1) - jnp.mean(logits_BTV, axis=-1)
    return sequence_mean(jnp.square(gap_BT), batch["labels"] != IGNORED)


@functools.cache
def projected_ascent(rate: float, wait: int) -> optax.GradientTransformation:
    """Climb by rate * gradient and stay at 0 or above, after `wait` updates without moving."""

    def update(grads, count, params):
        def climb(gradient, value):
            moved = jnp.maximum(value + rate * gradient, 0.0) - value
            return jnp.where(count < wait, jnp.zeros_like(value), moved)

        return jax.tree.map(climb, grads, params), count + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)
