"""Logits, files and greedy generation against transformers on torch, in float32.

Tolerance 1e-4, relative and absolute: two float32 implementations that sum in different orders.
"""

import dataclasses
import json
import re

import formula
import jax
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.models import FAMILIES, family_of, generate, hub, load, save
from jaxforget.models.model import build

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
BERT, ROBERTA = (BASE | {"model_type": name, "type_vocab_size": 2} for name in ("bert", "roberta"))
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 37,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 40,
}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}}
LLAMA, MISTRAL, QWEN2 = (BASE | {"model_type": name} for name in ("llama", "mistral", "qwen2"))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "rope_theta": 100.0}
OPT = {
    "model_type": "opt",
    "vocab_size": 37,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
NEOX = BASE | {"model_type": "gpt_neox", "hidden_size": 32}
T5 = {
    "model_type": "t5",
    "vocab_size": 37,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}

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
    "gpt2-classification": GPT2
    | {"architectures": ["GPT2ForSequenceClassification"], "id2label": {0: "a", 1: "b", 2: "c"}},
    "llama-classification": LLAMA
    | {"architectures": ["LlamaForSequenceClassification"], "id2label": {0: "a", 1: "b", 2: "c"}},
    "qwen2-hidden": QWEN2 | {"num_key_value_heads": 2, "architectures": ["Qwen2Model"]},
    "qwen2-yarn": QWEN2 | {"num_key_value_heads": 2, "rope_scaling": YARN | {"type": "yarn"}},
    "bert": BERT,
    "bert-untied": BERT | {"tie_word_embeddings": False},
    "bert-relu": BERT | {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "bert-one-type": BERT | {"type_vocab_size": 1},
    "bert-classification": BERT | LABELS | {"architectures": ["BertForSequenceClassification"]},
    "bert-hidden": BERT | {"architectures": ["BertModel"]},
    "roberta": ROBERTA,
    "roberta-untied": ROBERTA | {"tie_word_embeddings": False},
    "roberta-relu": ROBERTA | {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 1},
    "roberta-padding-inside": ROBERTA | {"pad_token_id": 5},
    "roberta-classification": ROBERTA | LABELS | {"architectures": ["RobertaForSequenceClassification"]},
    "roberta-hidden": ROBERTA | {"architectures": ["RobertaModel"]},
    "distilbert": DISTILBERT,
    "distilbert-untied": DISTILBERT | {"tie_word_embeddings": False},
    "distilbert-relu": DISTILBERT | {"activation": "relu"},
    "distilbert-sinusoidal": DISTILBERT | {"sinusoidal_pos_embds": True},
    "distilbert-classification": DISTILBERT | LABELS | {"architectures": ["DistilBertForSequenceClassification"]},
    "distilbert-hidden": DISTILBERT | {"architectures": ["DistilBertModel"]},
    "opt": OPT,
    "opt-untied": OPT | {"tie_word_embeddings": False},
    "opt-after": OPT | {"do_layer_norm_before": False},
    "opt-350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "opt-wide-untied": OPT | {"word_embed_proj_dim": 20, "tie_word_embeddings": False},
    "opt-no-final-norm": OPT | {"_remove_final_layer_norm": True},
    "opt-no-bias": OPT | {"enable_bias": False, "activation_function": "gelu"},
    "opt-plain-norms": OPT | {"layer_norm_elementwise_affine": False},
    "opt-classification": OPT | LABELS | {"architectures": ["OPTForSequenceClassification"], "word_embed_proj_dim": 12},
    "opt-hidden": OPT | {"architectures": ["OPTModel"]},
    "gpt_neox": NEOX,
    "gpt_neox-tied": NEOX | {"tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    "gpt_neox-sequential": NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"},
    "gpt_neox-no-attention-bias": NEOX | {"attention_bias": False},
    "gpt_neox-rotary": NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 300},
    "gpt_neox-whole-heads": NEOX | {"rotary_pct": 1.0},
    "gpt_neox-parameters": NEOX
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75}},
    "gpt_neox-parameters-bare": NEOX
    | {"rope_parameters": {"rope_type": "default"}, "rotary_pct": 0.75, "rotary_emb_base": 300},
    "gpt_neox-linear": NEOX | {"rope_scaling": {"type": "linear", "factor": 3.0}, "rotary_pct": 0.5},
    "gpt_neox-dynamic": NEOX
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rotary_pct": 0.5, "max_position_embeddings": 10},
    "gpt_neox-llama3": NEOX
    | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10}, "rotary_pct": 0.5, "rotary_emb_base": 50},
    "gpt_neox-yarn": NEOX | {"rope_parameters": YARN | {"partial_rotary_factor": 0.75}},
    "gpt_neox-classification": NEOX | LABELS | {"architectures": ["GPTNeoXForSequenceClassification"]},
    "gpt_neox-hidden": NEOX | {"architectures": ["GPTNeoXModel"]},
    "t5": T5,
    "t5-v1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-tied-unscaled": T5 | {"feed_forward_proj": "gated-silu", "scale_decoder_outputs": False},
    "t5-gelu": T5 | {"feed_forward_proj": "gelu", "layer_norm_epsilon": 1e-2},
    "t5-buckets": T5 | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "t5-odd-buckets": T5 | {"relative_attention_num_buckets": 7, "relative_attention_max_distance": 10},
    "t5-symmetric": T5 | {"num_decoder_layers": None, "d_kv": 4},
    "t5-start": T5 | {"decoder_start_token_id": 5},
    "t5-hidden": T5 | {"architectures": ["T5Model"]},
}


