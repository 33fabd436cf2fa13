"""LoRA adapters as files of `peft`: round trips, every refusal, and parity with peft in both directions."""

import dataclasses
import json
import warnings

import formula
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxforget.errors import UserError
from jaxforget.models import family_of, hub, save
from jaxforget.models.adapters import CONFIG, ROOT, WEIGHTS, check_adapter, load_adapter, save_adapter
from jaxforget.models.layers import LowRank, merge
from jaxforget.models.model import build
from jaxforget.training.lora import LoraConfig, lora

PLAIN = LoraConfig(rank=3)
HEAD = LoraConfig(rank=3, targets=("(attn|mlp)/.*",), also=("score",), rslora=True)
LLAMA_A = ROOT + "model.layers.1.self_attn.q_proj.lora_A.weight"
SCORE = ROOT + "score.weight"


def trained(name, config=PLAIN):
    """Return a model (or that of a name), its base and the base with a random adapter, as training would leave them."""
    model, base = formula.model(name) if isinstance(name, str) else name
    moving, frozen = lora(config).init(jax.random.key(1), {"model": base})
    drawn = np.random.default_rng(0)
    moving = jax.tree.map(lambda x: x + drawn.normal(0, 0.2, x.shape).astype(np.float32), moving)
    return model, base, lora(config).combine(frozen, moving)["model"]


