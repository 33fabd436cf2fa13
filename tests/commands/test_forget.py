"""train.forget: bad input, odd input, duplicates, and what a deletion leaves behind: no trace, and a report."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pages
import pytest
import running
import shards
from shards import IDS, PLAN, assert_same, call, done, flip, only_error, text_of

import train.forget
import train.sisa
from jaxforget.data.text import TextConfig
from jaxforget.models import hub
from jaxforget.report import page
from jaxforget.sisa.cost import deletion_visits, training_visits
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.ledger import Ledger, id_hash
from jaxforget.sisa.plan import epoch_schedule

EPOCHS = epoch_schedule(6, 2)  # of shards.TRAINING
pytest_plugins = ("forgetting",)


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def refused(ensemble, tmp_path, monkeypatch):
    """Run train.forget and return the one sentence it is refused with."""
    monkeypatch.chdir(tmp_path)  # where the default --out would be made

    def refuse(*flags, out="out"):
        before = running.files(tmp_path)
        sentence = only_error(call(train.forget, *flags, *(("--out", tmp_path / out) if out else ())), 2)
        assert running.files(tmp_path) == before
        return sentence

    return refuse


@pytest.fixture
def files(tmp_path, ids):
    """Files of ids, by name."""
    home = tmp_path / "files"
    home.mkdir()
    (home / "empty.txt").write_text("\n \n")
    (home / "latin.txt").write_bytes("récord\n".encode("latin-1"))
    (home / "good.txt").write_text(f"{ids[0]}\n\n  {ids[1]}  \n{ids[0]}\n")
    (home / "unknown.txt").write_text(f"{ids[0]}\nnobody\n")
    (home / "empty.jsonl").write_text("")
    (home / "cut.jsonl").write_text('{"id": "record-01", "text": "a"}\n{"id": "rec')
    (home / "untold.jsonl").write_text('{"id": "record-01"}\n')
    shards.write_data(home / "good.jsonl", ids)
    return home


REFUSED = {
    "nothing given": ("", ["--ensemble is missing"]),
    "nothing to do": ("--ensemble {e}", ["nothing to do", "--id", "--status"]),
    "no such directory": ("--ensemble {e}/none --status", ["/none is not an ensemble", "train.sisa"]),
    "no ensemble": ("--ensemble {e}/members --id record-01", ["members is not an ensemble", "ledger.sqlite"]),
    "unknown ids": (
        "--ensemble {e} --id record-01 nobody nothing", ["2 of 3 ids", "nothing was done", "nobody", "nothing"]),
    "unknown ids in a file": ("--ensemble {e} --ids {f}/unknown.txt", ["1 of 2 ids", "nobody"]),
    "--id twice": ("--ensemble {e} --id record-01 --id record-02", ["--id is given twice"]),
    "no such file": ("--ensemble {e} --ids {f}/none.txt", ["none.txt", "No such file"]),
    "no such data file": ("--ensemble {e} --ids {f}/none.jsonl", ["none.jsonl", "no such file"]),
    "a directory": ("--ensemble {e} --ids {e}", ["is a directory"]),
    "empty file": ("--ensemble {e} --ids {f}/empty.txt", ["empty.txt", "holds no ids"]),
    "empty data file": ("--ensemble {e} --ids {f}/empty.jsonl", ["empty.jsonl", "no records"]),
    "not UTF-8": ("--ensemble {e} --ids {f}/latin.txt", ["latin.txt", "cannot be read as text"]),
    "a data file that is cut": ("--ensemble {e} --ids {f}/cut.jsonl", ["cut.jsonl, line 2"]),
    "a data file without text": ("--ensemble {e} --ids {f}/untold.jsonl", ["untold.jsonl, line 1", "--text-field"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_and_nothing_written(name, refused, ensemble, files):
    flags, expected = REFUSED[name]
    sentence = refused(*flags.format(e=ensemble, f=files).split())
    for part in expected:
        assert part in sentence


def test_deleting_everything_is_refused(refused, forget, ensemble):
    assert "would leave no record" in refused("--ensemble", ensemble, "--id", *IDS)
    with shards.broken("after", "jaxforget.sisa.ledger:Ledger.receive", 1, shards.interrupt):
        assert forget("--id", *IDS[1:]).code == 130
    assert "would leave no record" in refused("--ensemble", ensemble, "--id", IDS[0])  # with those that wait


def test_out_that_is_not_empty(refused, ensemble, tmp_path, ids):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for flags in (["--id", ids[0]], ["--resume"]):
        sentence = refused("--ensemble", ensemble, *flags)
        assert sentence.endswith("/out is not empty; choose another directory")


def test_what_the_ensemble_starts_from_has_changed(refused, ensemble, ids):
    """Settings and initial model determine the parameters, so a deletion by others would not be exact."""
    request = ("--ensemble", ensemble, "--id", ids[0])
    config = (ensemble / "config.json").read_text()
    about = json.loads(config)
    for name, value in (("seed", 7), ("train", about["config"]["train"] | {"learning_rate": 1.0})):
        (ensemble / "config.json").write_text(json.dumps(about | {"config": about["config"] | {name: value}}))
        assert f"config.json has changed since training ({name})" in refused(*request)
    for content in ("", "[1, 2]", '{"config": 3}'):
        (ensemble / "config.json").write_text(content)
        assert "config.json cannot be read" in refused(*request)
    (ensemble / "config.json").unlink()
    assert "config.json cannot be read" in refused(*request)
    (ensemble / "config.json").write_text(config)

    weights = (ensemble / "base" / "model.safetensors").read_bytes()
    flip(ensemble / "base" / "model.safetensors")
    assert "base has changed since training" in refused(*request)
    (ensemble / "base" / "model.safetensors").write_bytes(weights)
    (ensemble / "base" / "more.json").write_text("{}")
    assert "base has changed since training" in refused(*request)
    shutil.rmtree(ensemble / "base")
    assert "base has changed since training" in refused(*request)


def test_moved_ensembles_work(trained, ids, tmp_path, undisturbed):
    """No file of an ensemble holds where it lies, but for --out in its settings, which is not compared."""
    shutil.copytree(trained, tmp_path / "elsewhere" / "moved")
    flags = ("--ensemble", tmp_path / "elsewhere" / "moved", "--id", *ids)
    assert done(train.forget, *flags, "--out", tmp_path / "report")
    assert_same(tmp_path / "elsewhere" / "moved", undisturbed.out)


# --------------------------------------------------------------------------------------- what is fine and looks odd
def test_ids_from_files(ensemble, forget, files, ids, undisturbed, trained):
    outcome = forget("--ids", files / "good.txt")
    assert outcome.code == 0 and "request 1: 2 records, accepted" in outcome.said  # one of them was there twice
    assert_same(ensemble, undisturbed.out)
    shutil.rmtree(ensemble)
    shutil.copytree(trained, ensemble)
    outcome = forget("--ids", files / "good.jsonl", "--id", ids[0], ids[0])
    assert outcome.code == 0 and "request 1: 2 records, accepted" in outcome.said
    assert_same(ensemble, undisturbed.out)


def test_all_ids_of_a_file_count(files, ids):
    """--limit of the training is about the training's files."""
    config = train.forget.Config(ids=files / "good.jsonl")
    text = TextConfig(id_field="id", limit=1)
    assert train.forget.read_ids(config, SimpleNamespace(recipe=SimpleNamespace(text=text))) == list(ids)


