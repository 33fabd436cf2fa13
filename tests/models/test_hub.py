"""Hugging Face directories: round trips and every refusal."""

import json
import re

import formula
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxforget.errors import UserError
from jaxforget.models import Model, family_of, hub, load, save

NAMES = list(formula.CONFIGS)


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    """A saved llama and its parameters."""
    model, params = formula.model("llama")
    return save(tmp_path / "llama", model, params), params


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_exact(name, tmp_path):
    model, params = formula.model(name)
    save(tmp_path / "one", model, jax.device_put(params))
    again, loaded = load(tmp_path / "one")
    assert again == model and equal(loaded, params)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))
    save(tmp_path / "two", again, loaded)
    for file in (hub.CONFIG, hub.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_config_keeps_keys_that_we_do_not_use(tmp_path):
    raw = formula.CONFIGS["qwen2"] | {
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
        "sliding_window": 99,
        "mine": {"a": 1},
    }
    config = family_of("qwen2").Config.from_hf(raw)
    written = config.to_hf()
    assert {key: written[key] for key in raw} == raw
    assert config.windows == (None, None)


def test_shards_with_index(tmp_path):
    model, params = formula.model("llama")
    save(tmp_path / "m", model, params, max_shard_bytes=5000)
    index = json.loads((tmp_path / "m" / hub.INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert equal(load(tmp_path / "m")[1], params)
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} is missing"):
        load(tmp_path / "m")


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision_files(dtype, stored, tmp_path):
    model, params = formula.model("gpt2")
    save(tmp_path / "m", model, params, dtype=dtype)
    assert json.loads((tmp_path / "m" / hub.CONFIG).read_text())["torch_dtype"] == dtype
    again, loaded = load(tmp_path / "m", dtype="bfloat16")
    assert again == Model(model.config, dtype="bfloat16")
    assert equal(loaded, jax.tree.map(lambda leaf: leaf.astype(stored).astype(np.float32), params))


def test_copies_tokenizer_and_extra_files(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    model, params = formula.model("gpt2")
    out = save(tmp_path / "m", model, params, tokenizer_dir=tmp_path / "tokenizer", extra_files={"note.txt": "hello"})
    assert (out / "tokenizer.json").read_text() == "{}" and (out / "note.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_save_leaves_nothing_behind_when_it_fails(tmp_path):
    model, params = formula.model("gpt2")
    partial = {name: leaf for name, leaf in params.items() if name != "final_norm"}
    with pytest.raises(KeyError):
        save(tmp_path / "m", model, partial)
    assert list(tmp_path.iterdir()) == []


def test_save_does_not_overwrite(saved):
    directory, params = saved
    with pytest.raises(UserError, match="not an empty directory"):
        save(directory, formula.model("llama")[0], params)
    with pytest.raises(UserError, match="supported: float32, bfloat16, float16"):
        save(directory.parent / "n", formula.model("llama")[0], params, dtype="int8")


# What older checkpoints hold besides parameters.
_ROTARY = ["rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq"]
BUFFERS = {
    "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias"],
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "qwen2": _ROTARY,
    "bert": [
        "embeddings.position_ids",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.predictions.decoder.bias",
    ],
    "roberta": ["embeddings.token_type_ids", "pooler.dense.weight", "lm_head.decoder.weight"],
    "distilbert": ["embeddings.position_ids", "vocab_projector.weight"],
    "t5": [
        "encoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ],
    "gpt_neox": [
        "layers.0.attention.bias",
        "layers.1.attention.masked_bias",
        "layers.0.attention.rotary_emb.inv_freq",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_the_bare_model_and_with_buffers(name, tmp_path):
    model, params = formula.model(name)
    directory = save(tmp_path / "m", model, params)
    tensors = load_file(directory / hub.WEIGHTS)
    prefix = family_of(model.config.model_type).PREFIX
    buffers = BUFFERS.get(model.config.model_type, [])
    assert all(any(re.fullmatch(p, b) for b in buffers) for p in family_of(model.config.model_type).IGNORED)
    if model.config.causal and model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = np.ones((31, 16), np.float32)
    full = {prefix + buffer: np.ones(2, np.float32) for buffer in buffers} | tensors
    save_file(full, directory / hub.WEIGHTS)
    assert equal(load(directory)[1], params)
    bare = {key.removeprefix(prefix): value for key, value in full.items()}
    save_file(bare, directory / hub.WEIGHTS)
    assert equal(load(directory)[1], params)


def rewrite(directory, change):
    tensors = load_file(directory / hub.WEIGHTS)
    change(tensors)
    save_file(tensors, directory / hub.WEIGHTS)


def set_config(directory, **fields):
    raw = json.loads((directory / hub.CONFIG).read_text())
    (directory / hub.CONFIG).write_text(json.dumps(raw | fields))


def only_bin(directory):
    (directory / hub.WEIGHTS).rename(directory / "pytorch_model.bin")


def truncate(directory):
    data = (directory / hub.WEIGHTS).read_bytes()
    (directory / hub.WEIGHTS).write_bytes(data[: len(data) // 2])


def to_int(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / hub.CONFIG).unlink(), "config.json is missing"),
        (lambda d: (d / hub.CONFIG).write_text("{"), "config.json cannot be read as JSON"),
        (lambda d: (d / hub.CONFIG).write_bytes(b"\xff\xfe\xfa"), "config.json cannot be read as JSON"),
        (lambda d: (d / hub.CONFIG).write_text("[]"), "must hold a JSON object, not a list"),
        (
            lambda d: set_config(d, model_type="bloom"),
            "model_type is 'bloom'; supported: gpt2, llama, mistral, qwen2",
        ),
        (lambda d: set_config(d, model_type=None), "model_type is None; supported"),
        (lambda d: set_config(d, hidden_act="swoosh"), "config.json: config field hidden_act is 'swoosh'"),
        (
            lambda d: set_config(d, quantization_config={"bits": 4}),
            "quantization_config is {'bits': 4}; supported: None",
        ),
        (only_bin, "has only pytorch_model.bin"),
        (lambda d: (d / hub.WEIGHTS).unlink(), "has neither model.safetensors nor"),
        (truncate, "model.safetensors is truncated or not a safetensors file"),
        (lambda d: (d / hub.WEIGHTS).write_bytes(b"not tensors"), "is truncated or not a safetensors file"),
        (
            lambda d: rewrite(d, lambda t: t.pop("model.norm.weight")),
            "1 missing tensors, such as model.norm.weight",
        ),
        (
            lambda d: rewrite(d, lambda t: t.update(x=t["lm_head.weight"][:1])),
            "1 unexpected tensors, such as x",
        ),
        (lambda d: rewrite(d, to_int), "model.norm.weight is stored as I32; supported: BF16, F16, F32, F64"),
        (lambda d: set_config(d, intermediate_size=25), "has shape (24, 16); the config expects (25, 16)"),
    ],
)
def test_damaged_directories_get_one_sentence(damage, message, saved):
    directory, _ = saved
    damage(directory)
    with pytest.raises(UserError) as error:
        load(directory)
    assert message in str(error.value) and str(directory) in str(error.value) and "\n" not in str(error.value)


def test_missing_directory_and_unreachable_hub(tmp_path, monkeypatch):
    import huggingface_hub

    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            load(name)

    def offline(name, allow_patterns):
        assert hub.WEIGHTS in allow_patterns and "*" not in allow_patterns
        raise OSError(f"no network for {name}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        load("someone/model")
    assert str(error.value).endswith("could not be fetched from the hub: no network for someone/model")


def test_hub_name_reads_the_snapshot(saved, monkeypatch):
    import huggingface_hub

    directory, params = saved
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(directory))
    assert equal(load("someone/model")[1], params)