def equal(a, b):
    same = jax.tree.map(np.array_equal, a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def contents(directory):
    """Return the metadata and tensors of a file; the order of its header is not fixed."""
    with safe_open(directory / WEIGHTS, framework="np") as handle:
        return handle.metadata(), {name: handle.get_tensor(name).tolist() for name in handle.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, PLAIN) for name in formula.CONFIGS),
        ("gpt2", LoraConfig(rank=1, alpha=5.0, targets=("mlp/down",), also=("attn_norm/scale",))),
        ("llama", LoraConfig(rank=2, targets=("q", "head"), also=("embed", "final_norm"))),
        ("llama-classification", HEAD),
    ],
)
def test_round_trip_is_bit_exact(name, config, tmp_path):
    model, base, params = trained(name, config)
    assert save_adapter(tmp_path / "one", model, params, config, base_name="the/base") == tmp_path / "one"
    loaded = load_adapter(tmp_path / "one", model, base)
    assert equal(loaded, params)
    save_adapter(tmp_path / "two", model, jax.device_put(loaded), config, base_name="the/base")
    assert (tmp_path / "one" / CONFIG).read_bytes() == (tmp_path / "two" / CONFIG).read_bytes()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_files_are_those_of_peft(tmp_path):
    model, _, params = trained("llama-classification", HEAD)
    save_adapter(tmp_path / "a", model, params, HEAD, base_name="the/base")
    raw = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "SEQ_CLS"
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["fan_in_fan_out"]) == (3, 16.0, True, False)
    assert raw["target_modules"] == sorted(
        [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    )
    assert raw["modules_to_save"] == ["score"] and raw["base_model_name_or_path"] == "the/base"
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert len(tensors) == 2 * 2 * 7 + 1
    adapter = params["blocks"]["attn"]["k"]["kernel"]
    name = ROOT + "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], adapter.a[1].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], adapter.b[1].T)
    np.testing.assert_array_equal(tensors[SCORE], params["score"]["kernel"].T)


def test_gpt2_turns_the_flag_and_names_what_ends_alike_in_full(tmp_path):
    for i, (targets, names) in enumerate(
        [
            (("attn/qkv",), ["attn.c_attn"]),
            (("attn/o", "mlp/down"), ["attn.c_proj", "mlp.c_proj"]),
            (("attn/o",), ["attn.c_proj"]),
        ]
    ):
        config = LoraConfig(rank=3, targets=targets)
        model, _, params = trained("gpt2", config)
        raw = json.loads((save_adapter(tmp_path / str(i), model, params, config) / CONFIG).read_text())
        assert raw["target_modules"] == names and raw["fan_in_fan_out"] is True
        assert raw["task_type"] == "CAUSAL_LM" and raw["modules_to_save"] is None


def test_a_module_with_one_parameter_in_full_is_saved_whole(tmp_path):
    config = LoraConfig(rank=3, also=("mlp_norm/bias",))
    model, base, params = trained("gpt2", config)
    tensors = load_file(save_adapter(tmp_path / "a", model, params, config) / WEIGHTS)
    np.testing.assert_array_equal(tensors[ROOT + "transformer.h.0.ln_2.weight"], base["blocks"]["mlp_norm"]["scale"][0])
    assert equal(load_adapter(tmp_path / "a", model, base), params)


def test_a_head_drawn_anew_does_not_make_another_base(tmp_path):
    model, base, params = trained("llama-classification", HEAD)
    save_adapter(tmp_path / "a", model, params, HEAD)
    other = base | {"score": {"kernel": base["score"]["kernel"] + 1}}
    assert equal(load_adapter(tmp_path / "a", model, other), params)


@pytest.mark.parametrize(
    ("name", "config", "change", "message"),
    [
        ("gpt2", PLAIN, {"rank": 2}, "the parameters do not hold adapters of rank 2 and scale 8"),
        ("gpt2", PLAIN, {"alpha": 3.0}, "the parameters do not hold adapters of rank 3 and scale 1"),
        ("gpt2", LoraConfig(rank=3, also=("qkv/bias",)), {}, "h.0.attn.c_attn has an adapter and is trained"),
        ("gpt2", LoraConfig(rank=3, also=("embed",)), {}, "module transformer.wte is trained in full, but shares"),
        ("bert", LoraConfig(rank=3, also=("head",)), {}, "module cls.predictions is trained in full, but shares"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(name, config, change, message, tmp_path):
    model, _, params = trained(name, config)
    with pytest.raises(UserError) as error:
        save_adapter(tmp_path / "a", model, params, dataclasses.replace(config, **change))
    assert message in str(error.value) and not list(tmp_path.iterdir())


def test_what_cannot_be_saved_can_be_known_before_training():
    with pytest.raises(UserError, match="module transformer.wte is trained in full"):
        check_adapter(formula.model("gpt2")[0], LoraConfig(also=("embed",)))
    check_adapter(formula.model("llama")[0], LoraConfig(also=("embed",)))  # its head has a table of its own


def test_save_needs_an_adapter_and_an_empty_directory(tmp_path):
    model, base, params = trained("gpt2")
    with pytest.raises(UserError, match="do not hold adapters"):
        save_adapter(tmp_path / "a", model, base, PLAIN)
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", model, params, PLAIN)
    with pytest.raises(UserError, match="not an empty directory"):
        save_adapter(tmp_path / "a", model, params, PLAIN)


def settings(**fields):
    def change(directory):
        raw = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(raw | fields))

    return change


def tensors(change):
    def rewrite(directory):
        metadata, found = contents(directory)[0], load_file(directory / WEIGHTS)
        change(found)
        save_file(found, directory / WEIGHTS, metadata=metadata)

    return rewrite


def truncate(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def unimplemented(name, value):
    return settings(**{name: value}), f"{CONFIG}: field {name} is {value!r}, which is not implemented"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / CONFIG).unlink(), f"{CONFIG} is missing"),
        (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (truncate, f"{WEIGHTS} is truncated or not a safetensors file"),
        (settings(peft_type="IA3"), f"{CONFIG}: field peft_type is 'IA3'; supported: LORA"),
        unimplemented("use_dora", True),
        unimplemented("rank_pattern", {"q_proj": 4}),
        unimplemented("alpha_pattern", {"q_proj": 4}),
        unimplemented("lora_bias", True),
        unimplemented("bias", "lora_only"),
        unimplemented("layers_to_transform", [0]),
        unimplemented("layer_replication", [[0, 2]]),
        unimplemented("megatron_config", {"a": 1}),
        unimplemented("use_qalora", True),
        unimplemented("target_parameters", ["x"]),
        unimplemented("exclude_modules", ["x"]),
        unimplemented("trainable_token_indices", [1]),
        unimplemented("init_lora_weights", "pissa"),
        unimplemented("an_option_to_come", 1),
        (settings(r=0), "field r is 0; expected a number above 0"),
        (settings(lora_alpha="x"), "field lora_alpha is 'x'; expected a number above 0"),
        (settings(target_modules=None), "field target_modules is None; expected names or"),
        (settings(target_modules="("), "field target_modules is '('; expected names or"),
        (settings(fan_in_fan_out=True), f"{CONFIG}: field fan_in_fan_out is True; these modules need False"),
        (tensors(lambda t: t.pop(LLAMA_A)), f"{WEIGHTS}: 1 missing tensors, such as {LLAMA_A}"),
        (settings(target_modules=["q_proj", "v_proj", "score"]), "module score has an adapter and is trained in full"),
        (settings(target_modules=["q_proj", "v_proj", "o_proj"]), "4 missing tensors, such as base_model.model."),
        (settings(modules_to_save=["score", "norm"]), "1 missing tensors, such as base_model.model.model.norm.weight"),
        (tensors(lambda t: t.pop(SCORE)), f"1 missing tensors, such as {SCORE}"),
        (tensors(lambda t: t.update({ROOT + "x.lora_A.weight": t[SCORE]})), "1 unexpected tensors, such as base_"),
        (tensors(lambda t: t.update({"score.weight": t[SCORE]})), "1 unexpected tensors, such as score.weight"),
        (
            tensors(lambda t: t.update({LLAMA_A: t[LLAMA_A][:, :5].copy()})),
            f"tensor {LLAMA_A} of parameter blocks/attn/q/kernel has shape (3, 5); model and rank need (3, 16)",
        ),
        (settings(r=4), "of parameter blocks/attn/q/kernel has shape (3, 16); model and rank need (4, 16)"),
        (
            tensors(lambda t: t.update({SCORE: t[SCORE][:2].copy()})),
            f"tensor {SCORE} of parameter score/kernel has shape (2, 16); model and rank need (3, 16)",
        ),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(damage, message, tmp_path):
    config = LoraConfig(rank=3, also=("score",))
    model, base, params = trained("llama-classification", config)
    damage(save_adapter(tmp_path / "a", model, params, config))
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path / "a", model, base)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_another_base_is_refused_unless_the_file_names_none(tmp_path):
    model, base, params = trained("gpt2")
    directory = save_adapter(tmp_path / "a", model, params, PLAIN, base_name="the/base")
    other = jax.tree.map(np.copy, base)
    other["positions"]["table"][3, 1] += 1e-6
    with pytest.raises(UserError, match="made for the base model the/base, whose parameters differ"):
        load_adapter(directory, model, other)
    with pytest.raises(UserError, match="has a LoRA adapter already"):
        load_adapter(directory, model, params)
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, metadata={"format": "pt"})  # as peft writes it
    assert isinstance(load_adapter(directory, model, other)["blocks"]["attn"]["qkv"]["kernel"], LowRank)
    with pytest.raises(UserError, match="unexpected tensors"):
        load_adapter(directory, *formula.model("llama"))


# ---------------------------------------------------------------------------------------- parity with peft
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two float32 implementations that sum in different orders
ROBERTA = formula.CONFIGS["roberta"] | {"architectures": ["RobertaForSequenceClassification"], "num_labels": 3}
# A row: config.json, our settings, those of peft (q and v of every attention, unless given).
CASES = {
    "gpt2": (formula.CONFIGS["gpt2"], LoraConfig(rank=3, alpha=4.0), {"target_modules": ["c_attn"]}),
    "gpt2-all": (
        formula.CONFIGS["gpt2"],
        LoraConfig(rank=2, targets=("attn/.*", "mlp/.*"), also=("final_norm",)),
        {"target_modules": "all-linear", "modules_to_save": ["ln_f"]},
    ),
    "gpt2-some": (
        formula.CONFIGS["gpt2"],
        LoraConfig(rank=2, targets=("mlp/down",), also=("mlp_norm",)),
        {"target_modules": r".*\.mlp\.c_proj", "modules_to_save": ["ln_2"]},
    ),
    "llama": (
        formula.CONFIGS["llama"],
        LoraConfig(rank=3, rslora=True),
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ),
    "llama-head": (
        formula.CONFIGS["llama"],
        LoraConfig(rank=3, targets=("head", "k"), also=("embed",)),
        {"target_modules": ["lm_head", "k_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "llama-classification": (formula.CONFIGS["llama-classification"], HEAD, {"target_modules": "all-linear"}),
    "bert": (
        formula.CONFIGS["bert"],
        LoraConfig(rank=3, also=("transform", "transform_norm")),
        {"target_modules": ["query", "value"], "modules_to_save": ["transform"]},
    ),
    "bert-classification": (
        formula.CONFIGS["bert-classification"],
        LoraConfig(rank=3, also=("score", "pool")),
        {"target_modules": ["query", "value"], "modules_to_save": ["pooler"]},
    ),
    "roberta-classification": (
        ROBERTA,
        LoraConfig(rank=3, also=("score", "pool")),
        {"target_modules": ["query", "value"]},
    ),
    "distilbert": (formula.CONFIGS["distilbert"], PLAIN, {"target_modules": ["q_lin", "v_lin"]}),
    "opt": (formula.CONFIGS["opt"], PLAIN, {"target_modules": ["q_proj", "v_proj"]}),
    "gpt_neox": (
        formula.CONFIGS["gpt_neox"],
        LoraConfig(rank=3, also=("head",)),
        {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
    ),
    "gpt2-bare": (
        formula.CONFIGS["gpt2"] | {"architectures": ["GPT2Model"]},
        LoraConfig(rank=3, also=("final_norm",)),
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    ),
    "t5": (formula.CONFIGS["t5"], PLAIN, {"target_modules": ["q", "v"]}),
    "t5-some": (
        formula.CONFIGS["t5"],
        LoraConfig(rank=3, targets=("encoder/attn/q", "cross/v"), also=("mlp_norm",)),
        {"target_modules": r"encoder.*\.q|.*EncDecAttention\.v", "modules_to_save": ["final_layer_norm"]},
    ),
}
TASKS = {"Conditional": "SEQ_2_SEQ_LM", "Causal": "CAUSAL_LM", "LMHead": "CAUSAL_LM", "Sequence": "SEQ_CLS"}
parity = pytest.mark.parity
cases = pytest.mark.parametrize("case", CASES)


def torch_base(case, directory):
    """Return our base model and parameters, and what transformers makes of them on torch, with peft."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    raw = CASES[case][0]
    model = build(family_of(raw["model_type"]).Config.from_hf(raw))
    if raw.get("architectures") == ["GPT2Model"]:  # else read with the family's usual head
        model = build(dataclasses.replace(model.config, head="none"))
    shapes = hub.to_tensors(model, model.shapes())
    base = hub.to_params(model, {key: formula.tensor(key, shape) for key, (shape, _) in shapes.items()})
    save(directory, model, base)
    architecture = json.loads((directory / hub.CONFIG).read_text())["architectures"][0]
    return model, base, getattr(transformers, architecture).from_pretrained(directory).eval(), peft


def check_equal(model, params, theirs):
    """Compare logits, and the merged parameters by name."""

    def compare(theirs, params):
        expected = formula.torch_logits(theirs, formula.BATCH)
        found = np.asarray(jax.jit(model.batch_logits)(params, formula.BATCH))
        if expected.ndim == 3:  # the two sides may differ at padding
            real_BT = np.arange(expected.shape[1])[None] < formula.BATCH["length"][:, None]
            expected, found = expected[real_BT], found[real_BT]
        np.testing.assert_allclose(found, expected, **CLOSE)
        return found

    before = compare(theirs.eval(), params)
    merged = theirs.merge_and_unload()
    compare(merged, merge(params))
    state = merged.state_dict()
    for key, (_, read) in hub.to_tensors(model, merge(params)).items():
        key = formula.MODULES.get(key, key)
        key = key if key in state else key.removeprefix("transformer.")  # of the bare model
        np.testing.assert_allclose(read(), state[key].numpy(), rtol=1e-6, atol=1e-6)
    return before


@parity
@cases
def test_peft_reads_what_we_write(case, tmp_path):
    model, base, theirs, peft = torch_base(case, tmp_path / "base")
    config = CASES[case][1]
    _, _, params = trained((model, base), config)
    save_adapter(tmp_path / "adapter", model, params, config, base_name=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as missing keys
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    check_equal(model, params, theirs)


@parity
@cases
def test_we_read_what_peft_writes(case, tmp_path):
    model, base, theirs, peft = torch_base(case, tmp_path / "base")
    import torch

    name = type(theirs).__name__
    task = next((task for part, task in TASKS.items() if part in name), None)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, task_type=task, **CASES[case][2]))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn_like(value))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    check_equal(model, load_adapter(tmp_path / "adapter", model, base), theirs)