def test_an_id_that_is_deleted(ensemble, forget, ids, late):
    assert forget("--id", ids[1]).code == 0
    before = running.files(ensemble)
    outcome = forget("--id", ids[1])
    assert outcome.code == 0 and f"already deleted: {ids[1]} (request 1)" in outcome.said
    assert running.files(ensemble) == before
    assert running.row(outcome.report, "this run")["already_deleted"] == 1
    assert not running.results(outcome.report)["receipts"]
    assert_same(ensemble, late)


def test_an_emptied_shard(ensemble, flags, forget, ids):
    where = shards.places(ensemble)
    outcome = forget("--id", *(one for one in IDS if where[one][0] == 1), "--verify")
    assert outcome.code == 0 and "4 of 4 stages equal training from scratch, bit for bit" in outcome.said
    assert running.row(outcome.report, "request 1")["note"] == "shard 1 is empty and has no vote"
    (receipt,) = running.results(outcome.report)["receipts"]
    assert receipt["shards_emptied"] == [1] and receipt["stages_retrained"] == receipt["examples_revisited"] == 0
    assert all(change["before"] and change["after"] is None for change in receipt["stages"])
    assert sorted(path.name for path in (ensemble / "members").iterdir()) == ["shard-0", "shard-2"]
    outcome = forget("--id", ids[0], "--verify")
    assert outcome.code == 0 and "4 of 4 stages equal" in outcome.said
    assert "15 examples in 2 of 3 shards; 0 stages are missing" in forget("--status").said
    shards.assert_forgotten(ensemble, [ids[0], *(one for one in IDS if where[one][0] == 1)])


def test_status_changes_nothing(ensemble, forget, ids):
    def status(*parts):
        before = running.files(ensemble.parent)
        outcome = forget("--status")
        assert outcome.code == 0 and running.files(ensemble.parent) == before
        assert all(part in outcome.printed + outcome.said for part in parts), outcome
        return outcome.said

    assert "finish with" not in status("24 examples in 3 of 3 shards; 0 stages are missing")
    with shards.broken("after", shards.ADVANCE, 1, shards.interrupt):
        forget("--id", ids[0])
    status("request 1", "planned", f"finish with: python -m train.forget --ensemble {ensemble} --resume")
    forget("--resume")
    assert "finish with" not in status("request 1", "committed", "23 examples in 3 of 3 shards")


