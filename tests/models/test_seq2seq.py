"""Encoder-decoders: the cache, costs, and the ways to say what kind of T5 a file holds."""

import dataclasses

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models import generate, hub, load, save, t5
from jaxforget.models.model import build

NEW = 12  # beyond the largest distance that the buckets of this model tell apart


def test_cached_equals_uncached():
    model, params = formula.model("t5")
    sources_BT = np.asarray([[3, 1, 4, 1, 5, 9, 2], [6, 5, 30, 30, 30, 30, 30]])
    length_B = np.asarray([7, 2])
    mask_BT = np.arange(7)[None] < length_B[:, None]
    out_BN = np.asarray(generate(model, params, sources_BT, mask_BT, max_new_tokens=NEW))
    decoder_tokens_BT = np.pad(out_BN, ((0, 0), (1, 0)))[:, :-1]  # the start token is 0
    batch = {"tokens": sources_BT, "length": length_B, "decoder_tokens": decoder_tokens_BT}
    logits_BTV = jax.jit(model.batch_logits)(params, batch)
    np.testing.assert_array_equal(jnp.argmax(logits_BTV, axis=-1), out_BN)

    logits_BV, cache, next_B = jax.jit(model.prefill, static_argnums=3)(params, sources_BT, length_B, NEW)
    assert next_B.tolist() == [1, 1] and cache["k"].shape == (2, 2, 1 + NEW, 4, 6)
    assert cache["source"]["k"].shape == (2, 2, 7, 4, 6)
    parts, cached = [logits_BV[:, None]], jax.jit(model.cached)
    for start, stop in ((1, 2), (2, 7), (7, NEW)):  # in any chunks
        positions_BT = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        part, cache = cached(params, decoder_tokens_BT[:, start:stop], cache, positions_BT, positions_BT >= 0)
        parts.append(part)
    # float32 sums in another order, on logits of order 1.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), logits_BTV, rtol=1e-5, atol=1e-5)


def test_generation_ignores_padding_and_other_rows():
    model, params = formula.model("t5")
    row = [3, 1, 4, 1, 5]
    alone_BN = generate(model, params, np.asarray([row]), np.ones((1, 5)), max_new_tokens=8)
    left = np.asarray([[30, 30, *row], [1, 2, 3, 4, 5, 6, 7]])
    mask = np.asarray([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    np.testing.assert_array_equal(generate(model, params, left, mask, max_new_tokens=8)[:1], alone_BN)


def test_flops_follow_the_formula():
    model, _ = formula.model("t5")
    D, F, V, N, H, T = 16, 24, 31, 4, 6, 12
    attention, mlp = 4 * D * N * H, 2 * D * F
    dense = 3 * (attention + mlp) + 2 * (2 * attention + mlp) + D * V
    seen = 3 * T + 2 * (T + np.mean(np.arange(1, T + 1)))
    assert model.flops_per_token(T) == pytest.approx(2 * dense + 4 * N * H * seen)


@pytest.mark.parametrize(
    ("raw", "tied", "scaled"),
    [
        ({}, True, True),
        ({"tie_word_embeddings": False}, False, False),  # version 1.1
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True, True),  # transformers 5
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
    ],
)
def test_old_and_new_files_say_how_the_head_works(raw, tied, scaled, tmp_path):
    config = t5.Config.from_hf(formula.CONFIGS["t5"] | raw)
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (tied, scaled)
    assert t5.Config.from_hf(config.to_hf()) == config
    # transformers 5 says `tied` of a head of its own too. Only the file of the weights tells.
    untied = build(dataclasses.replace(config, tie_word_embeddings=False))
    params = jax.jit(untied.init)(jax.random.key(0))
    directory = save(tmp_path / "m", untied, params)
    (directory / hub.CONFIG).write_text(
        (directory / hub.CONFIG).read_text().replace('embeddings": false', 'embeddings": true')
    )
    model, loaded = load(directory)
    assert model.config.tie_word_embeddings == scaled and ("head" in loaded) != scaled


def test_config_reads_what_old_files_say():
    raw = {"architectures": ["T5WithLMHeadModel"], "num_layers": 4, "pad_token_id": 7, "n_positions": 99}
    config = t5.Config.from_hf(raw)
    assert (config.head, config.stacks, config.max_length) == ("seq2seq", {"encoder": 4, "decoder": 4}, 99)
    assert config.decoder_start_token_id == 7
    assert t5.Config.from_hf(raw | {"decoder_start_token_id": 0}).decoder_start_token_id == 0
    kinds = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gelu": ("gelu", False)}
    for name, (activation, gated) in kinds.items():
        config = t5.Config(feed_forward_proj=name)
        assert (config.activation, config.gated) == (activation, gated)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder is True; supported: False"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False; supported: True"),
        ({"feed_forward_proj": "gated-prelu"}, "feed_forward_proj is 'gated-prelu'; supported: gelu, "),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu'; supported: 'relu'"),
        ({"architectures": ["T5EncoderModel"]}, "supported: T5ForConditionalGeneration, T5Model"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3; it must be at least 4"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance is 16; it must be above half"),
        ({"decoder_start_token_id": 32128}, "decoder_start_token_id is 32128; it must be at least 0 and below"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        t5.Config.from_hf(fields)
    assert message in str(error.value)
