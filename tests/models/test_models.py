"""Properties of every family, and golden logits. B batch, T tokens, V vocabulary, K members, L layers."""

import dataclasses
import functools
import json

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models import FAMILIES, Model, bert, distilbert, family_of, generate, gpt2, llama, roberta
from jaxforget.models.layers import ACTIVATIONS, attention
from jaxforget.models.rotary import Rope

NAMES = list(formula.CONFIGS)
# Blocks of their own kind; what compiles for long runs on the others in the slow suite.
SOME, FEW = ([pytest.param(n, marks=[] if n in by_default else pytest.mark.slow) for n in NAMES]
             for by_default in (("gpt2", "llama", "bert", "t5"), ("gpt2", "llama")))  # fmt: skip
BATCH = {name: jnp.asarray(column) for name, column in formula.BATCH.items()}
TOKENS_BT = BATCH["tokens"]
LENGTHS_B = BATCH["length"]
# float32 sums of a few dozen terms in another order, on logits of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

logits_of = jax.jit(lambda model, params, batch: model.batch_logits(params, batch), static_argnums=0)
tiny = formula.model


def with_tokens(tokens_BT, column="tokens"):
    return BATCH | {column: tokens_BT}


def losses(model, params, batch):
    """Any loss an example that every real logit enters, padding none."""
    logits = jnp.tanh(model.batch_logits(params, batch))
    if logits.ndim == 3 and logits.shape[1] == batch["tokens"].shape[1]:
        real_BT = jnp.arange(logits.shape[1])[None] < batch["length"][:, None]
        logits = jnp.where(real_BT[..., None], logits, 0.0)
    wave = jnp.sin(jnp.arange(logits[0].size, dtype=jnp.float32)).reshape(1, *logits.shape[1:])
    return jnp.sum(jnp.square(logits - wave), axis=tuple(range(1, logits.ndim)))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(model, params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(losses(model, p, batch)))(params)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_on_golden_weights(name):
    model, params = tiny(name)
    golden = np.asarray(json.loads(formula.GOLDEN.read_text())[name])
    logits = logits_of(model, params, BATCH)
    assert logits.dtype == jnp.float32
    # The file keeps five decimals; the rest is float32 rounding.
    np.testing.assert_allclose(formula.kept(logits), golden, rtol=1e-4, atol=2e-5)


