"""Strict JAX settings, a compile cache kept between test runs, the toy model, and commands run in this process."""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget import command
from jaxforget.data import fictional
from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import Examples

SHARED = Path(__file__).resolve().parents[2] / "shared"
COMPILE_FAST = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
                "--xla_cpu_parallel_codegen_split_count=1")  # fmt: skip


def pytest_configure(config):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two workers share an accelerator, if there is one
    # Programs here are many and small: most of the suite's time would be XLA's. Commands that tests start inherit it.
    os.environ["XLA_FLAGS"] = " ".join((*COMPILE_FAST, os.environ.get("XLA_FLAGS", "")))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Let a process with 8 devices run tests marked `mesh`: where there are more than cores, sums are cut otherwise."""
    if "mesh" not in pyfuncitem.keywords or jax.config.jax_num_cpu_devices == 8:
        return None
    together = [item.nodeid for item in pyfuncitem.session.items
                if item.path == pyfuncitem.path and "mesh" in item.keywords]  # fmt: skip
    found = _elsewhere(tuple(together))[pyfuncitem.name]
    if (told := found.find("skipped")) is not None:
        pytest.skip(told.get("message"))
    for told in (*found.iter("failure"), *found.iter("error")):
        pytest.fail(told.text, pytrace=False)
    return True


@functools.cache
def _elsewhere(names: tuple[str, ...]) -> dict[str, ElementTree.Element]:
    """Run tests of one file in one process. Returns name -> what JUnit's XML says."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        said = f"{scratch}/said.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "--junit-xml", said, *names], cwd=root,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return {case.get("name"): case for case in ElementTree.parse(said).iter("testcase")}


@pytest.fixture(autouse=True, scope="module")
def programs_freed():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530: beyond, it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared():
    """The development data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the development data directory 'shared' is not beside the checkout")
    return SHARED


@dataclasses.dataclass(frozen=True)
class Toy:
    """A bigram-like language model: logits of the next token from the current and the mean of those before it."""

    vocab_size: int = 11
    width: int = 6
    max_length: int = 16
    dtype: str = "float32"

    def init(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "embed": {"embedding": jax.random.normal(k1, (self.vocab_size, self.width))},
            "mix": {"kernel": jax.random.normal(k2, (self.width, self.width)), "bias": jnp.zeros(self.width)},
            "head": {"kernel": jax.random.normal(k3, (self.width, self.vocab_size)) * 0.5},
        }

    def logits(self, params, tokens_BT):
        x_BTD = params["embed"]["embedding"][tokens_BT]
        count_T1 = jnp.arange(1, x_BTD.shape[1] + 1, dtype=jnp.float32)[:, None]
        mean_BTD = jnp.cumsum(x_BTD, axis=1) / count_T1[None]
        hidden_BTD = jnp.tanh(mean_BTD @ params["mix"]["kernel"] + params["mix"]["bias"][None, None]) + x_BTD
        return hidden_BTD @ params["head"]["kernel"]

    def batch_logits(self, params, batch):
        return self.logits(params, batch["tokens"])

    def flops_per_token(self, length):
        return 2.0 * (self.width**2 + self.width * self.vocab_size)


@pytest.fixture
def toy():
    return Toy()


def make_examples(count: int, *, seed: int = 0, width: int = 8, vocab: int = 11, prefix: str = "x") -> Examples:
    """Random token rows of different lengths; all tokens after the first are scored."""
    rng = np.random.default_rng(seed)
    length_N = rng.integers(3, width + 1, count).astype(np.int32)
    tokens_NT = rng.integers(1, vocab, (count, width)).astype(np.int32)
    place_T = np.arange(width)
    tokens_NT[place_T[None] >= length_N[:, None]] = 0
    labels_NT = np.full_like(tokens_NT, -100)
    labels_NT[:, :-1] = np.where(place_T[None, 1:] < length_N[:, None], tokens_NT[:, 1:], -100)
    ids = tuple(f"{prefix}{i}" for i in range(count))
    return Examples(ids, {"tokens": tokens_NT, "labels": labels_NT, "length": length_N, "key": id_keys(ids)})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The smoke corpus of train.unlearn as files."""
    import running  # of tests/commands

    return fictional.write(tmp_path_factory.mktemp("corpus"), fictional.generate(running.CORPUS))


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Run a command in this process, which has its imports and programs already. Returns (out, what it said)."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)  # else it would be moved

    def run(module, name, *flags):
        command.main(module.run, module.PRESETS, [str(flag) for flag in (*flags, "--out", tmp_path / name)])
        return SimpleNamespace(out=tmp_path / name, said=capsys.readouterr().err)

    return run
