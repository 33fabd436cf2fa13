"""train.debias and eval.leakage: what they leave, what stays exact, and what they refuse."""

import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pages
import pytest
import running
from conftest import make_examples
from shards import call, done

import eval.leakage
import train.debias
import train.sisa
from jaxforget.data.text import TextConfig
from jaxforget.debiasing.composition import merged
from jaxforget.debiasing.data import DataConfig, by_content, generated, read_sets, split_by_content
from jaxforget.debiasing.modules import inspect, load_module
from jaxforget.debiasing.run import Learner
from jaxforget.debiasing.serving import Modular
from jaxforget.errors import UserError
from jaxforget.models import hub
from jaxforget.models.adapters import digest
from jaxforget.privacy.accounting import Mechanism, PrivacyConfig
from jaxforget.privacy.recipe import private_run
from jaxforget.training.optimizer import TrainConfig

QUICK = ("--records", 160, "--epochs", 1, "--fixed-epochs", 1, "--task-epochs", 1, "--attack.epochs", 1,
         "--size.width", 16, "--size.layers", 1, "--size.heads", 2, "--size.vocab-size", 300)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("debias")
    done(train.debias, *QUICK, "--density", 0.05, "--export", "--out", home / "post")
    return home


def load(out, *names):
    model, params = hub.load(out / "core")
    return model, params, {n: load_module(out / f"modules/{n}.safetensors", digest(params)) for n in names}


def test_a_module_an_attribute_within_its_budget(home):
    _, params, modules = load(home / "post", "coast", "guild")
    size = sum(x.size for name, part in params.items() if name not in ("pool", "score") for x in jax.tree.leaves(part))
    for name, module in modules.items():
        row = running.row(home / "post", name)
        assert module.size == size and 0 < module.nonzeros <= round(0.05 * size)
        assert row["achieved_density"] == pytest.approx(module.nonzeros / size) and row["density"] == 0.05
        assert module.about["attribute"] == name and module.about["regime"] == "post"
        assert sum(inspect(module)["share_by_part"].values()) == pytest.approx(1)
    names = [row["name"] for row in running.results(home / "post")["results"]]
    assert names == ["core", "coast", "guild", "coast+guild", "LEACE coast", "LEACE guild", "LEACE coast+guild"]
    assert not (home / "post/checkpoints").exists()
    assert pages.check((home / "post/report.html").read_text()).plots
    densities = [line["density"] for line in running.metrics(home / "post") if "density" in line]
    assert densities[0] == [1.0]  # before the first step all gates are open


def test_merged_directories_are_the_core_with_its_modules(home):
    _, params, modules = load(home / "post", "coast", "guild")
    for chosen in (("coast",), ("coast", "guild")):
        _, found = hub.load(home / "post/merged" / "+".join(chosen))
        chex.assert_trees_all_equal(found, merged(params, {name: modules[name] for name in chosen}))


@pytest.mark.slow
def test_one_module_beside_its_core(tmp_path):
    done(train.debias, *QUICK, "--density", 0.02, "--regime", "par", "--merge", "--out", tmp_path / "par")
    _, _, modules = load(tmp_path / "par", "coast+guild")
    assert modules["coast+guild"].about["regime"] == "par" and not (tmp_path / "par/merged").exists()
    assert [row["name"] for row in running.results(tmp_path / "par")["results"]][:2] == ["core", "coast+guild"]


def test_leakage_of_what_was_trained(home, tmp_path):
    """The same core, modules, data and attackers: the same rows."""
    files = [home / f"post/modules/{name}.safetensors" for name in ("coast", "guild")]
    done(eval.leakage, "--model", home / "post/core", "--modules", *files, "--records", 160, "--attack.epochs", 1,
         "--attack.learning-rate", 1e-3, "--out", tmp_path / "again")  # fmt: skip
    before, after = running.results(home / "post")["results"], running.results(tmp_path / "again")["results"]
    assert [row["name"] for row in before] == [row["name"] for row in after]
    for one, two in zip(before, after, strict=True):
        for field in two:
            if isinstance(two[field], float):
                assert one[field] == pytest.approx(two[field], abs=1e-6), (one["name"], field)
    assert all(row[f"floor_{name}"] == after[0][f"floor_{name}"] for row in after for name in ("coast", "guild"))


