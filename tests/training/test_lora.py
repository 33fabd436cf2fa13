"""LoRA: an adapter starts at nothing, moves alone, and means the same merged or not."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_examples

from jaxforget.errors import UserError
from jaxforget.models import family_of, hub
from jaxforget.models.layers import REMAT, LowRank, merge
from jaxforget.models.model import build
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.stage import train_stage
from jaxforget.training.step import make_run, make_step
from jaxforget.training.trainable import everything

KEY = jax.random.key(7)
SMALL = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 31,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    },
}
CLASSIFIER = SMALL["llama"] | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
PLAIN = LoraConfig(rank=2)
WIDE = LoraConfig(rank=2, targets=("(attn|mlp)/.*",), rslora=True)
both = pytest.mark.parametrize("name", SMALL)


@functools.cache
def base(name):
    raw = CLASSIFIER if name == "classifier" else SMALL[name]
    model = build(family_of(raw["model_type"]).Config.from_hf(raw))
    return model, jax.tree.map(np.asarray, model.init(jax.random.key(1)))


def adapted(name, config=PLAIN, random=True):
    """Return frozen and moving parts; with `random` b is not zero."""
    moving, frozen = lora(config).init(KEY, {"model": base(name)[1]})
    if random:
        moving["b"] = jax.tree.map(lambda b: 0.3 * jax.random.normal(KEY, b.shape), moving["b"])
    return frozen, moving


def batches(rows=8, size=4, epochs=1, seed=0):
    return Batches((Stream(make_examples(rows, vocab=30, seed=seed), size),), epochs, seed)


def one_batch():
    return {name: value[0] for name, value in batches().take(0, 1, 1).items()}


def start(name, trainable, rate=1e-2, total=40):
    model, params = base(name)
    step = make_step(next_token(model), trainable, mean_gradient(), adamw(OptimizerConfig(warmup=0.0)))
    state, frozen = step.init(KEY, {"model": params})
    return step, set_schedule(state, learning_rate=rate, total=total), frozen


def numbers(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@both
def test_a_fresh_adapter_changes_no_bit(name):
    model, params = base(name)
    frozen, moving = adapted(name, random=False)
    logits = jax.jit(model.batch_logits)
    fresh = lora(PLAIN).combine(frozen, moving)["model"]
    assert numbers(fresh) == numbers(params) + numbers(moving)
    np.testing.assert_array_equal(logits(fresh, one_batch()), logits(params, one_batch()))


@pytest.mark.parametrize(
    ("name", "remat", "scan"),
    [("gpt2", "none", True), *(("llama", remat, scan) for remat in REMAT for scan in (True, False))],
)
def test_an_adapter_equals_its_merged_kernel(name, remat, scan):
    model, params = base(name)
    model = dataclasses.replace(model, remat=remat, scan_layers=scan)
    with_adapter = lora(WIDE).combine(*adapted(name, WIDE))["model"]
    logits = jax.jit(model.batch_logits)
    merged = logits(merge(with_adapter), one_batch())
    # The same products, summed in another order.
    np.testing.assert_allclose(logits(with_adapter, one_batch()), merged, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(merged - logits(params, one_batch())).max()) > 1e-2

    kernel, moved = params["blocks"]["mlp"]["up"]["kernel"], with_adapter["blocks"]["mlp"]["up"]["kernel"]
    expected = kernel + 16.0 / np.sqrt(2) * np.einsum("lir,lro->lio", moved.a, moved.b)
    np.testing.assert_allclose(merge(with_adapter)["blocks"]["mlp"]["up"]["kernel"], expected, atol=1e-5)


@both
def test_the_gradient_per_example_adds_up(name):
    model = base(name)[0]
    frozen, moving = adapted(name)
    batch = one_batch()

    def losses(moving, batch):
        return next_token(model)(lora(PLAIN).combine(frozen, moving), batch, KEY)

    def alone(example):
        return jax.grad(lambda moving: losses(moving, jax.tree.map(lambda x: x[None], example))[0])(moving)

    together = jax.jit(jax.grad(lambda moving: losses(moving, batch).sum()))(moving)
    grads_B = jax.jit(jax.vmap(alone))(batch)
    assert jax.tree.structure(together) == jax.tree.structure(moving)
    chex.assert_trees_all_close(jax.tree.map(lambda g: g.sum(0), grads_B), together, rtol=1e-4, atol=1e-6)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(together)) > 0


@both
def test_only_the_adapter_moves_and_it_learns(name):
    data = batches(epochs=20)

    def train(trainable):
        step, state, frozen = start(name, trainable, rate=5e-2)
        size = numbers(state.opt_state)
        state, metrics = make_run(step)(state, frozen, data.take(0, 40, 40), 40)
        return np.asarray(metrics["loss"]), size, state.trainable, step.combine(frozen, state.trainable)["model"]

    losses, size, moved, after = train(lora(PLAIN))
    full_losses, full_size, _, _ = train(everything())
    assert losses[0] == pytest.approx(full_losses[0], rel=1e-6)
    assert losses[-4:].mean() < 0.8 * losses[:4].mean()
    assert 10 * size < full_size
    is_adapter = lambda x: isinstance(x, LowRank)  # noqa: E731
    still = jax.tree.map(lambda x: x.kernel if is_adapter(x) else x, after, is_leaf=is_adapter)
    chex.assert_trees_all_equal(still, base(name)[1])
    assert all(float(jnp.abs(b).max()) > 1e-3 for b in jax.tree.leaves(moved["b"]))


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_members_equal_separate_runs(how):
    step, _, _ = start("llama", lora(PLAIN))
    keys = jax.random.split(KEY, 2)
    streams = [batches(seed=seed) for seed in range(2)]
    state_K, frozen = members(step, how).init(keys, {"model": base("llama")[1]})
    alone = [
        make_run(step)(jax.tree.map(lambda x, k=k: x[k], state_K), frozen, stream.take(0, 2, 2), 2)[0]
        for k, stream in enumerate(streams)
    ]
    batch_KS = {n: np.stack([s.take(0, 2, 2)[n] for s in streams]) for n in streams[0].take(0, 1, 1)}
    together = members(step, how)
    after, _ = make_run(together)(state_K, frozen, batch_KS, np.full(2, 2))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[state.trainable for state in alone])
    if how == "map":
        chex.assert_trees_all_equal(after.trainable, expected)
    else:  # vmap rounds differently, and Adam enlarges that where a gradient is near 0
        chex.assert_trees_all_close(after.trainable, expected, atol=1e-4)
    merged = merge(together.combine(frozen, after.trainable)["model"])
    assert {leaf.shape[0] for leaf in jax.tree.leaves(merged)} == {2}


def test_draws_depend_on_key_and_path_alone():
    _, narrow = adapted("llama", random=False)
    _, wide = adapted("llama", WIDE, random=False)
    a = narrow["a"]["blocks"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(a, wide["a"]["blocks"]["attn"]["q"]["kernel"])
    assert not np.array_equal(a, wide["a"]["blocks"]["attn"]["o"]["kernel"])
    assert not np.array_equal(a[0], a[1])
    other = lora(PLAIN).init(jax.random.key(8), {"model": base("llama")[1]})[0]
    assert not np.array_equal(a, other["a"]["blocks"]["attn"]["q"]["kernel"])
    drawn = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(narrow["a"])])  # all of width 16
    assert np.abs(drawn).max() <= 0.25
    np.testing.assert_allclose(drawn.std(), 0.25 / np.sqrt(3), rtol=0.2)  # 128 numbers
    assert lora(LoraConfig(rank=2)) is lora(PLAIN)


def test_what_also_names_moves_in_full():
    model, params = base("classifier")
    config = LoraConfig(rank=2, also=("score", "final_norm/scale"))
    trainable = lora(config)
    moving, frozen = trainable.init(KEY, {"model": params, "reference": params})
    assert numbers(moving["also"]) == params["score"]["kernel"].size + 16
    assert frozen["model"]["score"]["kernel"] is None
    moving["also"]["score"]["kernel"] = moving["also"]["score"]["kernel"] + 1.0
    parts = trainable.combine(frozen, moving)
    np.testing.assert_array_equal(parts["model"]["score"]["kernel"], params["score"]["kernel"] + 1.0)
    chex.assert_trees_all_equal(parts["reference"], params)
    total = lambda moving: model.batch_logits(trainable.combine(frozen, moving)["model"], one_batch()).sum()  # noqa: E731
    grads = jax.jit(jax.grad(total))(moving)
    assert float(jnp.abs(grads["also"]["score"]["kernel"]).min()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("query",)}, "LoRA target 'query' matches no layer; there are blocks/attn/k, blocks/attn/o"),
        ({"targets": ("q", "attn")}, "LoRA target 'attn' matches no layer"),
        ({"targets": ("embed",)}, "LoRA target 'embed' matches embed, which is none of blocks/attn/k"),
        ({"targets": ("blocks/.*",)}, "matches blocks/attn_norm, which is none of"),
        ({"also": ("score",)}, "trainable pattern 'score' matches no parameter; there are blocks/attn/k"),
        ({"also": ("attn/q",)}, "blocks/attn/q/kernel matches a LoRA target and a pattern"),
        ({"targets": ("(",)}, "LoRA pattern '(' is not a regular expression"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"rank": 0}, "rank is 0; an adapter needs at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        lora(LoraConfig(**settings)).init(KEY, {"model": base("llama")[1]})


def test_an_adapter_on_an_adapter_is_refused():
    parts = lora(PLAIN).combine(*adapted("gpt2"))
    with pytest.raises(UserError, match="has a LoRA adapter already; merge it first"):
        lora(PLAIN).init(KEY, parts)
    lora(PLAIN).init(KEY, {"model": merge(parts["model"])})


def test_a_stage_saves_the_merged_model(tmp_path):
    model, params = base("gpt2")
    step, _, _ = start("gpt2", lora(PLAIN))
    options = {"learning_rate": 1e-2, "save_tokenizer": lambda directory: None, "checkpoints": tmp_path / "steps"}
    trained, _ = train_stage(tmp_path / "model", model, step, {"model": params}, batches(), **options)
    again, loaded = hub.load(tmp_path / "model")
    assert again == model
    chex.assert_trees_all_equal(loaded, trained)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()) > 0, loaded, params)
    assert moved["blocks"]["attn"]["qkv"] == {"kernel": True, "bias": False}
    assert sum(jax.tree.leaves(moved)) == 1
