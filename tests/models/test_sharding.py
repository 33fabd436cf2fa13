"""Rules that cover every parameter, weights read part by part, and evaluation that a mesh does not change."""

import functools
import re
import tracemalloc

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_examples
from test_hub import equal

from jaxforget.data.text import TextConfig
from jaxforget.errors import UserError
from jaxforget.metrics.classification import class_logp
from jaxforget.metrics.evidence import Prompts, Reader, Request, gather
from jaxforget.models import family_of, hub, layers, llama, sharding
from jaxforget.models.generate import generate
from jaxforget.models.model import build

HEADS = [
    (name, head) for name, raw in formula.CONFIGS.items()
    for head in family_of(raw["model_type"]).ARCHITECTURES[raw["model_type"]]
]  # fmt: skip
MIX = "data=2,fsdp=2,tensor=2"


@functools.cache
def shapes_of(name, head):
    raw = formula.CONFIGS[name]
    architecture = family_of(raw["model_type"]).ARCHITECTURES[raw["model_type"]][head]
    raw = raw | {"architectures": [architecture], "id2label": {"0": "a", "1": "b"}}
    model = build(family_of(raw["model_type"]).Config.from_hf(raw))
    return model, model.shapes()


def paths_of(shapes):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}  # fmt: skip


def set_mesh(text):
    return jax.set_mesh(sharding.make_mesh(text))


# --------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize("name, head", HEADS)
def test_a_rule_covers_every_parameter(name, head):
    """And names all its axes but the layers'."""
    model, shapes = shapes_of(name, head)
    sharding.check_rules(shapes)
    for path, leaf in paths_of(shapes).items():
        assert len(sharding.rule_of(path)) == leaf.ndim - (path.split("/")[0] in model.config.stacks), path


def test_no_rule_is_dead_and_large_parameters_are_cut():
    paths = {path: leaf for name, head in HEADS for path, leaf in paths_of(shapes_of(name, head)[1]).items()}
    first = {next(end for end, _ in sharding.RULES if re.search(rf"(^|/){end}$", path)) for path in paths}
    assert first == {end for end, _ in sharding.RULES}
    for path in paths:
        if path.endswith(("kernel", "table")) and not re.search(r"norm|_bias", path):
            assert "fsdp" in sharding.rule_of(path), path


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(UserError, match="no rule in models/sharding.py covers the parameter blocks/mlp/router; add"):
        sharding.check_rules({"blocks": {"mlp": {"router": np.zeros(3)}}})


