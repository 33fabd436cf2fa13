"""`python -m benchmarks.speed`."""

import os

from benchmarks.speed import PRESETS, run
from jaxforget import command

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and child processes need a GPU's memory too
command.main(run, PRESETS)