def test_every_family_is_tested():
    assert {config["model_type"] for config in formula.CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_token_sees(name):
    """Causal logits, and those of a decoder, do not see later tokens; an encoder sees all of its row's."""
    model, params = tiny(name)
    base = logits_of(model, params, BATCH)
    decoder = model.config.head == "seq2seq"
    column = "decoder_tokens" if decoder else "tokens"
    for t in (1, 6, 7):
        tokens_BT = BATCH[column]
        changed = logits_of(model, params, with_tokens(tokens_BT.at[:, t:].set((tokens_BT[:, t:] + 3) % 31), column))
        if model.config.head == "classification":
            assert not np.array_equal(changed, base)
        elif model.config.causal or decoder:
            np.testing.assert_array_equal(changed[:, :t], base[:, :t])
            assert not np.array_equal(changed[:, t], base[:, t])
        else:
            assert np.all(np.any(changed[:, :8] != base[:, :8], axis=-1))
    if decoder:
        changed = logits_of(model, params, with_tokens(TOKENS_BT.at[:, 6].add(-1)))
        assert np.all(np.any(changed != base, axis=-1))


@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_trace(name):
    """Neither what stands in the padding nor how much of it there is reaches a real token."""
    model, params = tiny(name)
    base = logits_of(model, params, BATCH)
    other = logits_of(model, params, with_tokens(TOKENS_BT.at[1, 9:].set(17)))
    wide = {key: jnp.pad(value, ((0, 0), (0, 4))) if value.ndim == 2 else value for key, value in BATCH.items()}
    wide |= {"decoder_tokens": BATCH["decoder_tokens"]}
    wider = logits_of(model, params, wide)
    alone = {key: value[1:, :9] if value.ndim == 2 else value[1:] for key, value in BATCH.items()}
    alone = logits_of(model, params, alone)
    if base.ndim == 3 and base.shape[1] == TOKENS_BT.shape[1]:
        base, other, wider = base[:, :9], other[:, :9], wider[:, :9]
    np.testing.assert_array_equal(other, base)
    np.testing.assert_allclose(wider, base, **CLOSE)
    np.testing.assert_allclose(alone, base[1:], **CLOSE)


def test_window_hides_what_lies_further_back():
    config = llama.Config(
        model_type="mistral",
        vocab_size=31,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        sliding_window=3,
    )
    model = Model(config)
    params = model.init(jax.random.key(0))
    base_BTV = logits_of(model, params, BATCH)
    changed_BTV = logits_of(model, params, with_tokens(TOKENS_BT.at[:, 4].set((TOKENS_BT[:, 4] + 1) % 31)))
    same_T = np.all(np.asarray(base_BTV == changed_BTV), axis=(0, 2))
    assert same_T.tolist() == [True] * 4 + [False] * 3 + [True] * 5


@pytest.mark.parametrize("name", FEW)  # three programs each
def test_scan_unrolled_and_remat_agree(name):
    model, params = tiny(name)
    value, grads = value_and_grad(model, params, BATCH)
    for change in ({"scan_layers": False}, {"remat": "dots"}, {"scan_layers": False, "remat": "full"}):
        other, other_grads = value_and_grad(dataclasses.replace(model, **change), params, BATCH)
        np.testing.assert_allclose(other, value, **CLOSE)
        assert_trees_close(other_grads, grads, rtol=1e-4, atol=1e-5)


def test_layers_with_different_windows_scan_as_they_unroll():
    raw = formula.CONFIGS["qwen2"] | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = llama.Config.from_hf(raw)
    assert config.windows == (None, 4)
    params = tiny("qwen2")[1]
    scanned_BTV = logits_of(Model(config), params, BATCH)
    np.testing.assert_allclose(logits_of(Model(config, scan_layers=False), params, BATCH), scanned_BTV, **CLOSE)
    assert not np.allclose(scanned_BTV, logits_of(tiny("qwen2")[0], params, BATCH))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_members_equals_loop(name):
    model, _ = tiny(name)
    params_K = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(1), 2))
    logits_K = jax.jit(jax.vmap(model.batch_logits, (0, None)))(params_K, BATCH)
    members = [jax.tree.map(lambda leaf, k=k: leaf[k], params_K) for k in range(2)]
    for params, logits in zip(members, logits_K, strict=True):
        np.testing.assert_allclose(logits, logits_of(model, params, BATCH), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_per_example_gradients_sum_to_the_gradient_of_the_sum(name):
    model, params = tiny(name)

    def loss_of_one(p, one):
        return losses(model, p, jax.tree.map(lambda x: x[None], one))[0]

    grads_B = jax.jit(jax.vmap(jax.grad(loss_of_one), (None, 0)))(params, BATCH)
    _, grads = value_and_grad(model, params, BATCH)
    assert_trees_close(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads_B), grads, rtol=1e-4, atol=1e-5)
    # Every parameter matters; those after the last token of a shorter row too.
    assert all(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name):
    model, params = tiny(name)
    half = dataclasses.replace(model, dtype="bfloat16")
    logits = logits_of(half, params, BATCH)
    assert logits.dtype == jnp.float32
    reference = logits_of(model, params, BATCH)
    # bfloat16 keeps 8 bits: relative errors of 2 ** -9 per operation, about ten operations deep.
    assert np.sqrt(np.mean((logits - reference) ** 2)) < 0.03 * np.std(reference)
    _, grads = value_and_grad(half, params, BATCH)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_equal_models_share_a_compiled_program():
    one, two = (Model(llama.Config.from_hf(formula.CONFIGS["llama"]), dtype=d) for d in ("float32", jnp.float32))
    assert one == two and hash(one) == hash(two)
    assert one != dataclasses.replace(one, remat="full")
    # What a file says besides the computation takes no part.
    assert one == Model(llama.Config.from_hf(formula.CONFIGS["llama"] | {"bos_token_id": 5}))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2"])  # others: test_parity.py
def test_init_has_the_standard_deviations_of_hugging_face(name):
    wide = {"n_embd": 64, "hidden_size": 64, "head_dim": 16}
    raw = {key: wide.get(key, value) for key, value in formula.CONFIGS[name].items()}
    model = Model(family_of(name).Config.from_hf(raw))
    params = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.shapes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        residual = name == "gpt2" and path in ("blocks/attn/o/kernel", "blocks/mlp/down/kernel")
        if path.endswith(("kernel", "table")):
            # At least 2000 draws: the sample deviation is within 5 % with room to spare.
            np.testing.assert_allclose(np.std(leaf), 0.02 / (2 if residual else 1), rtol=0.08)
        else:
            assert np.all(leaf == (1 if path.endswith("scale") else 0))
    kernel = jax.tree.leaves(params["blocks"]["mlp"])[-1]
    assert not np.array_equal(kernel[0], kernel[1])


