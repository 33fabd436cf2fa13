"""Tiny models whose weights follow an integer formula, so that torch and JAX build the same ones without a
generator.

`PYTHONPATH=. python tests/models/formula.py` (needs torch) rewrites golden_logits.json; the parity tests check that
it is current.
"""

from __future__ import annotations

import functools
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
_LABELS = {"0": "a", "1": "b", "2": "c"}
_BERT = {key: value for key, value in _SMALL.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
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
    "llama-classification": _SMALL
    | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": _LABELS}
    | {"pad_token_id": 0},
    "bert": _BERT | {"model_type": "bert"},
    "bert-classification": _BERT
    | {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": _LABELS},
    "roberta": _BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 0},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 31,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 31,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 12,
    },
    "gpt_neox": _BERT | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "t5": {
        "model_type": "t5",
        "vocab_size": 31,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 24,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 9,
    },
}
BATCH = {
    "tokens": (np.arange(24).reshape(2, 12) ** 2 * 7 + np.arange(12)) % 30 + 1,
    "length": np.asarray([12, 9]),  # 0, the padding id of every config here, follows
    "segments": np.asarray([[0] * 5 + [1] * 7, [0] * 12]),
    "decoder_tokens": (np.arange(16).reshape(2, 8) * 5) % 31,
}
BATCH["tokens"][1, 9:] = 0
POSITIONS = (0, 5, 7)  # of the logits that the file keeps


# Names in files -> in transformers' modules, where it renames what it reads.
MODULES = {"embed_out.weight": "lm_head.weight"}


def tensor(name: str, shape) -> np.ndarray:
    """Return the float32 tensor of this Hugging Face name: pseudo-random; near 1 for the scale of a norm."""
    i = np.arange(int(np.prod(shape)), dtype=np.int64)
    name = MODULES.get(name, name)
    uniform = ((i * i * 31 + i * 7919 + zlib.crc32(name.encode()) % 1009) % 1009) / 1008 - 0.5
    return (1 + 0.3 * uniform if is_scale(name) else 0.8 * uniform).astype(np.float32).reshape(shape)


def is_scale(name: str) -> bool:
    """Say whether a Hugging Face name is the scale of a norm."""
    return name.endswith("weight") and any(part in name.lower() for part in ("norm", "ln_"))


@functools.cache
def model(name: str):
    """Return our model and its parameters."""
    from jaxforget.models import family_of, hub
    from jaxforget.models.model import build

    model = build(family_of(CONFIGS[name]["model_type"]).Config.from_hf(CONFIGS[name]))
    shapes = hub.to_tensors(model, model.shapes())
    return model, hub.to_params(model, {key: tensor(key, shape) for key, (shape, _) in shapes.items()})


def kept(logits) -> np.ndarray:
    """Return what the golden file keeps of logits: three positions of (B, T, V), all of (B, C)."""
    logits = np.asarray(logits)
    return logits[:, list(POSITIONS)] if logits.ndim == 3 else logits


def torch_model(raw: dict):
    """Return the transformers model of a config.json, as built there."""
    import transformers

    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    # Without architectures in the file: the family's usual head.
    from jaxforget.models import family_of

    usual = next(iter(family_of(raw["model_type"]).ARCHITECTURES[raw["model_type"]].values()))
    theirs = getattr(transformers, (raw.get("architectures") or [usual])[0])._from_config(config).eval()
    # T5 is built tied whatever the config says; only reading a file unties it.
    if raw["model_type"] == "t5" and raw.get("tie_word_embeddings") is False:
        theirs.lm_head.weight = type(theirs.lm_head.weight)(theirs.lm_head.weight.detach().clone())
    return theirs


def torch_logits(theirs, batch) -> np.ndarray:
    """Return the logits of transformers on torch for the columns of a batch."""
    import torch

    mask_BT = np.arange(batch["tokens"].shape[1])[None] < batch["length"][:, None]
    inputs = {"input_ids": batch["tokens"], "attention_mask": mask_BT.astype(np.int64)}
    if getattr(theirs.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch["segments"]
    if theirs.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["decoder_tokens"]
    with torch.no_grad():
        out = theirs(**{name: torch.from_numpy(np.array(value)) for name, value in inputs.items()})
    return (out.logits if "logits" in out else out.last_hidden_state).float().numpy()


def torch_golden(name: str) -> np.ndarray:
    import torch

    theirs = torch_model(CONFIGS[name])
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.copy_(torch.from_numpy(tensor(key, tuple(value.shape))))
    return kept(torch_logits(theirs, BATCH))


if __name__ == "__main__":
    golden = {name: np.round(torch_golden(name).astype(float), 5).tolist() for name in CONFIGS}
    GOLDEN.write_text("{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in golden) + "}\n")
