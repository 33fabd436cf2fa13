"""train.sisa: interrupted anywhere, on a full disk, given bad input, and what it leaves when all goes well.

What follows a deletion is in test_forget*.py; only the kills at random moments go through both commands here.
"""

import json
import random
import re
import shutil
import time

import jax
import numpy as np
import pages
import pytest
import running
import shards
from shards import IDS, PLAN, assert_same, assert_same_training, call, done, finish_forgetting, only_error, text_of
from test_resume import run_until

import train.forget
import train.sisa
from jaxforget.models import hub
from jaxforget.report.run import Run
from jaxforget.sisa.cost import training_visits
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.plan import epoch_schedule

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes cut short


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shards.write_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def flags(data):
    return (*shards.TRAINING, "--data", data)


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done(train.sisa, *flags, "--out", out)
    return out


@pytest.fixture
def unplotted(monkeypatch):
    """Spare the plots of the reports."""
    monkeypatch.setattr(train.sisa, "figure", lambda draw: "")


# ----------------------------------------------------------------------------------------------- interruptions
BOUNDARIES = {
    "only the settings are there": ("after", "jaxforget.report.run:Run.begin", 1),
    "the initial model is half written": ("after", "jaxforget.models.hub:_write_files", 1),
    "the initial model is written": ("after", "jaxforget.models.hub:save", 1),
    "the ledger is half written": ("after", "jaxforget.sisa.ledger:_values", 5),
    "the ensemble is planned": ("after", "jaxforget.sisa.ledger:Ledger.create", 1),
    "a line of the log is written": ("after", "jaxforget.report.run:Run.log", 2),
    "a slice is trained and not kept": ("before", "jaxforget.sisa.store:save_tree", 1),
    "a checkpoint is written, and not in the ledger": ("after", "jaxforget.sisa.store:save_tree", 1),
    "some of a slice's checkpoints are written": ("after", "jaxforget.sisa.store:save_tree", 5),
    "between slices": ("after", "jaxforget.sisa.ensemble:Ensemble._train_stage", 1),
    "inside a slice": ("after", "jaxforget.training.checkpoints:Checkpoints.save", 1),
    "all slices are trained": ("before", "jaxforget.sisa.store:Store.keep_only", 1),
    "a member is half written": ("after", "jaxforget.models.hub:_write_files", 3),
    "a member is written": ("after", "jaxforget.models.hub:save", 3),
    "before the results": ("before", "jaxforget.report.run:Run.finish", 1),
    "before the page": ("before", "train.sisa:write_page", 1),
}


# Near others, or passed by the test that is interrupted everywhere in turn.
ALIKE = (
    "the initial model is half written", "a line of the log is written", "a slice is trained and not kept",
    "all slices are trained", "a member is written", "before the page",
)  # fmt: skip


@pytest.mark.usefixtures("unplotted")
@shards.cases(BOUNDARIES, slow=ALIKE)
def test_interrupted(name, flags, undisturbed, tmp_path):
    flags = (*flags, "--out", tmp_path / "out")
    with shards.broken(*BOUNDARIES[name], shards.interrupt):
        outcome = call(train.sisa, *flags)
    assert outcome.code == 130 and outcome.said.splitlines()[-1] == "error: interrupted; run again with --resume"
    done(train.sisa, *flags, "--resume")
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDARIES)
def test_killed_at_a_boundary(name, flags, undisturbed, tmp_path):
    flags = (*flags, "--out", tmp_path / "out")
    process = shards.start_broken(BOUNDARIES[name], "train.sisa", *flags)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == -9, stderr
    done(train.sisa, *flags, "--resume")
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.usefixtures("unplotted")
def test_interrupted_everywhere_in_turn(flags, undisturbed, tmp_path):
    """One run, resumed and interrupted again at a later boundary each time."""
    flags = (*flags, "--out", tmp_path / "out", "--resume")
    for boundary in [
        ("after", "jaxforget.models.hub:_write_files", 1),
        ("after", "jaxforget.sisa.ledger:_values", 20),
        ("after", "jaxforget.sisa.store:save_tree", 2),
        ("after", "jaxforget.training.checkpoints:Checkpoints.save", 1),
        ("after", "jaxforget.sisa.store:save_tree", 2),
        ("before", "jaxforget.models.hub:save", 2),
        ("before", "jaxforget.report.run:Run.finish", 1),
    ]:
        with shards.broken(*boundary, shards.interrupt):
            assert call(train.sisa, *flags).code == 130, boundary
    done(train.sisa, *flags)
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.usefixtures("unplotted")
def test_killed_inside_a_long_slice(flags, undisturbed, tmp_path, monkeypatch):
    """The resumed run goes on from the checkpoint inside the slice."""
    out = tmp_path / "out"

    def reached():  # the checkpoint of step 4 is complete, and training has gone on
        steps = [line["step"] for line in running.metrics(out) if line["stage"] == "slice 1"]
        return bool(list((out / "working").glob("*/4"))) and max(steps, default=0) > 4

    assert run_until(reached, "train.sisa", *flags, "--out", out)
    began_at, rewind = [], Run.rewind

    def spy(run, stage, step):
        began_at.append((stage, step))
        rewind(run, stage, step)

    monkeypatch.setattr(Run, "rewind", spy)
    done(train.sisa, *flags, "--out", out, "--resume")
    assert began_at == [("slice 1", 4)]
    assert_same_training(out, undisturbed)


