"""The verdict: forget loss within 10 % of the retrained model's, retain perplexity harmed by under 10 %."""

import pytest

from jaxforget.unlearning.page import verdict

ORIGINAL = {"forget_nll": 0.1, "retain_perplexity": 1.2}
RETRAINED = {"forget_nll": 1.0, "retain_perplexity": 1.2}


@pytest.mark.parametrize(
    "forget, retain, expected",
    [
        (1.0, 1.2, "like retraining"),
        (0.91, 1.31, "like retraining"),
        (0.89, 1.2, "forgot too little"),
        (1.11, 1.2, "forgot too much"),
        (1.0, 1.33, "harmed retain"),
        (5.0, 9.0, "forgot too much and harmed retain"),
    ],
)
def test_verdicts(forget, retain, expected):
    assert verdict({"forget_nll": forget, "retain_perplexity": retain}, ORIGINAL, RETRAINED) == expected


def test_no_verdict_without_a_yardstick_or_without_anything_to_forget():
    row = {"forget_nll": 1.0, "retain_perplexity": 1.2}
    assert verdict(row, ORIGINAL, None) is None
    assert verdict({**row, "retain_perplexity": None}, ORIGINAL, RETRAINED) is None
    assert verdict(row, {**ORIGINAL, "forget_nll": 0.95}, RETRAINED) == "nothing to forget"