@pytest.mark.mesh
def test_meshes_that_cannot_be():
    for text, message in {
        "rubbish": "--mesh has 'rubbish'; write axis=devices such as data=2,fsdp=4, the axes being member, data, fsdp, "
                   "tensor",
        "": "--mesh has ''",
        "data=two": "--mesh has 'data=two'",
        "data=0": "--mesh has 'data=0'",
        "data=2,model=2": "--mesh has 'model=2'",
        "data=3": "--mesh data=3 has 3 devices, but it must divide the 8 there are",
        "member=2,fsdp=2,tensor=2": "--mesh member=2,fsdp=2,tensor=2: member goes together with data and fsdp, or with",
        "member=2,data=2,tensor=2": "--mesh member=2,data=2,tensor=2: member goes together with data and fsdp, or with",
        "data=4,fsdp=4": "--mesh data=4,fsdp=4 has 16 devices, but it must divide the 8 there are",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as error:
            sharding.make_mesh(text)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert dict(sharding.make_mesh("tensor=2, data=2").shape) == {"member": 1, "data": 2, "fsdp": 1, "tensor": 2}


# ------------------------------------------------------------------------------------------------- reading
def spread(params):
    """Return the bytes of a model, and the most that one device holds."""
    leaves = jax.tree.leaves(params)
    held = {device: 0 for device in jax.devices()}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return sum(leaf.nbytes for leaf in leaves), max(held.values())


@pytest.mark.mesh
@pytest.mark.parametrize("name", formula.CONFIGS)
def test_weights_read_by_parts_have_the_same_bits(name, tmp_path):
    model, params = formula.model(name)
    for dtype in ("float32",) if name not in ("gpt2", "llama") else hub.DTYPES:
        hub.save(tmp_path / dtype, model, params, dtype=dtype, max_shard_bytes=5000)
        whole = hub.load(tmp_path / dtype)[1]
        for mesh in ("fsdp=8", MIX):
            with set_mesh(mesh):
                again, parts = hub.load(tmp_path / dtype)
            assert again == model and equal(parts, whole)
    total, held = spread(parts)
    assert held < 0.75 * total


@pytest.mark.mesh
def test_reading_takes_the_memory_of_a_part(tmp_path, monkeypatch):
    config = llama.Config(model_type="llama", vocab_size=2048, hidden_size=128, intermediate_size=512,
                          num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=16)  # fmt: skip
    model = build(config)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"])) / 8
    hub.save(tmp_path / "m", model, params, max_shard_bytes=2 * layer)
    files = [path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors")]
    put = jax.device_put

    def put_apart(x, device):
        """Put what lies so that the CPU's client must copy it, as other devices do; else it keeps the host's array."""
        raw = np.empty(x.nbytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + 4
        moved = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        moved[...] = x
        return put(moved, device).block_until_ready()

    monkeypatch.setattr(jax, "device_put", put_apart)
    with set_mesh("fsdp=4,tensor=2"):
        hub.load(tmp_path / "m")  # what is imported and traced at first
        tracemalloc.start()
        loaded = hub.load(tmp_path / "m")[1]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    total, held = spread(loaded)
    assert len(files) > 3 and peak < 1.3 * (max(files) + layer) and peak < total / 4
    assert held < 1.1 * total / 8


@pytest.mark.mesh
def test_a_damaged_file_is_told_in_the_same_sentence(tmp_path):
    model, params = formula.model("llama")
    hub.save(tmp_path / "m", model, params)
    with open(tmp_path / "m" / hub.WEIGHTS, "r+b") as file:
        file.truncate(file.seek(0, 2) - 400)
    told = []
    for mesh in (None, MIX):
        with pytest.raises(UserError) as error, set_mesh(mesh) if mesh else jax.default_device(None):
            hub.load(tmp_path / "m")
        told.append(str(error.value))
    assert told[0] == told[1] and "is truncated or not a safetensors file" in told[0]


# ---------------------------------------------------------------------------------------------- evaluation
class Numbers:
    """A tokenizer of numbers."""

    eos_token_id, pad_token_id, bos_token_id, all_special_ids = 2, 0, None, [0, 2]

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.mark.mesh
def test_evaluation_gives_the_same_numbers():
    """Scores, standardised scores and gradient norms, of 11 rows in widths that no mesh divides, and greedy text."""
    model, params = formula.model("llama")
    examples = make_examples(11, vocab=31)
    request = Request(scored={"a": examples}, gradients={"a": examples.take(np.arange(3))},
                      written={"w": Prompts(["3 4 5", "9 8", "7 7 7 1 5"], 6)})  # fmt: skip
    reader = Reader(model, Numbers(), TextConfig())
    alone = gather(reader, params, request)
    with set_mesh(MIX):
        found = gather(reader, params, request)
    for one, other in zip(found.scored["a"].scores, alone.scored["a"].scores, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.scored["a"].z_NT, alone.scored["a"].z_NT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.gradients["a"], alone.gradients["a"], rtol=1e-5)
    assert found.written == alone.written and len(set(found.written["w"])) == 3


@pytest.mark.mesh
def test_classes_get_the_same_scores():
    model, params = formula.model("bert-classification")
    examples = make_examples(5, vocab=31)
    alone = class_logp(model, params, examples)
    with set_mesh(MIX):
        np.testing.assert_allclose(class_logp(model, params, examples), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.mesh
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_sampled_text_is_the_same(name):
    model, params = formula.model(name)
    batch = formula.BATCH
    mask_BT = np.arange(12)[None] < batch["length"][:, None]
    draw = functools.partial(generate, model, tokens_BT=batch["tokens"], mask_BT=mask_BT, max_new_tokens=6,
                             temperature=1.0, top_p=0.9, key=jax.random.key(4))  # fmt: skip
    alone = np.asarray(draw(params))
    with set_mesh(MIX):
        np.testing.assert_array_equal(np.asarray(draw(sharding.place(params))), alone)


# -------------------------------------------------------------------------------------------------- memory
DEEP = llama.Config(model_type="llama", vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=12,
                    num_attention_heads=4, max_position_embeddings=16)  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((8, 8), jnp.int32)


def gradient_of(remat):
    """Compile the gradient of a deep model on 8 devices. Returns (program, bytes of all parameters)."""
    model = build(DEEP, remat=remat)

    def gradient(params, tokens_BT):
        tokens_BT = sharding.pin_rows(tokens_BT)
        return sharding.pin(jax.grad(lambda p: jnp.mean(jnp.square(model.logits(p, tokens_BT))))(params))

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.parameter_sharding(path, leaf.shape))

    shapes = model.shapes()
    named = jax.tree_util.tree_map_with_path(
        lambda path, leaf: placed(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), shapes)
    return jax.jit(gradient).lower(named, TOKENS).compile(), sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.mesh
def test_gathered_weights_are_not_kept_for_the_backward_pass(monkeypatch):
    with set_mesh("fsdp=8"):
        used = {}
        for remat in layers.REMAT:
            program, total = gradient_of(remat)
            used[remat] = program.memory_analysis().temp_size_in_bytes
            assert "all-gather" in program.as_text()
        monkeypatch.setitem(layers.REMAT, "none", jax.checkpoint_policies.everything_saveable)
        kept = gradient_of("none")[0].memory_analysis().temp_size_in_bytes
    assert kept > used["none"] + 0.9 * total
    assert used["none"] > 1.2 * used["dots"] > 1.2**2 * used["full"]