def test_nothing_to_resume(ensemble, forget, trained):
    outcome = forget("--resume")
    assert outcome.code == 0 and [row["name"] for row in running.results(outcome.report)["results"]] == ["this run"]
    assert_same(ensemble, trained)


# ----------------------------------------------------------------------------------------------- duplicates
@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """An ensemble with one record three times: twice the same, once in other signs."""
    home = tmp_path_factory.mktemp("twins")
    rows = [{"id": one, "text": text_of(one)} for one in IDS[:21]]
    text = text_of("said often")
    rows += [{"id": "once", "text": text}, {"id": "again", "text": text}, {"id": "loud", "text": text.upper() + "!"}]
    data = home / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done(train.sisa, *shards.TRAINING, "--data", data, "--out", home / "out")
    return home / "out"


def test_duplicates_are_told(twins, tmp_path):
    shutil.copytree(twins, tmp_path / "ensemble")
    outcome = done(train.forget, "--ensemble", tmp_path / "ensemble", "--id", "once", "--out", tmp_path / "report")
    assert "2 other records say the same and stay in the ensemble" in outcome.said
    assert re.search(r"again \(shard \d, exact\)", outcome.said)
    assert re.search(r"loud \(shard \d, normalised\)", outcome.said)
    total = running.row(tmp_path / "report", "this run")
    assert (total["duplicates_left_exact"], total["duplicates_left_normalised"]) == (1, 1)
    assert running.row(tmp_path / "report", "request 1")["records"] == 1
    with Ledger(tmp_path / "ensemble") as ledger:
        assert ledger.where(["again", "loud", "once"]).keys() == {"again", "loud"}


def test_duplicates_are_deleted_too(twins, tmp_path):
    shutil.copytree(twins, tmp_path / "ensemble")
    flags = ("--id", "loud", "--with-duplicates", "--out", tmp_path / "report")
    outcome = done(train.forget, "--ensemble", tmp_path / "ensemble", *flags)
    assert "request 1: 3 records, accepted" in outcome.said and "say the same" not in outcome.said
    assert running.row(tmp_path / "report", "this run")["duplicates_left_exact"] == 0
    everything = b"".join(content or b"" for content in running.files(tmp_path / "ensemble").values())
    for word in text_of("said often").split():
        assert word.encode() not in everything and word.upper().encode() not in everything


# ------------------------------------------------------------------------------------------- what is left behind
def test_report(undisturbed, ids, trained):
    report = undisturbed.report
    document, about = running.results(report), json.loads((report / "config.json").read_text())
    assert document["command"] == about["command"] == "train.forget" and document["config"] == about["config"]
    assert document["schema"] == 1 and about["versions"] and about["device"]
    assert {path.name for path in report.iterdir()} == {"config.json", "metrics.jsonl", "results.json", "report.html"}
    request, total = document["results"]
    assert request["name"] == "request 1" and request["state"] == "committed" and total["name"] == "this run"
    assert (request["records"], request["shards"], request["stages_retrained"]) == (2, 2, 3)
    where = shards.places(trained)
    shard_N, slice_N = np.asarray([where[one] for one in IDS]).T
    deleted_N = np.asarray([one in ids for one in IDS])
    assert request["examples_revisited"] == deletion_visits(shard_N, slice_N, deleted_N, EPOCHS)
    count_SR = np.zeros((3, 2), int)
    np.add.at(count_SR, (shard_N[~deleted_N], slice_N[~deleted_N]), 1)
    full = training_visits(count_SR, EPOCHS)
    assert request["share_of_retraining"] == pytest.approx(request["examples_revisited"] / full)
    for name in ("request 1", "committed", "this run"):
        assert name in undisturbed.outcome.printed


def test_receipt(undisturbed, ids, trained):
    (receipt,) = running.results(undisturbed.report)["receipts"]
    with Ledger(undisturbed.out) as ledger, Ledger(trained) as before:
        (request,) = ledger.requests()
        assert request["receipt"] == receipt and request["ids"] == []
        was, now = before.stages(), ledger.stages()
    assert receipt["ids_sha256"] == sorted(map(id_hash, ids))
    assert receipt["received"] <= receipt["retrained"] <= receipt["committed"]
    places = {(stage["shard"], stage["slice"]): stage for stage in receipt["stages"]}
    assert places.keys() == {(0, 0), (0, 1), (2, 1)}

    def digests(stages):
        return {(stage["shard"], stage["stage"]): stage["digest"] for stage in stages.values()}

    for place, stage in places.items():
        assert stage["before"] == digests(was)[place] != stage["after"] == digests(now)[place]
    assert receipt["shards"] == [0, 2] and receipt["shards_emptied"] == [] and receipt["batch"] == [1]
    assert receipt["versions"] and receipt["device"] and receipt["config_sha256"]