def test_a_finished_core_is_used_as_it_is_and_the_rest_is_resumed(home, tmp_path):
    settings = (*QUICK, "--density", 0.03, "--core", home / "post/core", "--out", tmp_path / "more")
    done(train.debias, *settings)
    assert not (tmp_path / "more/core").exists()
    first = tmp_path / "more/modules/guild.safetensors"
    content = first.read_bytes()
    assert load_module(first).base_sha256 == digest(hub.load(home / "post/core")[1])
    first.unlink()
    done(train.debias, *settings, "--resume")
    assert first.read_bytes() == content


@pytest.mark.slow
def test_the_task_as_a_module(home, tmp_path):
    done(train.debias, *QUICK, "--density", 0.05, "--task-density", 0.1, "--out", tmp_path / "task")
    _, params, modules = load(tmp_path / "task", "task", "coast", "guild")
    assert modules["coast"].about["requires"] == ["task"] and modules["task"].density <= 0.1
    start = dict(hub.load(home / "post/core")[1])
    fresh = {name: part for name, part in params.items() if name not in ("pool", "score")}
    assert jax.tree.structure(fresh) == jax.tree.structure({n: start[n] for n in fresh})
    again = train.debias.start_of(
        train.debias.Config(size=train.debias.SizeConfig(width=16, layers=1, heads=2, context=16, vocab_size=300)),
        *read_sets(DataConfig(records=160), TextConfig())[::2],
    )[0].params(0)  # fmt: skip
    chex.assert_trees_all_equal(fresh, {name: again[name] for name in fresh})  # the backbone never moved


# ----------------------------------------------------------------------------------------- with other methods


@pytest.mark.slow
def test_private_modules_state_one_promise_for_all_that_moved(home, tmp_path):
    """Both phases of both modules are one mechanism; each drew records and noise of its own."""
    out = tmp_path / "private"
    done(train.debias, *QUICK, "--density", 0.05, "--core", home / "post/core", "--batch-size", 16, "--dp.noise", 1.5,
         "--dp.delta", 1e-3, "--out", out)  # fmt: skip
    lines = running.metrics(out)
    units = {(stage, k): [line["units"][k] for line in lines if line["stage"] == stage and "units" in line]
             for stage in ("gates0", "values0") for k in (0, 1)}  # fmt: skip
    stated = {k.removeprefix("dp_"): v for k, v in running.row(out, "coast").items() if k[:3] == "dp_"}
    assert stated["steps"] == sum(map(len, units.values())) and stated["sigma"] == 1.5
    assert len(set(map(tuple, units.values()))) == 4
    known = ("unit", "sampler", "population", "batch", "steps", "sigma", "clip", "delta", "cap")
    assert stated["epsilon"] == pytest.approx(Mechanism(**{name: stated[name] for name in known}).epsilon())
    for name in ("coast", "guild"):
        module = load_module(out / f"modules/{name}.safetensors", digest(hub.load(home / "post/core")[1]))
        assert module.about["privacy"] == stated and 0 < module.density <= 0.05
        assert "seed" not in module.about  # who knows it can take the noise out again
    assert "Differential privacy" in (out / "report.html").read_text()