GENERATING = [
    case
    for case, raw in CASES.items()
    if "architectures" not in raw
    and {"causal", "seq2seq"} & set(family_of(raw["model_type"]).ARCHITECTURES[raw["model_type"]])
]


def make(case, **fields):
    """Return a transformers model with every parameter random, biases and norms included."""
    torch.manual_seed(0)
    theirs = formula.torch_model({"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | CASES[case] | fields)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(formula.is_scale(name) + 0.3 * torch.randn_like(value))
    return theirs


def tokens(rows=2, length=T):
    return np.random.default_rng(0).integers(1, 37, (rows, length))


def padded_batch():
    """Return two rows, the second padded with the padding id from column 15 on."""
    draw = np.random.default_rng(1)
    batch = {"tokens": tokens(), "length": np.asarray([T, 15]), "segments": draw.integers(0, 2, (2, T))}
    batch["tokens"][1, 15:] = 0
    return batch | {"decoder_tokens": draw.integers(0, 37, (2, 9))}


def real(logits, batch):
    """Zero what stands at padding, where the two sides may differ."""
    if logits.ndim < 3 or logits.shape[1] != batch["tokens"].shape[1]:
        return np.asarray(logits)
    return np.where(np.arange(logits.shape[1])[None, :, None] < batch["length"][:, None, None], logits, 0.0)


def torch_generate(theirs, tokens_BT, new, mask_BT=None):
    tokens_BT = torch.from_numpy(tokens_BT)
    mask_BT = torch.ones_like(tokens_BT) if mask_BT is None else torch.from_numpy(mask_BT)
    out = theirs.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, pad_token_id=0)
    # An encoder-decoder returns its start token and what follows.
    return out[:, 1 if theirs.config.is_encoder_decoder else tokens_BT.shape[1] :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_in_both_directions(case, tmp_path):
    theirs = make(case)
    batch = padded_batch()
    expected = real(formula.torch_logits(theirs, batch), batch)
    theirs.save_pretrained(tmp_path / "theirs")
    bare = CASES[case].get("architectures", [""])[0].endswith("Model")
    head = "none" if bare else None  # a bare model is otherwise read with its family's usual head
    model, params = load(tmp_path / "theirs", head=head)
    np.testing.assert_allclose(real(jax.jit(model.batch_logits)(params, batch), batch), expected, **CLOSE)

    save(tmp_path / "ours", model, params)
    options = {"attn_implementation": "eager"} if "attn_implementation" in CASES[case] else {}
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    # The pooler of their bare encoders feeds no hidden state, and has no place in ours.
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    assert not missing and not any(info[kind] for kind in ("unexpected_keys", "mismatched_keys")), info
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(real(formula.torch_logits(again.eval(), batch), batch), expected)
    reloaded, loaded = load(tmp_path / "ours", head=head)
    assert reloaded == model
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("case", GENERATING)
def test_greedy_generation_token_by_token(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    prompt = tokens(rows=1, length=7)
    # Fresh modules: the dynamic rope type remembers the longest sequence it saw.
    expected_BN = torch_generate(make(case), prompt, new=16)
    out_BN = generate(model, params, prompt, np.ones_like(prompt), max_new_tokens=16)
    np.testing.assert_array_equal(out_BN, expected_BN)


@pytest.mark.parametrize("case", ["gpt2", "mistral", "qwen2-window", "opt", "gpt_neox"])
def test_left_padded_batches_generate_the_same(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    prompts, mask = tokens(rows=3, length=9), np.ones((3, 9), np.int64)
    mask[0, :4] = mask[2, :7] = 0
    np.testing.assert_array_equal(
        generate(model, params, prompts, mask, max_new_tokens=12), torch_generate(theirs, prompts, 12, mask)
    )


@pytest.mark.parametrize("case", ["t5", "t5-v1.1"])
def test_sources_of_different_lengths_generate_the_same_until_eos(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    sources, length_B = tokens(rows=4, length=9), np.asarray([9, 4, 1, 7])
    mask = (np.arange(9)[None] < length_B[:, None]).astype(np.int64)
    free_BN = torch_generate(theirs, sources * mask, 14, mask)
    np.testing.assert_array_equal(generate(model, params, sources, mask, max_new_tokens=14), free_BN)
    for eos in set(free_BN.ravel().tolist()):
        theirs.generation_config.eos_token_id = eos
        expected_BN = torch_generate(theirs, sources * mask, 14, mask)
        expected_BN = np.pad(expected_BN, ((0, 0), (0, 14 - expected_BN.shape[1])))  # it stops when all rows have
        out_BN = generate(model, params, sources, mask, max_new_tokens=14, eos_id=eos)
        np.testing.assert_array_equal(out_BN, expected_BN)


def test_bert_files_of_pretraining_and_another_head(tmp_path):
    theirs = make("bert", architectures=["BertForPreTraining"])
    theirs.save_pretrained(tmp_path / "theirs")
    batch = padded_batch()
    mask_BT = np.arange(T)[None] < batch["length"][:, None]
    with torch.no_grad():
        out = theirs(*(torch.from_numpy(x) for x in (batch["tokens"], mask_BT.astype(int), batch["segments"])))
    model, params = load(tmp_path / "theirs")
    logits = jax.jit(model.batch_logits)(params, batch)
    np.testing.assert_allclose(real(logits, batch), real(out.prediction_logits.numpy(), batch), **CLOSE)
    save(tmp_path / "masked", model, params)

    told = []
    options = {"head": "classification", "labels": ("a", "b", "c"), "tell": told.append}
    _, loaded = load(tmp_path / "theirs", **options)
    assert told.pop().endswith("drawn at random: score/kernel, score/bias")
    np.testing.assert_array_equal(loaded["pool"]["kernel"], theirs.bert.pooler.dense.weight.detach().numpy().T)
    jax.tree.map(np.testing.assert_array_equal, loaded["blocks"], params["blocks"])
    model, loaded = load(tmp_path / "masked", **options)
    assert "pool/kernel" in told.pop() and loaded["score"]["kernel"].shape == (16, 3)
    save(tmp_path / "classification", model, loaded)
    _, again = load(tmp_path / "classification")
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


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


@pytest.mark.parametrize("case", [name for name, raw in CASES.items() if name == raw["model_type"]])
def test_init_deviates_as_theirs(case):
    torch.manual_seed(0)
    wide = {"n_embd": 64, "hidden_size": 64, "dim": 64, "d_model": 64, "type_vocab_size": 30}
    wide |= {"relative_attention_num_buckets": 400, "relative_attention_max_distance": 500}
    theirs = formula.torch_model({k: wide.get(k, v) for k, v in CASES[case].items()})
    config, theirs = theirs.config, theirs.state_dict()
    model = build(family_of(config.model_type).Config.from_hf(config.to_dict()))
    ours = hub.to_tensors(model, model.init(jax.random.key(0)))
    for name, (shape, read) in ours.items():
        # Samples of at least 1500 numbers, or constants.
        their = theirs[formula.MODULES.get(name, name)]
        np.testing.assert_allclose(np.std(read()), their.std(correction=0), rtol=0.12, atol=1e-7, err_msg=name)
        assert tuple(their.shape) == shape


@pytest.mark.parametrize("name", formula.CONFIGS)
def test_golden_file_is_current(name):
    golden = json.loads(formula.GOLDEN.read_text())[name]
    np.testing.assert_allclose(golden, formula.torch_golden(name), atol=2e-5)


@pytest.mark.shared
def test_stories260k_saved_by_us_loads_in_transformers(tmp_path, shared):
    directory = shared / "models" / "stories260k"
    model, params = load(directory)
    save(tmp_path / "ours", model, params, tokenizer_dir=directory)
    tokens_BT = np.random.default_rng(0).integers(3, 512, (2, 64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    batch = {"tokens": tokens_BT, "length": np.asarray([64, 64])}
    expected_BTV = formula.torch_logits(original, batch)
    np.testing.assert_array_equal(formula.torch_logits(theirs, batch), expected_BTV)
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens_BT), expected_BTV, **CLOSE)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").encode("Once upon a time")


# Fields of transformers' configs that change no number here: dropout, caching, ids of tokens, initial values.
HARMLESS = (
    r".*dropout.*|.*drop|.*pdrop|layerdrop|use_cache|\w+_token_id|pretraining_tp|summary_\w+|initializer_\w+|init_std"
    r"|sinusoidal_pos_embds|gpt_neox\.is_decoder|model_type|attribute_map|base_model_\w+|keys_to_ignore_at_inference|default_theta"
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_is_implemented_or_refused(model_type):
    theirs = type(transformers.AutoConfig.for_model(model_type))
    raw = next(raw for raw in formula.CONFIGS.values() if raw["model_type"] == model_type)
    family = family_of(model_type).Config
    ours = {field.name for field in dataclasses.fields(family)} | {"rope_parameters", "rope_scaling"}
    default, ignored = transformers.AutoConfig.for_model(model_type).to_dict(), []
    for name in set(theirs.__annotations__) - ours:
        if any(re.fullmatch(HARMLESS, n) for n in (name, f"{model_type}.{name}")) or name.startswith("_"):
            continue
        value = default.get(name)
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        try:
            family.from_hf(raw | {name: other})
            ignored.append(name)
        except UserError as error:
            assert name in str(error)
    assert not ignored
