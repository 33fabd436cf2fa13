"""What a private run promises, as one frozen description that the sampler and the accountant both read.

Letters: N units, B expected units of a batch, q = B / N, T steps, C clipping bound, sigma noise multiplier.
Noise has standard deviation sigma * sensitivity, where the sensitivity of a clipped sum is C if a unit is added,
removed or blanked, and 2C if it is replaced.

| sampler | a step reads | relation | accountant |
|---|---|---|---|
| poisson | each unit with probability q | add/remove one | PLD, checked by RDP |
| truncated | the same, cut at random to `cap` units | add/remove one | PLD (arXiv 2508.15089) |
| cyclic | each unit of one of `bands` random parts, in turn, with probability bands q | add/remove one | PLD |
| shuffle | the next B units of an epoch's random order | zero out one | PLD, no amplification |
| fixed | B units without replacement | replace one | RDP |

Cyclic: the noise of `bands` steps in a row is correlated, and no unit takes part twice in so many, so a run is as
private as one of T / bands steps with q bands (arXiv 2306.08153): privacy/noise.py.

Shuffle: whatever the order, a unit is in one batch an epoch, and blanking it in place (its gradient becomes zero, its
slot stays) changes that batch's sum by at most C. So the run is no worse than one Gaussian release an epoch. Better
bounds for shuffling are not known to hold in general (arXiv 2411.04205), so q plays no part. *Removing* a unit is not
covered: those behind it move up, and every later batch changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from jaxforget.errors import UserError
from jaxforget.files import write_alone

Sampler = Literal["poisson", "truncated", "cyclic", "shuffle", "fixed"]
Accountant = Literal["pld", "rdp"]
# The relation, and who can account for it: the first reports, the other checks.
SAMPLERS: dict[Sampler, tuple[str, tuple[Accountant, ...]]] = {
    "poisson": ("add/remove one", ("pld", "rdp")),
    "truncated": ("add/remove one", ("pld",)),
    "cyclic": ("add/remove one", ("pld", "rdp")),
    "shuffle": ("zero out one", ("pld", "rdp")),
    "fixed": ("replace one", ("rdp",)),
}
GRID = 1e-4  # privacy losses are rounded to multiples of this, nats
LEAST_NOISE, MOST_NOISE = 2.0**-3, 2.0**10  # multipliers that are tried; below, PLD needs minutes and gigabytes
NOISE_DIGITS = 5  # calibrated multipliers are rounded up to so many decimals


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy of training; off unless epsilon or noise is given."""

    epsilon: float | None = None
    """Privacy loss to stay within, nats; the noise follows from it."""
    noise: float | None = None
    """Noise multiplier, instead of epsilon. 0 clips without noise, which promises nothing."""
    delta: float | None = None
    """Probability that epsilon fails, below 1/N. Not given: N**-1.1."""
    clip: float = 0.1
    """Bound on the norm of a unit's gradient."""
    sampler: Sampler = "poisson"
    """poisson draws units independently; truncated also caps a batch; cyclic correlates noise over steps; shuffle and
    fixed have full batches."""
    cap: int | None = None
    """Largest batch in units, for sampler truncated."""
    bands: int = 1
    """Steps in a row whose noise is correlated, for sampler cyclic; each more holds a copy of what moves."""
    estimator: Literal["auto", "vmap", "ghost", "bookkeep"] = "auto"
    """How per-unit gradients are clipped; the result is the same. auto is the fastest one for the model."""
    groups: tuple[str, ...] = ()
    """Clip groups of parameters apart, each to clip / sqrt(groups): regular expressions for paths; the rest is one."""
    auto_s: bool = False
    """Divide a gradient by its norm + 0.01 instead of clipping it (AUTO-S); clip then plays no part."""
    quantile: float | None = None
    """Let clip follow this quantile of the norms, starting from its value."""

    def __post_init__(self):
        for pattern in self.groups:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"group pattern {pattern!r} is not a regular expression: {error}") from None
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise UserError(f"quantile is {self.quantile}; it must be between 0 and 1")
        if self.quantile is not None and (self.auto_s or self.groups):
            raise UserError("quantile adapts one bound; give it without auto_s and groups")
        if self.epsilon is not None and self.noise is not None:
            raise UserError("epsilon and noise are both given; give one, the other follows from it")
        for field, low, high in [("epsilon", 0.0, 100.0), ("delta", 0.0, 1.0), ("clip", 0.0, math.inf)]:
            value = getattr(self, field)
            if value is not None and not (low < value < math.inf and value <= high):
                above = f" and at most {high:g}" if high < math.inf else " and finite"
                raise UserError(f"{field} is {value}; it must be above {low:g}{above}")
        if self.noise is not None and self.noise and not LEAST_NOISE <= self.noise <= MOST_NOISE:
            raise UserError(f"noise is {self.noise}; it must be 0 or between {LEAST_NOISE:g} and {MOST_NOISE:g}")
        if (self.cap is not None) != (self.sampler == "truncated") or (self.cap is not None and self.cap < 1):
            needs = "truncated needs a cap of at least 1, others take none"
            raise UserError(f"cap is {self.cap} with sampler {self.sampler}; {needs}")
        if (self.bands > 1) != (self.sampler == "cyclic") or self.bands < 1:
            needs = "cyclic needs bands of at least 2, others have 1"
            raise UserError(f"bands is {self.bands} with sampler {self.sampler}; {needs}")
        if self.bands > 1 and self.quantile is not None:
            raise UserError("quantile changes the noise of steps whose noise bands correlate; give one of them")

    @property
    def private(self) -> bool:
        """Is training private?"""
        return self.epsilon is not None or self.noise is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One private run. `batch` is B, the expected number of units by which summed gradients are divided."""

    unit: str  # what one unit is: record, pair, user, block
    sampler: Sampler
    population: int
    batch: int
    steps: int
    sigma: float
    clip: float
    delta: float
    cap: int | None = None
    bands: int = 1

    @property
    def q(self) -> float:
        return self.batch / self.population

    @property
    def relation(self) -> str:
        return SAMPLERS[self.sampler][0]

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on a clipped sum, per coordinate: sigma times the sensitivity."""
        return self.sigma * self.clip * (2.0 if self.sampler == "fixed" else 1.0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.population // self.batch)

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.steps // self.steps_per_epoch)

    def event(self) -> Any:
        """Describe the run to dp_accounting."""
        import dp_accounting as dp

        gaussian = dp.GaussianDpEvent(self.sigma)
        if self.sampler == "shuffle":
            return dp.SelfComposedDpEvent(gaussian, self.epochs)
        if self.sampler == "cyclic":
            one = dp.PoissonSampledDpEvent(self.bands * self.q, gaussian)
            return dp.SelfComposedDpEvent(one, -(-self.steps // self.bands))
        if self.sampler == "truncated":
            one = dp.TruncatedSubsampledGaussianDpEvent(self.population, self.q, self.cap, self.sigma)
        elif self.sampler == "fixed":
            one = dp.SampledWithoutReplacementDpEvent(self.population, self.batch, gaussian)
        else:
            one = dp.PoissonSampledDpEvent(self.q, gaussian)
        return dp.SelfComposedDpEvent(one, self.steps)

    def epsilon(self, accountant: Accountant | None = None) -> float | None:
        """Account for all steps, nats. None where this accountant does not know the sampler; inf without noise."""
        known = SAMPLERS[self.sampler][1]
        accountant = accountant or known[0]
        return self.spent(accountant) if accountant in known else None

    def spent(self, accountant: Accountant) -> float:
        """Account for all steps with an accountant that knows the sampler, nats; inf without noise."""
        return _epsilon(dataclasses.replace(self, unit="", clip=1.0), accountant, GRID) if self.sigma else math.inf

    def row(self) -> dict[str, Any]:
        """State what every result of this run must state. Choices made by looking at private data are not included."""
        names = ("unit", "relation", "sampler", "delta", "sigma", "q", "steps", "clip", "population", "batch", "cap",
                 "bands")
        stated = {name: getattr(self, name) for name in names} | {"accountant": SAMPLERS[self.sampler][1][0]}
        return stated | {"epsilon": self.epsilon(), "epsilon_rdp": self.epsilon("rdp")}


@functools.cache  # a row is written more than once, and PLD takes a second
def _epsilon(mechanism: Mechanism, accountant: Accountant, grid: float) -> float:
    from dp_accounting import NeighboringRelation, pld, rdp

    relation = {
        "add/remove one": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero out one": NeighboringRelation.REPLACE_SPECIAL,
        "replace one": NeighboringRelation.REPLACE_ONE,
    }[mechanism.relation]
    if accountant == "pld":
        counter = pld.PLDAccountant(relation, value_discretization_interval=grid)
    else:
        counter = rdp.RdpAccountant(neighboring_relation=relation)
    return float(counter.compose(mechanism.event()).get_epsilon(mechanism.delta))


def mechanism(config: PrivacyConfig, *, population: int, batch: int, steps: int, unit: str) -> Mechanism:
    """Resolve the settings for this many units and steps; epsilon becomes the least noise that keeps it.

    Raises UserError for delta >= 1/N, a batch above the population, and an epsilon that no noise reaches.
    """
    if batch > population:
        raise UserError(f"the batch of {batch} {unit}s is larger than the data, which has {population}")
    if batch * config.bands > population:
        raise UserError(f"bands is {config.bands} with batches of {batch} of {population} {unit}s; a part of the data "
                        f"must hold a batch, so at most {population // batch}")  # fmt: skip
    delta = float(population) ** -1.1 if config.delta is None else config.delta
    if delta >= 1 / population:
        raise UserError(f"delta is {delta:g}; with N = {population} {unit}s it must be below 1/N = {1 / population:g}")
    known: dict[str, Any] = {"sampler": config.sampler, "population": population, "batch": batch, "steps": steps,
                             "delta": delta, "cap": config.cap, "bands": config.bands}  # fmt: skip
    found = Mechanism(unit=unit, clip=config.clip, sigma=config.noise or 0.0, **known)
    if (epsilon := config.epsilon) is None:
        return found
    inputs = {**known, "epsilon": epsilon, "grid": GRID, "dp": version("dp-accounting")}
    make = lambda sigma: dataclasses.replace(found, sigma=sigma)  # noqa: E731
    return make(_cached(inputs, lambda: _calibrate(make, epsilon)))


def _calibrate(make: Callable[[float], Mechanism], epsilon: float) -> float:
    """Find the least noise within epsilon, by the accountant that will report.

    Where a step's losses spread widely the search takes a coarser grid, which is ten times faster and errs upwards by
    less than 1e-3 of epsilon; the last word has GRID.
    """
    from scipy.optimize import brentq

    def over(log_sigma: float) -> float:
        run = make(2.0**log_sigma)
        spread = run.q * run.bands * math.sqrt(math.expm1(run.sigma**-2))  # about the deviation of a step's losses
        found = _epsilon(run, SAMPLERS[run.sampler][1][0], min(max(spread / 50, GRID), 10 * GRID))
        return min(found, 1e6) - epsilon  # brentq takes no infinity

    low = high = 0
    while over(high) > 0:
        low, high = high, high + 1
        if 2.0**high > MOST_NOISE:
            _unreachable(make(MOST_NOISE), epsilon)
    while over(low) <= 0:
        low, high = low - 1, low
        if 2.0**low < LEAST_NOISE:
            _unreachable(make(LEAST_NOISE), epsilon)
    scale = 10**NOISE_DIGITS
    count = math.ceil(scale * 2.0 ** brentq(over, low, high, xtol=0.2 / scale))
    while (run := make(count / scale)).spent(SAMPLERS[run.sampler][1][0]) > epsilon:
        count += 1
    return count / scale


def _unreachable(nearest: Mechanism, epsilon: float) -> None:
    raise UserError(
        f"epsilon {epsilon:g} cannot be reached in {nearest.steps} steps with batches of {nearest.batch} of "
        f"{nearest.population} {nearest.unit}s: the nearest is {nearest.epsilon():.4g}, at noise {nearest.sigma:g}"
    )


def _cached(inputs: dict[str, Any], compute: Callable[[], float]) -> float:
    """Keep a calibration, which takes seconds and depends on its inputs alone, in a file of the user's cache."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "jaxforget" / "calibration" / f"{digest}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged: compute
        saved = json.loads(path.read_text(encoding="utf-8"))
        sigma = float(saved.pop("sigma"))
        if saved == inputs and LEAST_NOISE <= sigma <= MOST_NOISE:
            return sigma
    sigma = compute()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs seconds, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_alone(path, json.dumps({**inputs, "sigma": sigma}))
    return sigma
