"""Direct preference optimisation: prefer another answer to the one to forget.

    L_forget = -(2/beta) mean_b log sigmoid(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)))

y_l is the answer to forget, log pi a sum over its tokens. The methods differ in the answer y_w that is preferred:
    dpo       another answer of the records, such as TOFU's wrong ones
    idk_dpo   a refusal, drawn once by (seed, example id). OpenUnlearning draws again at every visit
    alt_po    a plausible alternative, of the records or sampled from the starting model
Sources: arXiv 2305.18290; as unlearning arXiv 2401.06121 (IdkDPO) and 2409.13474 (AltPO), with the factor of the
released code of arXiv 2506.12618. beta 0.1, weights 1 and 1: OpenUnlearning's settings.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from jaxforget import checks
from jaxforget.data.tokens import Examples
from jaxforget.models import Model
from jaxforget.unlearning import answers, retain
from jaxforget.unlearning.recipe import Loss, Recipe, Setting
from jaxforget.unlearning.reference import reference_logp, sequence_logp


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(retain.RetainConfig):
    beta: float = 0.1
    """Sharpness of the preference."""
    prefer: str = "field"
    """The preferred answer. field: of the forget records; refusal: that nothing is known; generated: of the forget
    records, or where they have none sampled from the starting model."""
    field: str = "perturbed_answer"
    """Field of the forget records with the preferred answer; of a list the first."""
    temperature: float = 1.0
    """Of sampling. It rises by a quarter whenever the answer to forget comes out again."""
    max_new_tokens: int = 64
    """Longest sampled answer in tokens."""

    def __post_init__(self):
        super().__post_init__()
        checks.positive(beta=self.beta, temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        checks.one_of(("field", "refusal", "generated"), prefer=self.prefer)

    def check(self, setting: Setting) -> None:
        if self.prefer == "field":
            answers.from_field(setting, self.field)
        answers.questions(setting)

    def recipe(self, setting: Setting) -> Recipe:
        if self.prefer == "refusal":
            preferred = answers.refused(setting)
        elif self.prefer == "field" or answers.has_field(setting, self.field):
            preferred = answers.from_field(setting, self.field)
        else:
            preferred = answers.generated(setting, self.temperature, self.max_new_tokens)
        forget = paired(setting, setting.sets["forget"], setting.encode(preferred))
        return retain.recipe(self, setting, forget, dpo(setting.model, self.beta), "sequence", prepare_forwards=1)


def paired(setting: Setting, forget: Examples, preferred: Examples) -> Examples:
    """Add the preferred answers, and what the starting model says of both, to the examples.

    A row then holds two sequences, and its length is theirs together.
    """
    if preferred.ids != forget.ids:
        raise ValueError("the preferred answers are not those of the forget examples, in their order")
    length_N = forget.lengths + preferred.lengths
    return retain.with_columns(
        forget, length=length_N.astype(np.int32), preferred_tokens=preferred.columns["tokens"],
        preferred_labels=preferred.columns["labels"], reference_logp=reference_logp(setting, forget),
        preferred_reference_logp=reference_logp(setting, preferred),
    )  # fmt: skip


@functools.cache
def dpo(model: Model, beta: float) -> Loss:
    """losses_B = -(2/beta) log sigmoid(beta (ratio of the preferred answer - ratio of the one to forget))."""

    def loss(parts, batch, logits_BTV):
        other = {"tokens": batch["preferred_tokens"]}
        other_BTV = retain.on_stream(0, batch, lambda: model.batch_logits(parts["model"], other))
        worse_B = sequence_logp(logits_BTV, batch["labels"]) - batch["reference_logp"]
        better_B = sequence_logp(other_BTV, batch["preferred_labels"]) - batch["preferred_reference_logp"]
        return -2.0 / beta * jax.nn.log_sigmoid(beta * (better_B - worse_B))

    return loss
