"""The places of a sparse difference are where the forget loss has the largest gradient."""

import jax
import numpy as np
import pytest
import toys
from toys import MODEL, PARAMS, SETTING

from jaxforget.training.objectives import token_logp
from jaxforget.training.sparse import lay_out
from jaxforget.unlearning import saliency
from jaxforget.unlearning.saliency import salient


@pytest.mark.parametrize("patterns, density", [((), 0.05), (("blocks/.*",), 0.2)])
def test_places_are_those_of_the_largest_gradients(patterns, density, tmp_path, monkeypatch):
    forget = SETTING.sets["forget"].columns

    @jax.grad
    def gradient(params):
        return token_logp(MODEL.batch_logits(params, forget), forget["labels"])[0].sum()

    class Shaped(toys.Layered):
        def shapes(self):
            return PARAMS

    layout = lay_out(PARAMS, patterns or (".*",), {})
    size_N = np.abs(layout.join(gradient(PARAMS)))
    count = round(density * layout.size)
    expected = np.sort(np.argsort(-size_N)[:count])
    setting = SETTING._replace(model=Shaped(), cache=tmp_path, rows=3, microbatch=1)
    for _ in range(2):
        _, frozen = salient(setting, patterns, density).init(jax.random.key(0), {"model": PARAMS})
        assert frozen["where"]["place"].tolist() == expected.tolist()
        monkeypatch.setattr(saliency, "_adding", None)  # the second time it is read
