"""Speed, in one run: training by family, methods against the plain step, members, inference, the time of a first step.

    taskset -c 0,1 python -m benchmarks.speed
    python -m benchmarks.speed --preset h200

Ways of a part run in turns. A turn is one device program, or several that follow without waiting, and ends with one
wait for the device; a ratio is that of one turn; medians count, with the lowest and highest. Steps are compiled and
donate their state as in the training loop. Making batches is in no time, reading results back only where a user does:
scores of an evaluation.

FLOPs are those of training/cost.py: what the mathematics needs, so that computing something twice lowers the share of
the peak. Peers run where they are installed.
"""

from benchmarks.speed.config import PRESETS
from benchmarks.speed.study import run

__all__ = ["PRESETS", "run"]
