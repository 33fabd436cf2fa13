"""UNDIAL: distil the starting model with the logit of the true token lowered.

    L_forget = mean over scored tokens of CE(softmax(z_ref - beta onehot(y)), p_theta)

At beta 0 and the starting model the gradient is 0. Source: arXiv 2402.10052. The released code of arXiv 2506.12618
averages over prompt and padding too, where it lowers the logit of vocabulary entry V - 100; we over scored tokens.
beta 10 and no retain term are its settings, with learning rate 1e-4; the paper used LoRA of rank 8. The target takes
all logits of the starting model, too many to keep: it runs beside, as the part `reference`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxforget import checks
from jaxforget.data.tokens import IGNORED
from jaxforget.models import Model
from jaxforget.training.objectives import sequence_mean
from jaxforget.unlearning import retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undial(retain.RetainConfig):
    retain_weight: float = 0.0
    """w_r, alpha in OpenUnlearning. 0 leaves the retain term out."""
    beta: float = 10.0
    """How much the logit of the true token is lowered."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(0, beta=self.beta)

    def recipe(self, setting: Setting) -> Recipe:
        kl = self.retain_loss == "kl" and self.retain_weight
        return retain.recipe(
            self, setting, setting.sets["forget"], undial(setting.model, self.beta), "token",
            parts={"reference": setting.params}, reference_streams=(0, 1) if kl else (0,),
        )  # fmt: skip


@functools.cache
def undial(model: Model, beta: float) -> Loss:
    """losses_B = mean over scored tokens of the cross-entropy to the lowered distribution."""

    def loss(parts, batch, logits_BTV):
        labels_BT, vocabulary_V = batch["labels"], jnp.arange(logits_BTV.shape[-1])
        reference_BTV = retain.on_stream(0, batch, lambda: model.batch_logits(parts["reference"], batch))
        true_BTV = labels_BT[..., None] == vocabulary_V[None, None]
        lowered_BTV = jax.lax.stop_gradient(reference_BTV).astype(jnp.float32) - beta * true_BTV
        logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        cross_BT = -jnp.sum(jax.nn.softmax(lowered_BTV) * logp_BTV, axis=-1)
        return sequence_mean(cross_BT, labels_BT != IGNORED)

    return loss
