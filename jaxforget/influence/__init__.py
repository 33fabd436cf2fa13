"""Which training data causes which behaviour: one file a method, one row in METHODS."""

from jaxforget import choice
from jaxforget.influence.curvature import Arnoldi, LiSSA
from jaxforget.influence.ekfac import EKFAC
from jaxforget.influence.first_order import GradCos, GradDot, GradSign, TracIn
from jaxforget.influence.fisher import DampedFisher
from jaxforget.influence.question import Answer, Method, Question
from jaxforget.influence.trak import TRAK
from jaxforget.influence.untrac import UnTrac, UnTracInv

METHODS: dict[str, Method] = {
    "untrac": UnTrac(),
    "untrac_inv": UnTracInv(),
    "grad_dot": GradDot(),
    "grad_cos": GradCos(),
    "grad_cos_examples": GradCos(of="examples"),
    "grad_sign": GradSign(),
    "tracin": TracIn(),
    "lissa": LiSSA(),
    "arnoldi": Arnoldi(),
    "fisher": DampedFisher(),
    "ekfac": EKFAC(),
    "trak": TRAK(),
}


def choose(names: tuple[str, ...]) -> dict[str, Method]:
    """Look up methods by name; see `jaxforget.choice`."""
    return choice.choose(METHODS, names)


__all__ = ["METHODS", "Answer", "Method", "Question", "choose"]
