"""What the starting model says about examples, or learns from them: computed once before training and kept on disk.

Shapes: N examples, B batch, T tokens.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import Examples
from jaxforget.files import save_arrays
from jaxforget.metrics.language import in_batches
from jaxforget.training.checkpoints import digest
from jaxforget.training.objectives import token_logp
from jaxforget.unlearning.recipe import Setting


def sequence_logp(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Return log p of a sequence's scored tokens together, (B,), nats: log pi."""
    return jnp.sum(token_logp(logits_BTV, labels_BT)[0], axis=-1)


def reference_logp(setting: Setting, examples: Examples) -> np.ndarray:
    """Return `sequence_logp` of every example under the starting model, float32 (N,)."""

    def compute():
        return {"logp": in_batches(_sequence_logp(setting.model), setting.params, examples, 32)}

    return stored(setting, "sequence_logp", examples, compute)["logp"]


@functools.cache
def _sequence_logp(model):
    return jax.jit(lambda params, batch: sequence_logp(model.batch_logits(params, batch), batch["labels"]))


def stored(
    setting: Setting, name: str, examples: Examples, compute: Callable[[], Mapping[str, np.ndarray]], **settings: Any
) -> dict[str, np.ndarray]:
    """Return the arrays of `compute()`, read from `setting.cache` where they are there already.

    A file belongs to the starting parameters, how the model is computed, the examples (ids and columns) and the
    settings; another of those, or a damaged file, is computed again.
    """
    if setting.cache is None:
        return dict(compute())
    about = json.dumps([name, repr(setting.model), examples.ids, settings])
    key = digest({"params": setting.params, "columns": examples.columns, "about": np.frombuffer(about.encode(), "u1")})
    path = setting.cache / f"{name}-{key[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return {field: file[field] for field in file.files if field != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    arrays = {field: np.asarray(array) for field, array in compute().items()}
    setting.cache.mkdir(parents=True, exist_ok=True)
    save_arrays(path, key=np.asarray(key), **arrays)
    return arrays
