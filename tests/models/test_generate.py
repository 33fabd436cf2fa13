"""Generation: the cache changes nothing, and rows do not depend on padding or on each other."""

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models import generate, load
from jaxforget.models.generate import nucleus

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def pad(prompts, side, width=8):
    """Pad with a token that would show if it were read."""
    tokens_BT, mask_BT = np.full((len(prompts), width), 30), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        where = {
            "left": range(width - len(prompt), width),
            "right": range(len(prompt)),
            "scattered": np.linspace(0, width - 1, len(prompt)).astype(int),
        }[side]
        tokens_BT[row, list(where)], mask_BT[row, list(where)] = prompt, True
    return tokens_BT, mask_BT


def greedy_without_cache(model, params, prompt, new):
    """Recompute the whole sequence for every token, at one padded length so that it compiles once."""
    logits = jax.jit(model.logits)
    tokens = list(prompt)
    for _ in range(new):
        padded_BT = np.asarray([tokens + [0] * (len(prompt) + new - len(tokens))])
        tokens.append(int(np.argmax(logits(params, padded_BT)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_cached_equals_uncached(name):
    model, params = formula.model(name)
    out_BN = generate(model, params, *pad(PROMPTS, "left"), max_new_tokens=9)
    for row in (0, 2):
        assert out_BN[row].tolist() == greedy_without_cache(model, params, PROMPTS[row], 9)


def test_cached_logits_equal_logits_in_any_chunks():
    model, params = formula.model("mistral")
    tokens_BT = jnp.asarray(formula.BATCH["tokens"])
    whole_BTV, cached = jax.jit(model.logits)(params, tokens_BT), jax.jit(model.cached)
    cache, parts = model.init_cache(2, 12), []
    for start, stop in ((0, 6), (6, 12)):
        positions_BT = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        part, cache = cached(params, tokens_BT[:, start:stop], cache, positions_BT, positions_BT >= 0)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "key": jax.random.key(3)}])
def test_rows_depend_on_neither_padding_nor_the_batch(sampling):
    model, params = formula.model("llama")
    left_BN = generate(model, params, *pad(PROMPTS, "left"), max_new_tokens=9, **sampling)
    for side in ("right", "scattered"):
        np.testing.assert_array_equal(
            generate(model, params, *pad(PROMPTS, side), max_new_tokens=9, **sampling), left_BN
        )
    alone = pad(PROMPTS[:1], "right", width=len(PROMPTS[0]))
    for row_id in (0, 1):
        single_BN = generate(model, params, *alone, max_new_tokens=9, row_ids=[row_id], **sampling)
        assert np.array_equal(single_BN[0], left_BN[0]) == (row_id == 0 or not sampling)


def test_rows_that_fill_the_batch_are_not_continued():
    model, params = formula.model("llama")
    tokens_BT, mask_BT = pad(PROMPTS, "right")
    whole_BN = np.asarray(generate(model, params, tokens_BT, mask_BT, max_new_tokens=9))
    some_BN = generate(model, params, tokens_BT, mask_BT, max_new_tokens=9, wanted_B=[True, False, True], pad_id=29)
    np.testing.assert_array_equal(some_BN, np.where(np.asarray([[False], [True], [False]]), 29, whole_BN))


def test_row_ids_name_the_random_stream():
    model, params = formula.model("gpt2")
    tokens_BT, mask_BT = np.full((3, 2), 5), np.ones((3, 2), bool)
    draw = {"max_new_tokens": 12, "temperature": 2.0, "key": jax.random.key(0)}
    out_BN = generate(model, params, tokens_BT, mask_BT, row_ids=[7, 8, 7], **draw)
    assert np.array_equal(out_BN[0], out_BN[2]) and not np.array_equal(out_BN[0], out_BN[1])


def test_tiny_top_p_is_greedy():
    model, params = formula.model("gpt2")
    prompts = pad(PROMPTS, "left")
    greedy_BN = generate(model, params, *prompts, max_new_tokens=8)
    tiny = {"temperature": 1.0, "top_p": 1e-9, "key": jax.random.key(0)}
    np.testing.assert_array_equal(generate(model, params, *prompts, max_new_tokens=8, **tiny), greedy_BN)


def test_nucleus_keeps_the_fewest_tokens_that_hold_top_p():
    logits_BV = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((1e-9, [1]), (0.49, [1]), (0.51, [1, 3]), (0.76, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert np.flatnonzero(np.isfinite(nucleus(logits_BV, jnp.float32(top_p))[0])).tolist() == kept
    unlikely_BV = jnp.asarray([[0.0, -200.0]])
    assert np.isfinite(nucleus(unlikely_BV, jnp.float32(1.0))).all()


def test_eos_ends_a_row_and_only_that_row():
    model, params = formula.model("llama")
    prompts = pad(PROMPTS, "left")
    free_BN = np.asarray(generate(model, params, *prompts, max_new_tokens=9))
    eos = int(free_BN[0, 3])
    out_BN = np.asarray(generate(model, params, *prompts, max_new_tokens=9, eos_id=(eos, 999), pad_id=29))
    for free_N, out_N in zip(free_BN, out_BN, strict=True):
        n = int(np.argmax(free_N == eos)) + 1 if eos in free_N else 9
        assert out_N.tolist() == free_N[:n].tolist() + [29] * (9 - n)
    assert out_BN[0, -1] == 29


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 26}, "max_new_tokens is 26 after a prompt of 7; this model has 32 positions"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or above"),
        ({"temperature": 1.0}, "key is missing"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"mask_BT": np.zeros((3, 8))}, "prompt 0 is empty"),
    ],
)
def test_refused_settings(change, message):
    model, params = formula.model("gpt2")
    tokens_BT, mask_BT = pad(PROMPTS, "left")
    arguments = {"mask_BT": mask_BT, "max_new_tokens": 4} | change
    with pytest.raises(UserError) as error:
        generate(model, params, tokens_BT, **arguments)
    assert message in str(error.value)


@pytest.mark.shared
def test_stories260k_tells_its_story(shared):
    directory = shared / "models" / "stories260k"
    from tokenizers import Tokenizer

    model, params = load(directory)
    out_BN = generate(model, params, np.asarray([[1]]), np.ones((1, 1)), max_new_tokens=60)
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(out_BN[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
