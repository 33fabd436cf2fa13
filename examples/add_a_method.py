"""Add an unlearning method of your own and see it beside gradient ascent and retraining.

    python examples/add_a_method.py --out runs/my-method

Cells (`# %%`) run one by one in an editor that knows them. In a fork the class goes into a file of its own in
jaxforget/unlearning/, and the last row into METHODS there.
"""

# %% A method is a frozen config; its recipe fills the slots of the training step.
import dataclasses
import functools

import jax

from jaxforget import checks, command
from jaxforget.training.objectives import sequence_mean, token_logp
from jaxforget.unlearning import METHODS, Loss, Recipe, Setting, retain
from train import unlearn


@dataclasses.dataclass(frozen=True, kw_only=True)
class CappedAscent(retain.RetainConfig):
    """Raise the loss of every forget record to `cap` nats a token and no further; descend on the retain set."""

    retain_weight: float = 2.0
    cap: float = 1.5

    def __post_init__(self):
        super().__post_init__()
        checks.positive(cap=self.cap)

    def recipe(self, setting: Setting) -> Recipe:
        return retain.recipe(self, setting, setting.sets["forget"], capped(self.cap), "sequence")


@functools.cache  # equal settings are the same function, which is compiled once
def capped(cap: float) -> Loss:
    """losses_B = max(0, cap - s_B),  s_B the mean of -log p over scored tokens."""

    def loss(parts, batch, logits_BTV):
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        return jax.nn.relu(cap + sequence_mean(logp_BT, scored_BT))

    return loss


METHODS["capped_ascent"] = CappedAscent()


# %% Everything else is there: learning rates, intervals over seeds, resume, LoRA, the report.
def preset() -> unlearn.Config:
    """gradient ascent and the new method on fictional people"""
    return dataclasses.replace(unlearn.default(), methods=("gradient_ascent", "capped_ascent"))


if __name__ == "__main__":
    command.main(unlearn.run, {"default": preset})