def test_no_two_phases_or_modules_share_a_draw():
    rows = make_examples(96)
    run = private_run(PrivacyConfig(noise=1.0, delta=1e-3), TrainConfig(epochs=6, batch_size=16), rows, 0, "record")
    learners = [Learner(None, rows, [np.float32([0.2, 0.8])], ((0,),), 0)] * 2
    phases = [train.debias.privately(run, learners, [0, 1], phase, epochs) for phase, epochs in ((0, 2), (1, 1))]
    batches = [one for _, slots in phases for one in slots.batches]
    assert sum(one.steps for one in batches) == run.mechanism.steps
    draws = {tuple(map(tuple, one.draws[:6])) for one in batches}
    seeds = {one.seed for members, _ in phases for one in members}
    assert len(draws) == len(seeds) == 4 and seeds == {one.seed for one in batches}
    assert len({one.units for one in phases[0][1].batches}) == 1  # one shape for the members of a phase
    for members, _ in phases:
        assert all(one.shares[0].tolist() == [0.5, 0.5] for one in members)  # shares of records are no secret


@pytest.mark.slow
def test_a_module_over_a_member_of_an_ensemble(tmp_path):
    """What train.sisa leaves is a core; off is that member, bit for bit, and another member is another base."""
    data = write(tmp_path / "reviews.jsonl", [{"text": r.text, **r.fields} for r in generated(160, 0)])
    done(train.sisa, "--data", data, "--task", "classification", "--shards", 2, "--slices", 1, "--epochs", 1,
         "--size.width", 16, "--size.layers", 1, "--size.heads", 2, "--size.context", 16, "--size.vocab-size", 300,
         "--out", tmp_path / "ensemble")  # fmt: skip
    one, two = sorted((tmp_path / "ensemble/members").iterdir())
    done(train.debias, *QUICK[2:], "--data", data, "--attributes", "coast", "--density", 0.05, "--core", one,
         "--out", tmp_path / "out")  # fmt: skip
    model, params = hub.load(one)
    modular = Modular(model, params, {"coast": load_module(tmp_path / "out/modules/coast.safetensors", digest(params))})
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(4, 8), "length": np.full(4, 8, np.int32)}
    before, on, off = (np.asarray(modular.logits(batch, names)) for names in ((), ("coast",), ()))
    np.testing.assert_array_equal(before, off)
    assert np.abs(on - off).max() > 0
    chex.assert_trees_all_equal(modular.params(()), jax.tree.map(jax.numpy.asarray, params))
    refused(call(eval.leakage, "--model", two, "--modules", tmp_path / "out/modules/coast.safetensors",
                 "--out", tmp_path / "other"), "coast.safetensors was made for the base")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens(count=120, **fixed):
    rng = np.random.default_rng(0)
    return [
        {"ids": " ".join(map(str, rng.integers(1, 40, 5))), "label": int(rng.integers(2)),
         "gender": ["0", "1", "x"][rng.integers(3)], **fixed}
        for _ in range(count)
    ]  # fmt: skip


TOKENS = ("--text-field", "ids", "--token-ids", "--attributes", "gender", *QUICK)


@pytest.mark.slow
def test_token_ids_and_unknown_attributes(tmp_path):
    data = write(tmp_path / "ids.jsonl", tokens())
    done(train.debias, "--data", data, *TOKENS, "--out", tmp_path / "out")
    document = running.results(tmp_path / "out")
    assert document["attributes"] == {"gender": ["0", "1"]}  # x is no class
    done(eval.leakage, "--model", tmp_path / "out/core", "--data", data, *TOKENS[:5], "--attack.epochs", 1,
         "--out", tmp_path / "again")  # fmt: skip
    assert running.row(tmp_path / "again", "core")["leakage_gender"] == pytest.approx(
        running.row(tmp_path / "out", "core")["leakage_gender"], abs=1e-6
    )


def test_what_says_the_same_is_dealt_to_the_same_set():
    records = generated(300, 0)
    records = by_content(records + records[:50])
    assert len({record.id for record in records}) == 350
    sets = split_by_content(records, (0.6, 0.2, 0.2), 3)
    texts = {name: {record.text for record in part} for name, part in sets.items()}
    assert sum(map(len, sets.values())) == 350 and not texts["train"] & (texts["valid"] | texts["test"])
    assert abs(len(sets["train"]) - 210) < 60
    shuffled = split_by_content(records[::-1], (0.6, 0.2, 0.2), 3)
    assert {r.id for r in shuffled["test"]} == {r.id for r in sets["test"]}
    with pytest.raises(UserError, match="split is"):
        split_by_content(records, (0.6, 0.2, 0.1), 3)