# ------------------------------------------------------------------------------------- kills at random moments
def into_the_work(seconds, *watched):
    """Return a function that says whether so long has passed since one of these paths was made or touched."""

    def stamps():
        return [path.stat().st_mtime_ns if path.exists() else None for path in watched]

    before, began = stamps(), None

    def reached():
        nonlocal began
        if began is None and stamps() != before:
            began = time.monotonic()
        return began is not None and time.monotonic() - began >= seconds

    return reached


def killed_at_random(home, flags, whole, ids, spans, kills) -> None:
    """Kill train.sisa and then train.forget, so often each, at moments in the first spans[i] seconds of their work.

    whole: the undisturbed ensemble before and after the deletion of ids. The first start of train.forget asks for the
    first id, the next for the second one, and so on; further ones resume.
    """
    out, said = home / "out", []
    for _ in range(kills[0]):
        moment = random.uniform(0, spans[0])
        reached = into_the_work(moment, out / "config.json", out / "lock")
        was_killed = run_until(reached, "train.sisa", *flags, "--out", out, "--resume")
        said.append(f"train.sisa {'killed' if was_killed else 'done before'} {moment:.3f} s into its work")
    done(train.sisa, *flags, "--out", out, "--resume")
    assert_same_training(out, whole[0], "; ".join(said))
    for number in range(kills[1]):
        moment, report = random.uniform(0, spans[1]), home / f"report{number}"
        asked = ("--id", ids[number]) if number < len(ids) else ("--resume",)
        reached = into_the_work(moment, report, out / "lock")
        was_killed = run_until(reached, "train.forget", "--ensemble", out, *asked, "--out", report)
        said.append(f"train.forget {' '.join(asked)} {'killed' if was_killed else 'done before'} {moment:.3f} s")
    finish_forgetting(out, ids, home, "; ".join(said))
    assert_same(out, whole[1], "; ".join(said))


def forgotten(ensemble, ids, home):
    """Copy an ensemble and delete the ids from it, undisturbed."""
    shutil.copytree(ensemble, home / "out")
    done(train.forget, "--ensemble", home / "out", "--id", *ids, "--out", home / "report")
    return home / "out"


@pytest.mark.usefixtures("unplotted")
def test_killed_at_random_moments(flags, undisturbed, tmp_path, tmp_path_factory):
    ids = ("record-03", "record-16")
    whole = undisturbed, forgotten(undisturbed, ids, tmp_path_factory.mktemp("forgotten"))
    killed_at_random(tmp_path, flags, whole, ids, spans=(1.5, 0.8), kills=(1, 2))


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
    """Longer slices with many checkpoints; returns flags, both undisturbed ensembles, and how long each work takes."""
    home = tmp_path_factory.mktemp("long")
    flags = (*PLAN, "--epochs", 45, "--checkpoint-every", 5, "--data", data)
    ids, spans = ("record-03", "record-16"), []
    for module, *words, watched in [
        ("train.sisa", *flags, "--out", home / "out", home / "out" / "config.json"),
        ("train.forget", "--ensemble", home / "out", "--id", ids[0], "--out", home / "report", home / "report"),
    ]:
        process = running.start(module, *words)
        reached = into_the_work(0, watched)
        while not reached() and process.poll() is None:
            time.sleep(0.002)
        began = time.monotonic()
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        spans.append(time.monotonic() - began)
        if module == "train.sisa":
            shutil.copytree(home / "out", home / "trained")
    done(train.forget, "--ensemble", home / "out", "--id", ids[1], "--out", home / "second report")
    return flags, (home / "trained", home / "out"), ids, spans


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_killed_at_25_random_moments(attempt, long, tmp_path):
    """Five moments each: two in the training, two in requests, and one when those are resumed."""
    killed_at_random(tmp_path, *long, kills=(2, 3))