def test_the_report_holds_no_trace(undisturbed, ids):
    shards.assert_forgotten(undisturbed.report, ids)
    shards.assert_forgotten(undisturbed.out, ids)


def test_a_page_that_tells_its_command_does_not_tell_ids(forget, ids, monkeypatch):
    """As where the command is a process of its own."""
    monkeypatch.setattr(page, "program", lambda: "train.forget")
    monkeypatch.setattr(sys, "argv", ["train.forget", "--id", *ids])
    assert ids[0] in page._command_line()
    outcome = forget("--id", *ids)
    assert outcome.code == 0, outcome.said
    shards.assert_forgotten(outcome.report, ids)


def test_the_page_needs_no_network(undisturbed):
    written = (undisturbed.report / "report.html").read_text()
    assert "<table" in written and "request 1" in written
    pages.check(written)


def test_metrics(undisturbed):
    """Only the shards concerned have losses, for the steps that they have."""
    lines = running.metrics(undisturbed.report)
    assert [(line["stage"], line["step"]) for line in lines] == [
        (f"slice {stage}", step) for stage, steps in ((0, 4), (1, 8)) for step in range(1, steps + 1)
    ]
    for line in lines:
        assert [x is not None for x in line["loss"]] == [True, False, line["stage"] == "slice 1"]


def test_verify_page(ensemble, forget, ids):
    outcome = forget("--id", ids[0], "--verify")
    assert outcome.code == 0 and "6 of 6 stages equal training from scratch, bit for bit" in outcome.said
    assert running.row(outcome.report, "this run")["stages_verified"] == 6
    page = (outcome.report / "report.html").read_text()
    with Ledger(ensemble) as ledger:
        for stage in ledger.stages().values():
            assert page.count(stage["digest"][:16]) == 2  # as served and from scratch
    assert "shard 2, slice 1" in page and "Verification" in page
    pages.check(page)


# -------------------------------------------------------------------------------------------- other ensembles
def train_forget_verify(tmp_path, *flags):
    """Train, delete a record of every shard with --verify, and require the members to be the ensemble's."""
    out = tmp_path / "out"
    done(train.sisa, *PLAN, *flags, "--epochs", 3, "--out", out)
    where = shards.places(out)
    ids = [next(one for one in IDS if where[one] == place) for place in [(0, 0), (1, 1), (2, 0)]]
    outcome = done(train.forget, "--ensemble", out, "--id", *ids, "--verify", "--out", tmp_path / "report")
    assert "6 of 6 stages equal training from scratch, bit for bit" in outcome.said
    shards.assert_forgotten(out, ids)
    with Ensemble(out) as opened:
        for shard in range(3):
            _, exported = hub.load(out / "members" / f"shard-{shard}")
            jax.tree.map(np.testing.assert_array_equal, exported, opened.params(shard))
    return out


def test_adapters(tmp_path):
    """With LoRA a stage is its adapters alone, and members are merged."""
    data, model = shards.write_data(tmp_path / "data.jsonl"), running.save_model(tmp_path / "model")
    out = train_forget_verify(tmp_path, "--data", data, "--model", model, "--lora.rank", 2)
    size = sum(path.stat().st_size for path in (out / "stages").rglob("*") if "/d/" in str(path))
    assert size / 6 < (out / "base" / "model.safetensors").stat().st_size / 2


@pytest.mark.slow  # for its programs
def test_classes(tmp_path):
    rows = [{"id": one, "text": text_of(one), "label": ("no", "yes")[i % 2]} for i, one in enumerate(IDS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = running.save_model(tmp_path / "model", family="distilbert", head="masked")
    out = train_forget_verify(
        tmp_path, "--data", data, "--model", model, "--task", "classification", "--evaluate", data
    )
    votes = {row["name"]: row for row in running.results(out)["results"] if row["name"] != "training"}
    assert all(0 <= row["macro_f1"] <= 100 and 0 <= row["accuracy"] <= 100 for row in votes.values())
    assert votes["ensemble, majority: data.jsonl"]["nll"] is None
    assert hub.load(out / "members" / "shard-0")[0].config.labels == ("no", "yes")


@pytest.mark.slow
@pytest.mark.parametrize("task, family", [("masked", "bert"), ("seq2seq", "t5")])
def test_other_tasks(task, family, tmp_path):
    rows = [{"id": one, "question": f"Who is {i}?", "answer": text_of(one)} for i, one in enumerate(IDS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_forget_verify(tmp_path, "--data", data, "--task", task, "--size.family", family, "--evaluate", data)
