"""Fixtures of the command tests."""

from types import SimpleNamespace

import jax
import pytest
import running

from jaxforget import command
from jaxforget.data import fictional


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The smoke corpus of train.unlearn as files."""
    return fictional.write(tmp_path_factory.mktemp("corpus"), fictional.generate(running.CORPUS))


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Run a command in this process, which has its imports and programs already. Returns (out, what it said)."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)  # else it would be moved

    def run(module, name, *flags):
        command.main(module.run, module.PRESETS, [str(flag) for flag in (*flags, "--out", tmp_path / name)])
        return SimpleNamespace(out=tmp_path / name, said=capsys.readouterr().err)

    return run