@pytest.mark.usefixtures("unplotted")
def test_a_damaged_checkpoint_inside_a_slice(flags, undisturbed, tmp_path):
    """It is refused with one sentence that says what to remove."""
    flags = (*flags, "--out", tmp_path / "out")
    with shards.broken(*BOUNDARIES["inside a slice"], shards.interrupt):
        assert call(train.sisa, *flags).code == 130
    working = tmp_path / "out" / "working"
    for path in working.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:100])
    outcome = call(train.sisa, *flags, "--resume")
    assert outcome.code == 1
    (sentence,) = outcome.said.splitlines()
    assert sentence.startswith("error: slice 1, shards 0, 1, 2: ")
    removed = re.search(r"(\S+) cannot be read; remove it", sentence)[1]
    shutil.rmtree(removed)
    done(train.sisa, *flags, "--resume")
    assert_same_training(tmp_path / "out", undisturbed)


# --------------------------------------------------------------------------------------------------- full disks
# function in which the disk is full, at which call, from which size of file on; what the sentence says
FULL = {
    "initial model": ("jaxforget.models.hub:_write_files", 1, 16, ["/base cannot be written", "File too large"]),
    "ledger": ("jaxforget.sisa.ledger:Ledger.create", 1, 16, ["ledger.sqlite cannot be written"]),
    "first checkpoint": ("jaxforget.sisa.store:save_tree", 1, 16, ["shard 0, slice 0", "File too large"]),
    "last checkpoint": ("jaxforget.sisa.store:save_tree", 6, 16, ["shard 2, slice 1", "File too large"]),
    "a stage in the ledger": (
        "jaxforget.sisa.ledger:Ledger.add_stages", 1, 16, ["ledger.sqlite cannot be written", "is unchanged"]),
    "checkpoint inside a slice": (
        "jaxforget.sisa.ensemble:fit", 2, 20_000, ["slice 1, shards 0, 1, 2", "/working/", "File too large"]),
    "log": ("jaxforget.report.run:Run.log", 3, 16, ["metrics.jsonl cannot be written (File too large)"]),
    "log, anew": ("jaxforget.report.run:Run.rewind", 2, 16, ["metrics.jsonl cannot be written (File too large)"]),
    "weights of a member": (
        "jaxforget.models.hub:_write_files", 3, 2000, ["members/shard-1 cannot be written", "File too large"]),
    "results": ("jaxforget.report.run:Run.finish", 1, 16, ["results.json cannot be written"]),
    "page": ("train.sisa:write_page", 1, 16, ["report.html cannot be written"]),
}  # fmt: skip


FULL_ALIKE = ("last checkpoint", "a stage in the ledger", "log", "page")  # as those of test_forget_interrupted.py