DATA = ("--data", "ids.jsonl", *TOKENS)
TEXT = ("--data", "ids.jsonl", "--text-field", "ids", "--attributes", "gender", *QUICK)
PRIVATE = ("--core", "{core}", "--dp.epsilon", 3)
REFUSED = {
    "density_0": (("--density", 0), "--density is 0.0; it must be above 0 and at most 1"),
    "density_2": (("--density", 1.5), "--density is 1.5; it must be above 0 and at most 1"),
    "density_of_nothing": ((*QUICK, "--density", 1e-9), "density 1e-09 of 8400 parameters keeps none"),
    "density_nan": (("--density", "nan"), "--density is nan; it must be above 0 and at most 1"),
    "task_density": (("--task-density", "nan"), "--task-density is nan; it must be between 0, for none, and 1"),
    "gate_rate": (("--gate-rate", "nan"), "gate_rate is nan; it must be above 0 and finite"),
    "adversary_rate": (("--adversary-rate", -1), "adversary_rate is -1.0; it must be above 0"),
    "clipping": (("--max-grad-norm", -1), "max_grad_norm is -1.0; it must be at least 0"),
    "attack_rate": (("--attack.learning-rate", 0), "attack learning_rate is 0.0; it must be above 0"),
    "start": (("--gates.start", "nan"), "gates.start is nan; it must be finite"),
    "scale": (("--scale", "inf"), "scale is inf; it must be at least 0"),
    "records": (("--records", 0), "--records is 0; it must be at least 1"),
    "missing": (("--data", "nowhere.jsonl", *TOKENS), "nowhere.jsonl: no such file"),
    "empty": (("--data", "empty.jsonl", *TOKENS), "empty.jsonl: holds no records"),
    "one_value": (("--data", "one.jsonl", *TOKENS), "attribute gender has the one value '0'; two or more"),
    "unknown_only": (("--data", "unknown.jsonl", *TOKENS), "attribute gender has no known value; two or more"),
    "one_value_to_test": ((*DATA, "--valid", "ids.jsonl", "--test", "one.jsonl"),
                          "in the test set attribute gender has the one value '0'"),
    "slash": (("--data", "slash.jsonl", *TOKENS[:3], "--attributes", "a/b"), "attribute a/b cannot name a file"),
    "no_field": (("--data", "ids.jsonl", *TOKENS[:3], "--attributes", "age"), "has no attribute 'age'"),
    "no_label": (("--data", "ids.jsonl", *TOKENS, "--label-field", "class"), "field 'class' is missing"),
    "no_attributes": (("--data", "ids.jsonl", *TOKENS[:2]), "--attributes is missing"),
    "not_ids": (("--data", "words.jsonl", *TOKENS), "is not token ids separated by spaces"),
    "split": ((*DATA, "--split", 0.5, 0.5, 0), "it must be three shares above 0 that add up to 1"),
    "pattern": ((*QUICK, "--differs", "nothing"), "pattern 'nothing' matches no parameter"),
    "no_pattern": ((*QUICK, "--differs", "("), "pattern '(' is not a regular expression"),
    "par_core": (("--regime", "par", "--core", "x"), "--regime par trains the core beside its modules"),
    "no_core": ((*TEXT, "--core", "./a/b/c"), "model directory ./a/b/c does not exist"),
    "core_of_other_classes": ((*TEXT, "--core", "{core}"), "has the label '0'; known are no, yes"),
    "core_without_token_ids": ((*DATA, "--core", "{core}"), "token_ids.json is missing"),
    "private_core": (("--dp.epsilon", 3), "--dp.* makes modules private, not what they are trained for"),
    "private_mmd": ((*PRIVATE, "--removal", "mmd"), "with --dp.* use adversarial or information"),
    "private_balance": ((*PRIVATE, "--balance"), "--balance keeps a record or not for what others say"),
    "private_cyclic": ((*PRIVATE, "--dp.sampler", "cyclic", "--dp.bands", 2), "--dp.sampler cyclic correlates"),
    "private_groups": ((*PRIVATE, "--dp.groups", "modules/.*"), "--dp.groups names what moves"),
    "private_estimator": ((*PRIVATE, "--dp.estimator", "ghost"), "--dp.estimator ghost cannot see sparse differences"),
    "private_batch": ((*QUICK, *PRIVATE, "--batch-size", 500), "the batch of 500 records is larger than the data"),
    "not_private": (("--dp.clip", 1), "--dp.* flags without --dp.epsilon or --dp.noise"),
    "one_set": (("--data", "ids.jsonl", *TOKENS, "--test", "ids.jsonl"), "--valid and --test go together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ids.jsonl", tokens())
    write(tmp_path / "one.jsonl", tokens(gender="0"))
    write(tmp_path / "unknown.jsonl", tokens(gender="x"))
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "slash.jsonl", [row | {"a/b": row["gender"]} for row in tokens()])
    write(tmp_path / "words.jsonl", [row | {"ids": f"{row['ids']} and words"} for row in tokens()])
    flags, message = REFUSED[name]
    flags = [str(flag).format(core=home / "post/core") for flag in flags]
    refused(call(train.debias, *flags, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def refused(outcome, message):
    """Require exit code 2 and one sentence, the last thing said."""
    said = outcome.said.strip().splitlines()
    assert outcome.code == 2 and message in said[-1] and said[-1].startswith("error: ")
    assert "Traceback" not in outcome.said


MODULES = {
    "absent": (lambda file: file.unlink(), "does not exist"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-10]), "is truncated or not a safetensors file"),
    "no_safetensors": (lambda file: file.write_text("hello"), "is truncated or not a safetensors file"),
}


