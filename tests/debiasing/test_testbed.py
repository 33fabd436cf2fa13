"""What models tell, in rows: gaps that cannot be measured are null, whatever the order of classes."""

import numpy as np
import pytest

from jaxforget.debiasing.testbed import gaps


def test_gaps_by_hand():
    """Two groups of four; of each the first two have class 1."""
    label_N, group_N = np.asarray([1, 1, 0, 0] * 2), np.repeat([0, 1], 4)
    found = gaps(np.asarray([1, 1, 1, 0, 1, 0, 0, 0]), label_N, group_N, 2, 2)
    assert found == {"eo_max": pytest.approx(0.5), "demographic_parity": pytest.approx(0.5)}
    unknown = gaps(np.asarray([1, 1, 1, 0, 1, 0, 0, 0, 0]), np.append(label_N, 1), np.append(group_N, -1), 2, 2)
    assert unknown == found


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_class_that_a_group_lacks_leaves_no_gap(absent):
    label_N = np.asarray([0, 1, 2] * 4)
    group_N = np.repeat([0, 1], 6)
    label_N[(group_N == 1) & (label_N == absent)] = (absent + 1) % 3
    found = gaps(np.zeros(12, int), label_N, group_N, 3, 2)
    assert found["eo_max"] is None and found["demographic_parity"] == 0.0
