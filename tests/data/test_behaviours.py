"""The queries are as many as the specification counts, and say what their name says."""

import pytest

from jaxforget.data.behaviours import toxigen, truthfulqa, winobias
from jaxforget.errors import UserError


@pytest.mark.shared
def test_counts_of_the_public_files(shared):
    groups = toxigen(shared / "data/toxigen/prompts.tar.xz")
    assert len(groups) >= 10 and all(
        8 < len(record.text.split()) <= 24 for records in groups.values() for record in records
    )
    questions = truthfulqa(shared / "data/truthfulqa/TruthfulQA.csv")
    assert len(questions) == 9 and all(len(records) >= 128 for records in questions.values())
    assert all(record.prompt.strip() and record.text for records in questions.values() for record in records)
    sentences = winobias(shared / "data/winobias")
    assert list(sentences) == ["anti, he", "anti, she", "pro, he", "pro, she"]
    for name, records in sentences.items():
        assert len(records) >= 256
        pronoun = {"he": (" he ", " him ", " his "), "she": (" she ", " her ")}[name.split(", ")[1]]
        assert all(any(p in f" {r.text.rstrip('.')} ".lower() for p in pronoun) for r in records)
    for records in (*groups.values(), *questions.values(), *sentences.values()):
        assert len({record.id for record in records}) <= len(records)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_text("a,b\n1,2\n")
    for read in (toxigen, truthfulqa):
        for path in (tmp_path / "x", tmp_path / "nothing"):
            with pytest.raises(UserError, match=path.name):
                read(path)
