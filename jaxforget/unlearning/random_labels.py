"""Random labels: descend on the forget set with random targets.

    L = mean_b s_b with targets a_t ~ Uniform{0..V-1}

Source: Yao et al., arXiv 2402.15159, row 2. As in the released code, labels are drawn once and stay fixed over
epochs, the true token is not excluded, and special tokens (pad, eos, bos, unk) keep their own id. There one stream of
draws runs through the file; here a draw depends on (seed, example id, position) alone, so neither order nor deletion
of other examples changes it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from jaxforget.data.sampling import hash64
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.training.batches import Stream
from jaxforget.training.objectives import next_token
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLabels:
    """No settings."""

    needs: ClassVar[tuple[str, ...]] = ()

    def recipe(self, setting: Setting) -> Recipe:
        model, forget = setting.model, setting.sets["forget"]
        relabelled = random_labels(forget, model.vocab_size, setting.seed, setting.special_ids)
        return Recipe((Stream(relabelled, setting.rows, 1.0),), next_token(model))


def random_labels(examples: Examples, vocab_size: int, seed: int, special_ids: tuple[int, ...] = ()) -> Examples:
    """Replace every scored label by a uniform token id, keeping special tokens."""
    labels_NT = examples.columns["labels"]
    position_T = np.arange(labels_NT.shape[1], dtype=np.uint64)
    bits_NT = hash64(seed, examples.columns["key"][:, None], position_T[None, :])
    drawn_NT = (bits_NT % np.uint64(vocab_size)).astype(np.int32)  # bias below vocab_size / 2**64
    keep_NT = (labels_NT == IGNORED) | np.isin(labels_NT, special_ids)
    labels_NT = np.where(keep_NT, labels_NT, drawn_NT)
    return dataclasses.replace(examples, columns={**examples.columns, "labels": labels_NT})
