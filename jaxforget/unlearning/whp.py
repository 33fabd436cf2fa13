"""WHP ("Who's Harry Potter?"): distil what the starting model says without what more of the forget text would add.

    L_forget = mean over scored tokens of CE(softmax(z_ref - scale relu(z_reinforced - z_ref)), p_theta)

The reinforced model is the starting one tuned on the forget set. At scale 0 and the starting model the gradient is 0.
Source: arXiv 2310.02238, section 2.1. The paper distils the argmax of these logits, after names in the text were
replaced by generic ones that GPT-4 proposed, which we leave out; we distil their softmax. MUSE (arXiv 2407.06460)
evaluates the logits themselves, with both models at inference; what is left here is one model, saved as any other.
Scale and rate are our choice, the 10 epochs MUSE's for tuning on the forget set. All logits of two models are too many
to keep: both run beside, as the parts `reference` and `reinforced`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.data.tokens import IGNORED
from jaxforget.models import Model, Params
from jaxforget.models.sharding import host
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token, sequence_mean
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting
from jaxforget.unlearning.reference import stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class WHP(retain.RetainConfig):
    retain_weight: float = 0.0
    """w_r. 0 leaves the retain term out."""
    scale: float = 5.0
    """How much of the rise of a logit is taken off it."""
    reinforce_epochs: int = 10
    """Passes over the forget set that make the reinforced model; all its parameters move."""
    reinforce_rate: float = 1e-4
    """Their learning rate, constant."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, scale=self.scale)
        checks.at_least(1, reinforce_epochs=self.reinforce_epochs)
        checks.positive(reinforce_rate=self.reinforce_rate)

    def recipe(self, setting: Setting) -> Recipe:
        kl = self.retain_loss == "kl" and self.retain_weight
        return retain.recipe(
            self, setting, setting.sets["forget"], whp(setting.model, self.scale), "token",
            parts={"reference": setting.params,
                   "reinforced": reinforced(setting, self.reinforce_epochs, self.reinforce_rate)},
            prepare_forwards=3 * self.reinforce_epochs,  # forward, and backward for twice that
            reference_streams=(0, 0, 1) if kl else (0, 0),
        )  # fmt: skip


def reinforced(setting: Setting, epochs: int, learning_rate: float) -> Params:
    """Return the parameters of the starting model tuned on the forget set, on the host; kept on disk."""
    config = OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup=0.0)
    forget, model = setting.sets["forget"], setting.model
    step = make_step(next_token(model), everything(), mean_gradient(setting.microbatch), adamw(config))

    def compute():
        batches = Batches((Stream(forget, setting.rows),), epochs, setting.seed, "token")
        state, frozen = step.init(jax.random.key(setting.seed), {"model": setting.params})
        state = set_schedule(state, learning_rate=learning_rate, total=batches.steps)
        params = step.combine(frozen, fit(step, state, frozen, batches).state.trainable)["model"]
        return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(host(params)))}

    how = {"epochs": epochs, "learning_rate": learning_rate, "rows": setting.rows, "seed": setting.seed}
    leaves = stored(setting, "reinforced", forget, compute, **how)
    return jax.tree.unflatten(jax.tree.structure(setting.params), [leaves[str(i)] for i in range(len(leaves))])


@functools.cache
def whp(model: Model, scale: float) -> Loss:
    """losses_B = mean over scored tokens of the cross-entropy to the distribution without what reinforcement adds."""

    def loss(parts, batch, logits_BTV):
        def logits(name):
            found_BTV = retain.on_stream(0, batch, lambda: model.batch_logits(parts[name], batch))
            return jax.lax.stop_gradient(found_BTV).astype(jnp.float32)

        was_BTV = logits("reference")
        generic_BTV = was_BTV - scale * jax.nn.relu(logits("reinforced") - was_BTV)
        logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        cross_BT = -jnp.sum(jax.nn.softmax(generic_BTV) * logp_BTV, axis=-1)
        return sequence_mean(cross_BT, batch["labels"] != IGNORED)

    return loss
