"""Tiny models whose weights follow an integer formula, so that torch and JAX build the same ones without a
generator.

`python tests/models/formula.py` (needs torch) rewrites golden_logits.json; the parity tests check that it is
current.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden_logits.json")
_SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 31,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
    },
    "llama": _SMALL | {"model_type": "llama", "rope_parameters": _LLAMA3, "tie_word_embeddings": False},
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 5, "head_dim": 6, "tie_word_embeddings": False},
    "qwen2": _SMALL | {"model_type": "qwen2", "rope_theta": 1000.0, "tie_word_embeddings": True},
}
TOKENS_BT = (np.arange(24).reshape(2, 12) ** 2 * 7 + np.arange(12)) % 31
POSITIONS = (0, 5, 11)  # of the logits that the file keeps


def tensor(name: str, shape) -> np.ndarray:
    """Return the float32 tensor of this Hugging Face name: pseudo-random; near 1 for the scale of a norm."""
    i = np.arange(int(np.prod(shape)), dtype=np.int64)
    uniform = ((i * i * 31 + i * 7919 + zlib.crc32(name.encode()) % 1009) % 1009) / 1008 - 0.5
    norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
    return (1 + 0.3 * uniform if norm else 0.8 * uniform).astype(np.float32).reshape(shape)


def model(name: str, **options):
    """Return our model and its parameters."""
    from jaxforget.models import FAMILIES, Model, hub

    model = Model(FAMILIES[name].Config.from_hf(CONFIGS[name]), **options)
    shapes = hub.to_tensors(model, model.shapes())
    return model, hub.to_params(model, {key: tensor(key, shape) for key, (shape, _) in shapes.items()})


def torch_logits(name: str) -> np.ndarray:
    """Return the logits of transformers on torch, (B, T, V)."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.copy_(torch.from_numpy(tensor(key, tuple(value.shape))))
        return theirs(torch.from_numpy(TOKENS_BT)).logits.numpy()


if __name__ == "__main__":
    golden = {name: np.round(torch_logits(name)[:1, POSITIONS].astype(float), 5).tolist() for name in CONFIGS}
    GOLDEN.write_text(json.dumps(golden) + "\n")
