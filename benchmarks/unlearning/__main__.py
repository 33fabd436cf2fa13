"""`python -m benchmarks.unlearning`."""

from benchmarks.unlearning import PRESETS, run
from jaxforget import command

command.main(run, PRESETS)
