"""Logits, files and greedy generation against transformers on torch, in float32.

Tolerance 1e-4, relative and absolute: two float32 implementations that sum in different orders.
"""

import json
from pathlib import Path

import formula
import jax
import numpy as np
import pytest

from jaxforget.models import generate, hub, load, save

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[2].parent / "shared"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
T = 24  # tokens: beyond the original length of every scaled rope below

GPT2 = {"vocab_size": 37, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "model_type": "gpt2"}
BASE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
LLAMA, MISTRAL, QWEN2 = (BASE | {"model_type": name} for name in ("llama", "mistral", "qwen2"))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "rope_theta": 100.0}

CASES = {
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "gpt2-inner-relu": GPT2 | {"n_inner": 20, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "gpt2-unscaled": GPT2 | {"scale_attn_weights": False},
    "gpt2-by-layer": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "gpt2-reorder": GPT2 | {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "llama-gqa": LLAMA | {"num_key_value_heads": 2},
    "llama-mqa": LLAMA | {"num_key_value_heads": 1},
    "llama-head-dim": LLAMA | {"head_dim": 6, "num_key_value_heads": 2},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"},
    "llama-theta": LLAMA | {"rope_theta": 300.0},
    "llama-parameters": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama-linear-new": LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 200.0}},
    "llama-dynamic": LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 10},
    "llama-llama3": LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10}, "head_dim": 8},
    "llama-llama3-no-original": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 50.0}, "head_dim": 8},
    "llama-yarn": LLAMA | {"rope_parameters": YARN, "head_dim": 12},
    "llama-yarn-mscale": LLAMA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "llama-yarn-factor": LLAMA
    | {"rope_parameters": YARN | {"attention_factor": 0.8, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}},
    "mistral": MISTRAL | {"num_key_value_heads": 2, "sliding_window": 5},
    "mistral-full": MISTRAL | {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 6},
    "qwen2": QWEN2 | {"num_key_value_heads": 2},
    "qwen2-tied": QWEN2 | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2-window": QWEN2
    | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2-types": QWEN2
    | {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2-yarn": QWEN2 | {"num_key_value_heads": 2, "rope_scaling": YARN | {"type": "yarn"}},
}


def make(case):
    """Return a transformers model with every parameter random, biases and norms included."""
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**ids | json.loads(json.dumps(CASES[case])))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            centre = 1.0 if "norm" in name or "ln_" in name else 0.0
            value.copy_(centre + 0.3 * torch.randn_like(value))
    return theirs


def tokens(rows=2, length=T):
    return np.random.default_rng(0).integers(1, 37, (rows, length))


def torch_logits(theirs, tokens_BT):
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens_BT)).logits.float().numpy()


def torch_generate(theirs, tokens_BT, new, mask_BT=None):
    tokens_BT = torch.from_numpy(tokens_BT)
    mask_BT = torch.ones_like(tokens_BT) if mask_BT is None else torch.from_numpy(mask_BT)
    out = theirs.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, tokens_BT.shape[1] :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_in_both_directions(case, tmp_path):
    theirs = make(case)
    tokens_BT = tokens()
    expected_BTV = torch_logits(theirs, tokens_BT)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(tmp_path / "theirs")
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens_BT), expected_BTV, **CLOSE)

    save(tmp_path / "ours", model, params)
    options = {"attn_implementation": "eager"} if "attn_implementation" in CASES[case] else {}
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens_BT), expected_BTV)
    reloaded, loaded = load(tmp_path / "ours")
    assert reloaded == model
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_token_by_token(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    prompt = tokens(rows=1, length=7)
    # Fresh modules: the dynamic rope type remembers the longest sequence it saw.
    expected_BN = torch_generate(make(case), prompt, new=16)
    out_BN = generate(model, params, prompt, np.ones_like(prompt), max_new_tokens=16)
    np.testing.assert_array_equal(out_BN, expected_BN)


@pytest.mark.parametrize("case", ["gpt2", "mistral", "qwen2-window"])
def test_left_padded_batches_generate_the_same(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    prompts, mask = tokens(rows=3, length=9), np.ones((3, 9), np.int64)
    mask[0, :4] = mask[2, :7] = 0
    np.testing.assert_array_equal(
        generate(model, params, prompts, mask, max_new_tokens=12), torch_generate(theirs, prompts, 12, mask)
    )


@pytest.mark.parametrize("act", sorted(set(transformers.activations.ACT2CLS) - {"prelu", "xielu"}))
def test_activations(act):
    from jaxforget.models.layers import ACTIVATIONS

    x = np.linspace(-12, 12, 97, dtype=np.float32)
    expected = transformers.activations.ACT2FN[act](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[act](x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_load_both_ways(dtype, tmp_path):
    theirs = make("llama-gqa").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(tmp_path / "theirs")
    save(tmp_path / "ours", model, params, dtype=dtype, max_shard_bytes=3000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_init_deviates_as_theirs(case):
    torch.manual_seed(0)
    wide = {"n_embd": 64, "hidden_size": 64}
    config = transformers.AutoConfig.for_model(**{k: wide.get(k, v) for k, v in CASES[case].items()})
    theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    from jaxforget.models import FAMILIES, Model

    model = Model(FAMILIES[config.model_type].Config.from_hf(config.to_dict()))
    ours = hub.to_tensors(model, model.init(jax.random.key(0)))
    for name, (shape, read) in ours.items():
        # Samples of at least 1500 numbers, or constants.
        np.testing.assert_allclose(np.std(read()), theirs[name].std(correction=0), rtol=0.12, atol=1e-7, err_msg=name)
        assert tuple(theirs[name].shape) == shape


@pytest.mark.parametrize("name", formula.CONFIGS)
def test_golden_file_is_current(name):
    golden = json.loads(formula.GOLDEN.read_text())[name]
    np.testing.assert_allclose(golden, formula.torch_logits(name)[:1, formula.POSITIONS], atol=2e-5)


@pytest.mark.shared
def test_stories260k_saved_by_us_loads_in_transformers(tmp_path):
    directory = SHARED / "models" / "stories260k"
    if not directory.is_dir():
        pytest.skip(f"development data absent: {directory}")
    model, params = load(directory)
    save(tmp_path / "ours", model, params, tokenizer_dir=directory)
    tokens_BT = np.random.default_rng(0).integers(3, 512, (2, 64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    expected_BTV = torch_logits(original, tokens_BT)
    np.testing.assert_array_equal(torch_logits(theirs, tokens_BT), expected_BTV)
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens_BT), expected_BTV, **CLOSE)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").encode("Once upon a time")
