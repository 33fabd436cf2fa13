"""Task vector: learn the forget set better still, and go as far the other way.

    theta = theta_0 - scale (theta_ft - theta_0),   theta_ft = theta_0 tuned on the forget set

What is evaluated while theta_ft is tuned, and saved, is theta. scale 0 gives theta_0, -1 gives theta_ft. Source: arXiv
2212.04089, as in the code of MUSE (arXiv 2407.06460): scale 5 in its scripts, 1 to 16 in its selection; 10 epochs with
learning rate 1e-5.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax

from jaxforget.training.batches import Stream
from jaxforget.training.objectives import next_token
from jaxforget.training.step import Parts, PyTree
from jaxforget.unlearning.recipe import Recipe, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskVector:
    scale: float = 5.0
    """How far to go the other way."""

    needs: ClassVar[tuple[str, ...]] = ()

    def recipe(self, setting: Setting) -> Recipe:
        stream = Stream(setting.sets["forget"], setting.rows, 1.0, "token")
        parts = {"reference": setting.params}
        return Recipe((stream,), next_token(setting.model), parts, finish=negated(self.scale))


@functools.cache
def negated(scale: float) -> Callable[[Parts], PyTree]:
    """theta_0 - scale (theta - theta_0), with theta_0 in parts["reference"]."""

    def finish(parts):
        return jax.tree.map(lambda was, x: was - scale * (x - was), parts["reference"], parts["model"])

    return finish
