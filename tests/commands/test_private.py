"""train.lm with --dp: what it states, resumption, counterfactual pairs as units, and settings that promise nothing."""

import json

import numpy as np
import pages
import pytest
import running
from test_resume import assert_same, run_until, stage_has

import train.lm
from jaxforget.privacy.accounting import Mechanism

FLAGS = ("--preset", "smoke", "--corpus.general-records", 20, "--dp.noise", 1, "--dp.clip", 0.5, "--dp.delta", 1e-3)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    rows = [{"id": f"s{i}", "text": f"{['she', 'he', 'the dog'][i % 3]} saw {i} things"} for i in range(60)]
    path = tmp_path_factory.mktemp("sentences") / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_result_states_the_promise(in_process):
    done = in_process(train.lm, "out", *FLAGS)
    stated = {k.removeprefix("dp_"): v for k, v in running.row(done.out, "after:train").items() if k[:3] == "dp_"}
    assert {"relation", "accountant", "epsilon", "q"} <= set(stated)
    known = ("unit", "sampler", "population", "batch", "steps", "sigma", "clip", "delta", "cap")
    mechanism = Mechanism(**{name: stated[name] for name in known})
    assert stated["epsilon"] == pytest.approx(mechanism.epsilon())
    assert (stated["sigma"], stated["unit"]) == (1, "record")
    lines = running.metrics(done.out)
    assert len(lines) == stated["steps"]
    units = [line["units"] for line in lines]
    assert np.mean(units) == pytest.approx(stated["batch"], rel=0.15) and len(set(units)) > 3  # Poisson: they vary
    assert all(line["sensitivity"] == pytest.approx(0.5 / 16) for line in lines)
    page = (done.out / "report.html").read_text()
    assert "epsilon" in done.said and "Differential privacy" in page and len(pages.check(page).tables) == 2


@pytest.mark.slow
def test_killed(tmp_path):
    """Sampler and noise are replayed: the resumed run is the undisturbed one."""
    flags = (*FLAGS, "--checkpoint-every", 3)
    running.run("train.lm", *flags, "--out", tmp_path / "whole")
    flags = (*flags, "--out", tmp_path / "out")
    assert run_until(stage_has(tmp_path / "out", "train", 5), "train.lm", *flags)
    running.run("train.lm", *flags, "--resume")
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_record_and_its_counterfactual_are_one_unit(sentences, in_process):
    model = ("--size.width", 16, "--size.layers", 1, "--size.heads", 2, "--size.context", 16, "--size.vocab-size", 300)
    more = ("--epochs", 1, "--cda.sides", "two", "--tokenizer", running.save_model(sentences.parent / "model"))
    done = in_process(train.lm, "out", *model, "--data", sentences, *FLAGS[4:], "--id-field", "id", *more)
    after = running.row(done.out, "after:train")
    assert "counterfactuals of 40 of 60 records" in done.said
    assert after["dp_population"] == 60 and after["dp_unit"] == "record"


@pytest.mark.parametrize("flags, said", [
    (("--dp.noise", 1, "--dp.delta", 0.5), "delta is 0.5; with N = 60 records it must be below 1/N = 0.0166667"),
    (("--dp.noise", 1, "--batch-size", 61), "the batch of 61 records is larger than the data, which has 60"),
    (("--dp.noise", 1, "--dp.epsilon", 1), "epsilon and noise are both given"),
    (("--dp.noise", 1, "--dp.groups", "heads"), "group pattern 'heads' takes no parameter that moves"),
    (("--dp.clip", 0.5), "--dp.* flags without --dp.epsilon or --dp.noise: training would not be private"),
], ids=["delta", "batch", "both", "groups", "ignored"])  # fmt: skip
def test_settings_that_promise_nothing(flags, said, sentences, in_process, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        in_process(train.lm, "out", "--data", sentences, "--size.vocab-size", 300, *flags)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and not (tmp_path / "out").exists()
