"""TOFU's own splits: fine-tuning on forget + retain is fine-tuning on full."""

import pytest

from jaxforget.data.sources import read_records


@pytest.mark.shared
def test_full_is_forget10_and_retain90(shared):
    def content(name):
        return sorted((r.prompt, r.text) for r in read_records(shared / "data" / "tofu" / f"{name}.json"))

    assert content("full") == sorted(content("forget10") + content("retain90"))


@pytest.mark.shared
def test_forget10_and_retain90_share_no_ids(shared):
    forget, retain = (
        {r.id for r in read_records(shared / "data" / "tofu" / f"{name}.json")} for name in ("forget10", "retain90")
    )
    assert len(forget) == 400 and len(retain) == 3600 and not forget & retain
