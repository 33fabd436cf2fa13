"""`python -m benchmarks.compose`."""

from benchmarks.compose import PRESETS, run
from jaxforget import command

command.main(run, PRESETS)
