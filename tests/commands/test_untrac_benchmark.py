"""benchmarks.untrac: what it leaves, that finished cells are kept, and what it refuses."""

import pages
import pytest
import running
from shards import call, done

import benchmarks.untrac

FLAGS = ("--preset", "smoke", "--parts", "skills", "--retrain.seeds", 1, "--rates", 1e-5, "--methods", "grad_dot",
         "--skills-training.batch-size", 32)  # fmt: skip


@pytest.mark.slow
def test_skills(tmp_path):
    done(benchmarks.untrac, *FLAGS, "--out", tmp_path / "out")
    rows = running.results(tmp_path / "out")["results"]
    assert pages.check((tmp_path / "out/report.html").read_text()).plots
    methods = ("untrac adam 1e-05", "untrac_inv adam 0.001", "grad_dot", "noise ceiling",
               "truth, one seed against the others")  # fmt: skip
    assert [row["name"] for row in rows] == [f"skills {corpus}: {method}" for corpus in "AB" for method in methods]
    assert all(-1 <= row["pearson"] <= 1 for row in rows if row["method"] in methods[:3])
    assert all(row["pearson"] is None for row in rows if row["method"] in methods[3:])  # one seed has no ceiling
    cells = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.npz")}
    (tmp_path / "out/skills B/scores/seed0/grad_dot.npz").unlink()
    done(benchmarks.untrac, *FLAGS, "--out", tmp_path / "out", "--resume")
    again = running.results(tmp_path / "out")["results"]
    for one, other in zip(rows, again, strict=True):
        assert {**one, "seconds": 0, "memory_gb": 0} == {**other, "seconds": 0, "memory_gb": 0}
    kept = [path for path, content in cells.items() if path.read_bytes() == content]
    assert len(kept) >= len(cells) - 1


@pytest.mark.parametrize(("flags", "message"), [
    (("--parts", "skill"), "unknown part 'skill'"),
    (("--parts", "many"), "--data is missing"),
    (("--sequences", 0), "--sequences is 0"),
    (("--methods", "shapley"), "unknown method 'shapley'"),
    (("--parts", "domains", "--data", "nowhere"), "no such file"),
])  # fmt: skip
def test_refused_in_one_sentence(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--parts" not in flags:
        flags = (*flags, "--data", ".")
    outcome = call(benchmarks.untrac, *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said
    assert not (tmp_path / "out").exists()
