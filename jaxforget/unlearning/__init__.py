"""Approximate unlearning: one file a method, one row in METHODS.

The rows named `_indist` and `_general` differ only in the set that supplies the retain text. PAPER are the seven of
Yao et al. (arXiv 2402.15159); the others are those of OpenUnlearning (arXiv 2506.12618), with its defaults, and of MUSE
(arXiv 2407.06460) its task vector and WHP.
"""

from collections.abc import Callable, Collection, Sequence

from jaxforget import choice
from jaxforget.choice import adjust
from jaxforget.unlearning.adversarial_samples import AdversarialSamples
from jaxforget.unlearning.ascent_descent import AscentDescent
from jaxforget.unlearning.ascent_kl import AscentKL
from jaxforget.unlearning.ceu import CEU
from jaxforget.unlearning.dpo import DPO
from jaxforget.unlearning.gradient_ascent import GradientAscent
from jaxforget.unlearning.idk_nll import IdkNLL
from jaxforget.unlearning.npo import NPO
from jaxforget.unlearning.pdu import PDU
from jaxforget.unlearning.random_labels import RandomLabels
from jaxforget.unlearning.recipe import Loss, Method, Recipe, Setting, check_setting
from jaxforget.unlearning.rmu import RMU
from jaxforget.unlearning.simnpo import SimNPO
from jaxforget.unlearning.task_vector import TaskVector
from jaxforget.unlearning.undial import Undial
from jaxforget.unlearning.weighted_ascent import WGA, SatImp
from jaxforget.unlearning.whp import WHP

METHODS: dict[str, Method] = {
    "gradient_ascent": GradientAscent(),
    "random_labels": RandomLabels(),
    "adversarial_samples": AdversarialSamples(),
    "ascent_descent_indist": AscentDescent(retain_set="retain"),
    "ascent_descent_general": AscentDescent(retain_set="general"),
    "ascent_kl_indist": AscentKL(retain_set="retain"),
    "ascent_kl_general": AscentKL(retain_set="general"),
    "npo": NPO(),
    "simnpo": SimNPO(),
    "dpo": DPO(),
    "idk_dpo": DPO(prefer="refusal"),
    "alt_po": DPO(prefer="generated", field="alternative_answer"),
    "idk_nll": IdkNLL(),
    "rmu": RMU(),
    "undial": Undial(),
    "wga": WGA(),
    "satimp": SatImp(),
    "ceu": CEU(),
    "pdu": PDU(),
    "task_vector": TaskVector(),
    "whp": WHP(),
}
PAPER = tuple(METHODS)[:7]


def choose(
    names: Sequence[str], sets: Collection[str] | None = None, tell: Callable[[str], None] = lambda said: None
) -> dict[str, Method]:
    """Look up methods by name; `paper` is the first seven. See `jaxforget.choice`.

    sets: those there are, None for all. `paper` and `all` leave out, and tell, methods that need another; those asked
    for by their own names stay.
    """
    chosen = choice.choose(METHODS, names, {"paper": PAPER})
    missing = {name: [needed for needed in method.needs if sets is not None and needed not in sets]
               for name, method in chosen.items() if name not in names}  # fmt: skip
    for needed in sorted({one for some in missing.values() for one in some}):
        left_out = [name for name, some in missing.items() if needed in some]
        tell(f"left out, since they need --{needed}: {', '.join(left_out)}")
    return {name: method for name, method in chosen.items() if not missing.get(name)}


__all__ = ["METHODS", "PAPER", "Loss", "Method", "Recipe", "Setting", "adjust", "check_setting", "choose"]