@pytest.mark.usefixtures("unplotted")
@shards.cases(FULL, slow=FULL_ALIKE)
def test_full_disk(name, flags, undisturbed, tmp_path):
    *where, expected = FULL[name]
    flags = (*flags, "--out", tmp_path / "out")
    with shards.full_disk(*where):
        sentence = only_error(call(train.sisa, *flags), 1)
    for part in expected:
        assert part in sentence
    done(train.sisa, *flags, "--resume")
    assert_same_training(tmp_path / "out", undisturbed)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_full_disk_as_a_user_sees_it(flags, undisturbed, tmp_path):
    """No file may be larger than 60 kB, which only checkpoints inside a slice are: they hold all models."""
    code = f"import resource, shards; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); {shards.RUN}"
    process = shards.start(code, "train.sisa", *flags, "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and stdout == "", stderr
    assert stderr.splitlines()[-1].startswith("error: slice 1, shards 0, 1, 2: ") and "Traceback" not in stderr
    done(train.sisa, *flags, "--out", tmp_path / "out", "--resume")
    assert_same_training(tmp_path / "out", undisturbed)


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Files to train on, by name."""
    home = tmp_path_factory.mktemp("inputs")
    lines = [{"id": one, "text": text_of(one), "risk": i / 100, "label": "ab"[i % 2]} for i, one in enumerate(IDS)]

    def write(name, **changed):
        path = home / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line | changed) + "\n" for line in lines))
        return path

    model = running.save_model(home / "model")
    return {
        "home": home, "data": data, "good": write("good"), "words": write("words", risk="high"),
        "certain": write("certain", risk=2), "never": write("never", risk=0),
        "one_class": write("one_class", label="a"), "none": home / "none.jsonl", "model": model,
    }  # fmt: skip


@pytest.fixture
def refused(tmp_path, monkeypatch, made):
    """Run train.sisa in this process and return the one sentence it is refused with."""
    monkeypatch.chdir(tmp_path)  # where the default --out would be made

    def refuse(*flags, out="out"):
        before = running.files(tmp_path), running.files(made["home"])
        sentence = only_error(call(train.sisa, *PLAN, *flags, *(("--out", tmp_path / out) if out else ())), 2)
        assert (running.files(tmp_path), running.files(made["home"])) == before
        return sentence

    return refuse


CASES = {
    "more shards than records": ("--data {data} --shards 25", ["--shards 25", "24"]),
    "more slices than a shard holds": ("--data {data} --slices 9", ["--slices 9", "at most 8"]),
    "too few epochs for the slices": (
        "--data {data} --slices 4 --epochs 2", ["--epochs 2", "--slices 4", "0 epochs", "at least 3"]),
    "no shards": ("--data {data} --shards 0", ["--shards is 0", "at least 1"]),
    "no slices": ("--data {data} --slices 0", ["--slices is 0", "at least 1"]),
    "no epochs": ("--data {data} --epochs 0", ["epochs is 0", "at least 1"]),
    "--data twice": ("--data {data} --data {good}", ["--data is given twice"]),
    "negative seed": ("--data {data} --seed -1", ["--seed is -1"]),
    "negative width": ("--data {data} --width -1", ["--width is -1"]),
    "negative checkpoint every": ("--data {data} --checkpoint-every -1", ["--checkpoint-every is -1"]),
    "micro-batch that does not divide": ("--data {data} --batch-size 16 --microbatch 5", ["--microbatch 5", "16"]),
    "packed": ("--data {data} --text-mode pack", ["--text-mode pack", "truncate"]),
    "no such column of shards": ("--data {data} --shard-field city", ["'record-00'", "'city'"]),
    "no such column of probabilities": ("--data {data} --deletion-field risk", ["'record-00'", "'risk'"]),
    "probabilities in words": ("--data {words} --deletion-field risk", ["--deletion-field risk", "'high'"]),
    "probability above 1": ("--data {certain} --deletion-field risk", ["record-00", "2", "0 to 1"]),
    "probabilities all 0": ("--data {never} --deletion-field risk", ["every deletion probability is 0"]),
    "shards by two columns": (
        "--data {good} --deletion-field risk --shard-field label", ["--shard-field", "--deletion-field"]),
    "a shard smaller than the slices": ("--data {good} --shard-field risk", ["'0.0' has 1 records", "--slices 2"]),
    "adapters without a base": ("--data {data} --lora.rank 2", ["--lora.rank", "--model"]),
    "an id in two files": ("--data {data} {good}", ["two records", "'record-00'"]),
    "an id in a file given twice": ("--data {data} {data}", ["two records", "'record-00'"]),
    "no such file": ("--data {none}", ["none.jsonl", "no such file"]),
    "no such file to score": ("--data {data} --evaluate {none}", ["none.jsonl", "no such file"]),
    "nothing to train on, but to score": ("--evaluate {data}", ["--evaluate", "--data"]),
    "classes of the generated corpus": ("--task classification", ["--task classification", "--data"]),
    "no labels": ("--data {data} --task classification", ["'label'", "line 1"]),
    "one class": ("--data {one_class} --task classification", ["'a'", "two or more"]),
    "trainable without a match": ("--data {data} --trainable nothing/.*", ["nothing/.*"]),
    "questions needed": ("--data {data} --task seq2seq", ["record-0", "plain text"]),
    "no such model": ("--data {data} --model {home}/nowhere", ["/nowhere does not exist"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_written(name, refused, made):
    flags, expected = CASES[name]
    sentence = refused(*flags.format(**made).split())
    for part in expected:
        assert part in sentence


@pytest.mark.usefixtures("unplotted")
def test_out_and_resume(refused, data, flags, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty; use --resume" in refused("--data", data)
    assert "no config.json to resume from" in refused("--data", data, "--resume")
    assert "--resume needs --out" in refused("--data", data, "--resume", out=None)
    with shards.broken("after", "jaxforget.sisa.ledger:Ledger.create", 1, shards.interrupt):
        call(train.sisa, *flags, "--out", tmp_path / "begun")
    rest = shards.TRAINING[len(PLAN) :]
    sentence = refused("--data", data, *rest, "--resume", "--slices", 3, "--learning-rate", 1, out="begun")
    assert "slices was 2, now 3" in sentence and "train.learning_rate was 0.003, now 1.0" in sentence
    assert "is not empty; use --resume" in refused("--data", data, *rest, out="begun")


@pytest.mark.usefixtures("unplotted")
def test_killed_before_the_settings_are_there(flags, undisturbed, tmp_path):
    """What a kill in the middle of the first write leaves is no reason to refuse the directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".config.json.4711").write_text('{"comm')
    done(train.sisa, *flags, "--out", tmp_path / "out", "--resume")
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_damaged_ledger(flags, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "out" / "ledger.sqlite").write_bytes(b"no database " * 1000)
    outcome = call(train.sisa, *flags, "--out", tmp_path / "out", "--resume")
    assert outcome.code == 1 and outcome.said.startswith("error: ") and "ledger.sqlite cannot be read" in outcome.said