@pytest.mark.parametrize("name", MODULES)
def test_damaged_modules_are_refused(name, home, tmp_path):
    file = Path(shutil.copy(home / "post/modules/coast.safetensors", tmp_path))
    MODULES[name][0](file)
    refused(call(eval.leakage, "--model", home / "post/core", "--modules", file, "--out", tmp_path / "out"),
            f"{file} {MODULES[name][1]}")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_run_is_resumed_with_its_settings_alone(home):
    before = running.files(home / "post")
    refused(call(train.debias, *QUICK, "--density", 0.06, "--export", "--out", home / "post", "--resume"),
            "density was 0.05, now 0.06")  # fmt: skip
    assert running.files(home / "post") == before


def test_a_module_of_another_base_is_refused(home, tmp_path):
    model, params = hub.load(home / "post/core")
    params["score"]["bias"][0] += 1e-6  # one number of the head, which no module touches
    other = hub.save(tmp_path / "other", model, params)
    outcome = call(eval.leakage, "--model", other, "--modules", home / "post/modules/coast.safetensors",
                   "--out", tmp_path / "out")  # fmt: skip
    refused(outcome, "coast.safetensors was made for the base")
    assert not (tmp_path / "out").exists()


def test_overlapping_modules_are_told_with_their_share(home, tmp_path):
    file = home / "post/modules/coast.safetensors"
    shutil.copy(file, tmp_path / "twin.safetensors")
    outcome = call(eval.leakage, "--model", home / "post/core", "--modules", file, tmp_path / "twin.safetensors",
                   "--records", 160, "--attack.epochs", 1, "--out", tmp_path / "out")  # fmt: skip
    assert outcome.code == 0
    assert "modules coast and twin overlap at 100.0% of the smaller one's places, 0% of these" in outcome.said
    assert "modules coast and twin both take out coast" in outcome.said