def test_flops_follow_the_formula():
    model, _ = tiny("mistral")
    D, F, V, N, N_kv, H = 16, 24, 31, 4, 2, 6
    weights = 2 * (D * (N + 2 * N_kv) * H + N * H * D + 3 * D * F) + D * V
    seen = np.mean([min(t, 5) for t in range(1, 13)])
    assert model.flops_per_token(12) == pytest.approx(2 * weights + 2 * 4 * N * H * seen)
    tied, _ = tiny("gpt2")
    assert tied.flops_per_token(1) == pytest.approx(2 * (2 * 12 * 16 * 16 + 16 * 31) + 2 * 4 * 16)


def test_attention_traces_under_vmap_of_grad():
    def total(q, k, v, mask):
        return jnp.sum(attention(q, k, v, causal=True, mask_BTU=mask))

    q = jnp.ones((3, 1, 5, 4, 8))
    kv = jnp.ones((3, 1, 5, 2, 8))
    mask = jnp.ones((3, 1, 5, 5), bool)
    jax.jit(jax.vmap(jax.grad(total))).lower(q, kv, kv, mask)
    jax.jit(jax.vmap(jax.grad(lambda q, k, v: total(q, k, v, None)))).lower(q, kv, kv)


def test_every_activation_runs_on_vectors():
    x = jnp.linspace(-3, 3, 7)
    for name, function in ACTIVATIONS.items():
        assert np.isfinite(function(x)).all() and function(x).shape == x.shape, name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: gpt2.Config.from_hf({"add_cross_attention": True}),
            "add_cross_attention is True; supported: False",
        ),
        (
            lambda: gpt2.Config(activation_function="prelu"),
            "activation_function is 'prelu'; supported: gelu, ",
        ),
        (lambda: gpt2.Config(n_embd=10, n_head=4), "n_embd is 10; it must be a multiple of n_head"),
        (lambda: gpt2.Config.from_hf({"n_embd": "big"}), "n_embd is 'big'; expected int"),
        (lambda: llama.Config(model_type="phi"), "model_type is 'phi'; supported: llama, mistral, qwen2"),
        (
            lambda: llama.Config(num_attention_heads=4, num_key_value_heads=3),
            "must be a multiple of num_key_value",
        ),
        (lambda: llama.Config(head_dim=7), "head_dim is 7"),
        (
            lambda: Rope(rope_type="longrope"),
            "rope_type is 'longrope'; supported: default, linear, dynamic, llama3",
        ),
        (lambda: Rope(rope_type="linear"), "factor is missing; rope type linear needs it"),
        (lambda: Rope.from_hf({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (
            lambda: llama.Config(model_type="qwen2", layer_types=["sliding_attention"] * 32),
            "set sliding_window",
        ),
        (lambda: bert.Config.from_hf({"is_decoder": True}), "is_decoder is True; supported: False"),
        (lambda: roberta.Config(pad_token_id=-1), "pad_token_id is -1; it must be 0 or above"),
        (lambda: distilbert.Config.from_hf({"num_attention_heads": 4}), "num_attention_heads is 4; supported: 12"),
        (
            lambda: generate(*tiny("bert"), TOKENS_BT, TOKENS_BT > 0, max_new_tokens=1),
            "head is masked; only causal and seq2seq heads generate",
        ),
        (lambda: Model(gpt2.Config(), dtype="int8"), "dtype is int8; supported: float32"),
        (lambda: Model(gpt2.Config(), dtype="half"), "dtype is float16; supported: float32"),
        (lambda: Model(gpt2.Config(), dtype="f31"), "dtype is 'f31'; supported: float32"),
        (
            lambda: tiny("gpt2")[0].logits(tiny("gpt2")[1], jnp.zeros((1, 33), int)),
            "length is 33; this model has 32",
        ),
    ],
)
def test_unsupported_settings_name_field_value_and_choices(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert message in str(error.value)


def test_rope_reads_old_and_new_spellings():
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    old = Rope.from_hf({"rope_theta": 500.0, "rope_scaling": yarn})
    new = Rope.from_hf({"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 500.0}})
    assert old == new == Rope.from_hf(old.to_hf())
    assert Rope.from_hf({"rope_scaling": None}) == Rope()
    with pytest.warns(UserWarning, match="ignores beta_fast"):
        Rope.from_hf({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}})