# ----------------------------------------------------------------------------------------- what is left behind
@pytest.fixture(scope="module")
def scored(made, tmp_path_factory):
    """A run with a set to score, and records of unequal probability."""
    out = tmp_path_factory.mktemp("scored") / "out"
    flags = ("--data", made["good"], "--evaluate", made["good"], "--deletion-field", "risk", "--weights", "size")
    outcome = done(train.sisa, *PLAN, *flags, "--epochs", 3, "--out", out)
    return out, outcome


def test_config(scored):
    out, _ = scored
    about = json.loads((out / "config.json").read_text())
    assert about["command"] == "train.sisa" and about["schema"] == 1 and about["device"]
    assert {"python", "jax", "flax", "optax", "numpy"} <= about["versions"].keys()
    assert about["config"]["shards"] == 3 and about["config"]["size"]["width"] == 16
    assert about["config"]["text"]["prompt_template"]  # defaults are written out


def test_results(scored):
    out, outcome = scored
    document = running.results(out)
    assert document["command"] == "train.sisa" and document["seconds"] > 0
    assert document["config"] == json.loads((out / "config.json").read_text())["config"]
    names = [row["name"] for row in document["results"]]
    assert names == ["training", *(f"{who}: good.jsonl" for who in (
        "member 0", "member 1", "member 2", "mean of members", "ensemble, majority", "ensemble, mean_probability",
        "ensemble, mean_logits"))]  # fmt: skip
    for row in document["results"]:
        assert all(value is None or isinstance(value, (int, float, str, list)) for value in row.values())
    for row in document["results"][1:]:
        assert row["accuracy"] >= 0 and (row["nll"] is None) == ("majority" in row["name"])
    count_SR, training = np.asarray(document["examples_by_shard_and_slice"]), document["results"][0]
    assert training["examples"] == count_SR.sum() == len(IDS)
    assert training["epochs_by_slice"] == list(epoch_schedule(3, 2))
    assert training["examples_visited"] == training_visits(count_SR, epoch_schedule(3, 2))
    assert all(name in outcome.printed for name in names[1:])


