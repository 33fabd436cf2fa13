"""Bad input: one sentence that names the culprit, exit code 2, and nothing on disk is touched."""

import json
import shutil
from types import SimpleNamespace

import jax
import pytest
import running

import eval.unlearning
import train.lm
import train.unlearn
from jaxforget import command
from jaxforget.report.run import plain
from jaxforget.unlearning import METHODS

PRESETS = {
    train.lm: train.lm.PRESETS,
    train.unlearn: train.unlearn.PRESETS,
    eval.unlearning: {"default": eval.unlearning.default},
}
FORGET = [f"alpha {word} beta" for word in ("one", "two", "three", "four")]
RETAIN = [f"gamma {word} delta" for word in ("one", "two", "three", "four", "five", "six")]
LONG = "word " * 200


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Good and bad files and models, by name."""
    home = tmp_path_factory.mktemp("inputs")
    write = running.write_jsonl
    model = running.save_model(home / "model")
    bad_json = home / "malformed.jsonl"
    bad_json.write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(1, 7)) + '{"text": "line 7"\n')
    no_field = home / "no_field.jsonl"
    no_field.write_text('{"title": "a", "body": "b"}\n')
    (home / "empty.jsonl").write_text("")

    truncated = home / "truncated"
    shutil.copytree(model, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    unsupported = home / "unsupported"
    shutil.copytree(model, unsupported)
    config = json.loads((unsupported / "config.json").read_text())
    (unsupported / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))
    listed = home / "listed"  # a config.json that is none
    listed.mkdir()
    (listed / "config.json").write_text("[1, 2]")
    return SimpleNamespace(
        home=home, model=model, malformed=bad_json, no_field=no_field, empty=home / "empty.jsonl",
        forget=write(home / "forget.jsonl", FORGET), retain=write(home / "retain.jsonl", RETAIN),
        overlapping=write(home / "overlapping.jsonl", RETAIN + FORGET[:2]),
        long=write(home / "long.jsonl", [LONG, *RETAIN]), missing=home / "missing.jsonl",
        large_tokenizer=running.save_model(home / "large", vocab_size=400), truncated=truncated,
        unsupported=unsupported, wide=running.save_model(home / "wide", width=32), listed=listed,
        encoder=running.save_model(home / "encoder", family="bert", head="masked"),
    )  # fmt: skip


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch, made):
    """Run a command in this process and return the one sentence it is refused with."""
    monkeypatch.chdir(tmp_path)  # where the default --out would be made
    # Set, it keeps the command from moving the compile cache of this process.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def refuse(module, *flags, out="out"):
        before = running.files(tmp_path), running.files(made.home)
        argv = [str(flag) for flag in flags] + (["--out", str(tmp_path / out)] if out else [])
        with pytest.raises(SystemExit) as stop:
            command.main(module.run, PRESETS[module], argv)
        stderr = capsys.readouterr().err
        assert stop.value.code == 2, stderr
        assert (running.files(tmp_path), running.files(made.home)) == before
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
        return stderr

    return refuse


SMOKE = ("--preset", "smoke")
# command, flags ({name} is filled from `made`), what the sentence must hold
CASES = {
    "missing file": (train.lm, "--data {missing}", ["missing.jsonl", "no such file"]),
    "empty file": (train.lm, "--data {empty}", ["empty.jsonl", "no records"]),
    "directory as data": (train.lm, "--data {model}", ["model", "directory", ".jsonl"]),
    "malformed line": (train.lm, "--data {malformed}", ["malformed.jsonl, line 7"]),
    "malformed excluded line": (train.lm, "--data {retain} --exclude {malformed}", ["malformed.jsonl, line 7"]),
    "malformed retain line": (
        train.unlearn, "--forget {forget} --retain {malformed}", ["malformed.jsonl, line 7"]),
    "malformed line to score": (
        eval.unlearning, "--models {model} --forget {malformed}", ["malformed.jsonl, line 7"]),
    "no known field": (train.lm, "--data {no_field}", ["line 1", "'title'", "'body'", "--text-field"]),
    "missing named field": (train.lm, "--data {no_field} --text-field poem", ["'poem'", "'title'", "'body'"]),
    "unknown method": (train.unlearn, "--methods gradient_assent", ["gradient_assent", "gradient_ascent", "all"]),
    "unknown setting": (
        train.unlearn, "--methods ascent_kl_indist --settings ascent_kl_indist.weight=2",
        ["weight", "retain_weight"]),
    "setting of a method that does not run": (
        train.unlearn, "--preset smoke --methods gradient_ascent --settings ascent_kl_indist.retain_weight=3",
        ["ascent_kl_indist", "gradient_ascent"]),
    "malformed setting": (
        train.unlearn, "--methods ascent_kl_indist --settings ascent_kl_indist.retain_weight=much",
        ["retain_weight", "float"]),
    "forget and retain overlap": (
        train.unlearn, "--forget {forget} --retain {overlapping} --methods gradient_ascent",
        ["--forget", "--retain", "share 2 ids", "such as '"]),
    "everything excluded": (train.lm, "--data {retain} --exclude {retain}", ["--exclude", "--data"]),
    "vocabulary mismatch": (
        train.lm, "--data {retain} --model {model} --tokenizer {large_tokenizer}", ["400", "300"]),
    "truncated weights": (train.lm, "--data {retain} --model {truncated}", ["truncated/model.safetensors"]),
    "truncated yardstick": (
        train.unlearn, "--model {model} --retrained {truncated} --forget {forget} --methods gradient_ascent",
        ["truncated/model.safetensors"]),
    "truncated model to score": (
        eval.unlearning, "--models {truncated} --forget {forget}", ["truncated/model.safetensors"]),
    "unsupported family": (train.lm, "--data {retain} --model {unsupported}", ["'bloom'", "llama", "gpt2"]),
    "an encoder to unlearn": (
        train.unlearn, "--model {encoder} --forget {forget} --methods gradient_ascent", ["masked head", "causal"]),
    "an encoder to score": (
        eval.unlearning, "--models {encoder} --forget {forget}", ["masked head", "causal"]),
    "no model directory": (
        train.unlearn, "--forget {forget} --model {home}/none --methods gradient_ascent", ["/none", "does not exist"]),
    "yardstick of another shape": (
        train.unlearn, "--model {model} --retrained {wide} --forget {forget} --methods gradient_ascent",
        ["--retrained", "another architecture"]),
    "general set needed": (
        train.unlearn, "--forget {forget} --retain {retain} --methods ascent_descent_general",
        ["ascent_descent_general", "--general"]),
    "retain set needed": (train.unlearn, "--forget {forget}", ["--retain"]),
    "forget set needed": (train.unlearn, "--retain {retain}", ["--forget"]),
    "yardstick without a model": (
        train.unlearn, "--preset smoke --methods gradient_ascent --retrained {model}", ["--retrained", "--model"]),
    "model and base": (
        train.unlearn, "--model {model} --base {model} --forget {forget} --retain {retain}",
        ["--model", "--base"]),
    "several rates without a target": (
        train.unlearn, "--model {model} --forget {forget} --methods gradient_ascent --learning-rates 1e-3 1e-4",
        ["--learning-rates", "--approximate"]),
    "several rates that never stop": (
        train.unlearn, "--preset smoke --learning-rates 1e-3 1e-4 --stop-at never", ["--learning-rates", "never"]),
    "negative rate among several": (train.unlearn, "--preset smoke --learning-rates 1e-3 -1", ["learning_rate", "-1"]),
    "unknown preset": (train.unlearn, "--preset smok", ["'smok'", "smoke", "default"]),
    "batch size 0": (train.unlearn, "--preset smoke --batch-size 0", ["batch_size is 0", "at least 1"]),
    "batch size 0 of the target": (train.unlearn, "--preset smoke --train.batch-size 0", ["batch_size is 0"]),
    "epochs 0": (train.lm, "--preset smoke --epochs 0", ["epochs is 0", "at least 1"]),
    "negative rate": (train.lm, "--preset smoke --learning-rate -1", ["learning_rate", "-1"]),
    "rate not a number": (train.lm, "--preset smoke --learning-rate nan", ["learning_rate", "nan"]),
    "micro-batch that does not divide": (
        train.lm, "--preset smoke --batch-size 16 --microbatch 5", ["--microbatch 5", "16"]),
    "micro-batch that does not divide the retain rows": (
        train.unlearn, "--preset smoke --methods ascent_kl_indist --settings ascent_kl_indist.retain_ratio=0.5 "
        "--microbatch 16", ["--microbatch 16", "8"]),
    "negative micro-batch": (train.lm, "--preset smoke --microbatch -4", ["microbatch is -4", "at least 0"]),
    "longer than the context": (train.lm, "--preset smoke --max-length 65", ["--max-length", "65", "64"]),
    "no length": (train.lm, "--preset smoke --max-length 0", ["--max-length is 0", "at least 2"]),
    "limit 0": (train.lm, "--data {retain} --limit 0", ["--limit is 0", "at least 1"]),
    "negative limit": (train.lm, "--data {retain} --limit -3", ["--limit is -3", "at least 1"]),
    "seeds 0": (train.unlearn, "--preset smoke --seeds 0", ["--seeds is 0", "at least 1"]),
    "evaluate every 0": (train.unlearn, "--preset smoke --evaluate-every 0", ["--evaluate-every is 0", "at least 1"]),
    "negative evaluate every": (train.unlearn, "--preset smoke --evaluate-every -2", ["--evaluate-every is -2"]),
    "negative checkpoint every": (train.lm, "--preset smoke --checkpoint-every -1", ["--checkpoint-every is -1"]),
    "no curve records": (train.unlearn, "--preset smoke --curve-records 0", ["--curve-records is 0"]),
    "no heads": (train.lm, "--preset smoke --size.heads 0", ["--size.heads is 0"]),
    "width no multiple": (train.lm, "--preset smoke --size.width 33", ["--size.width", "33", "--size.heads"]),
    "tiny vocabulary": (train.lm, "--preset smoke --size.vocab-size 10", ["vocab_size", "10", "259"]),
    "exclude without data": (train.lm, "--preset smoke --exclude {forget}", ["--exclude", "--data"]),
    "no models": (eval.unlearning, "--forget {forget}", ["--models"]),
    "nothing to score": (eval.unlearning, "--models {model}", ["--forget"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_written(name, refused, made):
    module, flags, expected = CASES[name]
    sentence = refused(module, *flags.format(**vars(made)).split())
    for part in expected:
        assert part in sentence


# ------------------------------------------------------------------------------------------------- --out
def test_out_that_is_not_empty(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    sentence = refused(train.lm, *SMOKE)
    assert "--out" in sentence and "not empty" in sentence and "--resume" in sentence
    assert "config.json" in refused(train.lm, *SMOKE, "--resume")


def test_out_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(train.lm, *SMOKE)


def test_out_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot be created" in refused(train.lm, *SMOKE, out="file/out")


@pytest.mark.parametrize("module", [train.lm, train.unlearn])
def test_resume_without_out(module, refused):
    sentence = refused(module, *SMOKE, "--resume", out=None)
    assert "--resume needs --out" in sentence


def begin(tmp_path, module, config):
    """Leave what a run leaves that was killed at once."""
    (tmp_path / "out").mkdir()
    about = {"command": module.__name__, "schema": 1, "config": plain(config)}
    (tmp_path / "out" / "config.json").write_text(json.dumps(about))


def test_resume_with_another_setting(refused, tmp_path):
    begin(tmp_path, train.unlearn, train.unlearn.smoke())
    sentence = refused(train.unlearn, *SMOKE, "--resume", "--train.epochs", 7, "--stop-at", "never")
    assert "train.epochs was 4, now 7" in sentence
    assert "stop_at was 'approximate', now 'never'" in sentence
    assert "learning_rate" not in sentence  # of the same group, but it did not change


def test_resume_of_another_command(refused, tmp_path):
    begin(tmp_path, train.unlearn, train.unlearn.smoke())
    sentence = refused(train.lm, *SMOKE, "--resume")
    assert "train.unlearn" in sentence and "train.lm" in sentence


def test_resume_of_what_is_not_a_run(refused, made, tmp_path):
    shutil.copytree(made.listed, tmp_path / "out")
    assert "not a run's config.json" in refused(train.lm, *SMOKE, "--resume")
    shutil.copy(made.model / "config.json", tmp_path / "out" / "config.json")
    assert "not a run's config.json" in refused(train.lm, *SMOKE, "--resume")


# --------------------------------------------------------------------------- other ways to be told, and not to be
def test_a_misspelt_flag_gets_suggestions(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command.main(train.unlearn.run, train.unlearn.PRESETS, ["--lerning-rate", "1", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_default_preset_fits_any_choice_of_methods(refused, made):
    """Its settings for methods that --methods leaves out are no mistake of the user: what is refused is the model."""
    for method in METHODS:
        sets = ("--forget", made.forget, "--retain", made.retain, "--general", made.long)
        assert "/none does not exist" in refused(train.unlearn, "--methods", method, *sets, "--model", "/none")


def test_a_long_record_is_truncated_and_counted(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    flags = ["--models", made.model, "--forget", made.forget, "--retain", made.long, "--out", tmp_path / "out"]
    command.main(eval.unlearning.run, PRESETS[eval.unlearning], [str(flag) for flag in flags])
    said = capsys.readouterr().err
    assert f"retain: 1 of {1 + len(RETAIN)} records are longer than 32 tokens; truncated" in said


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        ("train.unlearn", ("--methods", "nope"), "unknown method 'nope'"),
        (
            "train.lm",
            ("--preset", "smoke", "--model", "no-such-owner/no-such-model"),
            "no-such-owner/no-such-model",
        ),
        ("eval.unlearning", (), "--models"),
    ],
)
def test_as_a_user_sees_it(module, flags, expected, tmp_path):
    process = running.start(module, *flags, "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert expected in stderr
    assert not (tmp_path / "out").exists()
