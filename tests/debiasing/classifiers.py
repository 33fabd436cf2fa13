"""Small classifiers, and examples whose tokens tell a label and two attributes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import Examples
from jaxforget.models import family_of
from jaxforget.models.model import build

SMALL = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 24, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8,
    "num_labels": 2, "initializer_range": 0.1, "type_vocab_size": 1,
}  # fmt: skip
FAMILIES_OF = {
    "bert": SMALL | {"num_hidden_layers": 2},
    "distilbert": {
        "model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "vocab_size": 24,
        "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 8, "num_labels": 3,
    },
    "roberta": SMALL | {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"],
                        "pad_token_id": 0, "max_position_embeddings": 10},
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "vocab_size": 24, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3,
    },
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "vocab_size": 24, "n_embd": 16,
             "n_layer": 1, "n_head": 2, "n_positions": 8, "num_labels": 2},
}  # fmt: skip


@functools.cache
def classifier(name="small", seed=1):
    raw = SMALL if name == "small" else FAMILIES_OF[name]
    model = build(family_of(raw["model_type"]).Config.from_hf(raw))
    return model, jax.tree.map(np.asarray, model.init(jax.random.key(seed)))


@dataclasses.dataclass(frozen=True)
class Toy:
    """A classifier that compiles in no time: the mean of embeddings, two stacked blocks, and a head of two layers."""

    head: bool = True
    width: int = 16
    config = SimpleNamespace(stacks={"blocks": 2})

    @property
    def headless(self):
        return dataclasses.replace(self, head=False)

    def init(self, key):
        d = self.width
        shapes = {"embed": {"table": (24, d)}, "blocks": {"mlp": {"kernel": (2, d, d), "bias": (2, d)}}}
        if self.head:
            shapes |= {"pool": {"kernel": (d, d), "bias": (d,)}, "score": {"kernel": (d, 2), "bias": (2,)}}
        leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(0.3 * jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True))

    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def pooled(self, params, batch):
        x_BTD = params["embed"]["table"][batch["tokens"]]
        real_BT = jnp.arange(x_BTD.shape[1])[None] < batch["length"][:, None]
        x_BD = jnp.sum(jnp.where(real_BT[..., None], x_BTD, 0.0), axis=1) / 3.0
        for layer in range(2):
            x_BD = x_BD + jnp.tanh(_dense(jax.tree.map(lambda x, i=layer: x[i], params["blocks"]["mlp"]), x_BD))
        return x_BD

    def classify(self, params, x_BD):
        return _dense(params["score"], jnp.tanh(_dense(params["pool"], x_BD)))

    def batch_logits(self, params, batch):
        return self.classify(params, self.pooled(params, batch))


def _dense(layer, x_BD):
    return x_BD @ layer["kernel"] + layer["bias"][None]


@functools.cache
def toy(seed=1):
    return Toy(), jax.tree.map(np.asarray, Toy().init(jax.random.key(seed)))


def examples(count=96, seed=0) -> Examples:
    """Token 2 or 3 tells the label, 4 or 5 and 6 or 7 the attributes, each right in nine of ten rows."""
    rng = np.random.default_rng(seed)
    label_N, attributes_NJ = rng.integers(0, 2, count), rng.integers(0, 2, (count, 2))
    tokens_NT = rng.integers(8, 24, (count, 8))
    tokens_NT[:, 0] = 1
    for place, (first, value_N) in enumerate([(2, label_N), (4, attributes_NJ[:, 0]), (6, attributes_NJ[:, 1])]):
        told_N = np.where(rng.random(count) < 0.9, value_N, 1 - value_N)
        tokens_NT[:, 1 + place] = first + told_N
    ids = tuple(f"{seed}-{n}" for n in range(count))
    columns = {"tokens": tokens_NT.astype(np.int32), "length": np.full(count, 8, np.int32), "key": id_keys(ids),
               "label": label_N.astype(np.int32), "attributes": attributes_NJ.astype(np.int32)}  # fmt: skip
    return Examples(ids, columns)