def test_metrics(scored):
    out, _ = scored
    lines = running.metrics(out)
    count_SR = np.asarray(running.results(out)["examples_by_shard_and_slice"])
    for stage, epochs in enumerate(epoch_schedule(3, 2)):
        mine = [line for line in lines if line["stage"] == f"slice {stage}"]
        steps_K = [epochs * -(-count // 4) for count in count_SR[:, : stage + 1].sum(axis=1)]
        assert [line["step"] for line in mine] == list(range(1, max(steps_K) + 1))  # every step once, in order
        for shard, steps in enumerate(steps_K):  # null for members that are done
            assert [line["loss"][shard] is not None for line in mine] == [step < steps for step in range(len(mine))]
            assert [line["grad_norm"][shard] is not None for line in mine] == [s < steps for s in range(len(mine))]


def test_the_page_needs_no_network(scored):
    page = (scored[0] / "report.html").read_text()
    assert "<svg" in page and "<table" in page
    pages.check(page)
    for row in running.results(scored[0])["results"][1:]:
        assert row["name"] in page


def test_nothing_is_left_over(scored):
    assert {path.name for path in scored[0].iterdir()} == {
        "base", "config.json", "ledger.sqlite", "lock", "members", "metrics.jsonl", "report.html", "results.json",
        "stages",
    }  # fmt: skip
    assert not [path for path in running.files(scored[0]) if "/." in path or "tmp" in path]


def test_members_are_hugging_face_directories(scored):
    tokens_BT = jax.random.randint(jax.random.key(0), (2, 16), 0, 300)
    with Ensemble(scored[0]) as ensemble:
        for shard in range(3):
            model, params = hub.load(scored[0] / "members" / f"shard-{shard}")
            model = ensemble.recipe.compute.apply(model)  # in the same order of operations
            ours = ensemble.model.logits(ensemble.params(shard), tokens_BT)
            np.testing.assert_array_equal(model.logits(params, tokens_BT), ours)
            tokenizer = scored[0] / "members" / f"shard-{shard}" / "tokenizer.json"
            assert tokenizer.read_bytes() == (scored[0] / "base" / "tokenizer.json").read_bytes()
    weights = {(scored[0] / "members" / f"shard-{shard}" / "model.safetensors").read_bytes() for shard in range(3)}
    assert len(weights) == 3


def test_likely_records_lie_in_small_shards_and_late_slices(scored):
    """Probabilities rise with the number of the record."""
    where = shards.places(scored[0])
    order = [where[identity] for identity in IDS]
    assert order == sorted(order)  # shard after shard, slice after slice
    sizes = [sum(shard == k for shard, _ in order) for k in range(3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]


def test_a_shard_for_each_value_of_a_column(made, tmp_path):
    flags = ("--data", made["good"], "--shard-field", "label", "--out", tmp_path / "out")
    with shards.broken("after", "jaxforget.sisa.ledger:Ledger.create", 1, shards.interrupt):  # the plan is enough
        outcome = call(train.sisa, *PLAN, *flags)
    assert "shards: 0 is a, 1 is b" in outcome.said
    where = shards.places(tmp_path / "out")
    assert {identity: shard for identity, (shard, _) in where.items()} == {one: i % 2 for i, one in enumerate(IDS)}
    assert {cut for _, cut in where.values()} == {0, 1}


@pytest.mark.slow  # for its other programs
def test_without_export_and_in_narrow_programs(data, undisturbed, flags, tmp_path):
    """One model in a program at a time: other settings, so other keys, and the same bits."""
    done(train.sisa, *flags, "--no-export", "--width", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "members").exists() or not list((tmp_path / "out" / "members").iterdir())
    ours, theirs = (
        {(stage["shard"], stage["stage"]): stage["digest"] for stage in shards.state(directory).stages.values()}
        for directory in (tmp_path / "out", undisturbed)
    )
    assert ours == theirs
    assert {line["stage"] for line in running.metrics(tmp_path / "out")} == {
        f"slice {stage} shards [{shard}]" for stage in range(2) for shard in range(3)
    }


@pytest.mark.usefixtures("unplotted")
def test_resuming_a_finished_run_changes_nothing(undisturbed, flags, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    with open(tmp_path / "out" / "metrics.jsonl", "a") as log:
        log.write('{"stage": "sli')  # what a kill in the middle of a line leaves
    done(train.sisa, *flags, "--out", tmp_path / "out", "--resume")
    assert running.metrics(tmp_path / "out") == running.metrics(undisturbed)
    shutil.copyfile(undisturbed / "metrics.jsonl", tmp_path / "out" / "metrics.jsonl")
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_the_smoke_preset(tmp_path):
    """The generated corpus, with the held-out people to score on."""
    done(train.sisa, "--preset", "smoke", *shards.SIZE[2:], "--epochs", 1, "--slices", 1, "--out", tmp_path / "out")
    names = [row["name"] for row in running.results(tmp_path / "out")["results"]]
    assert "member 2: held-out people" in names and "ensemble, mean_logits: held-out people" in names
