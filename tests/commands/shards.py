"""Small ensembles by command: make them, run commands in this process, break in anywhere, compare what is left."""

import contextlib
import functools
import hashlib
import io
import json
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import pytest
import running

import train.forget
import train.sisa
from jaxforget import command
from jaxforget.data.sources import content_id
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.ledger import Ledger
from jaxforget.training.checkpoints import digest

MODULES = {"train.sisa": train.sisa, "train.forget": train.forget}
IDS = tuple(f"record-{i:02d}" for i in range(24))
LETTERS = str.maketrans("0123456789abcdef", "ghijklmnopqrstuv")
SIZE = ("--preset", "smoke", "--size.width", 16, "--size.layers", 1, "--size.vocab-size", 300, "--size.context", 32)
PLAN = (*SIZE, "--id-field", "id", "--shards", 3, "--slices", 2, "--batch-size", 4)
# 4 epochs a slice: 4 steps, then 8, so that only the second has checkpoints inside.
TRAINING = (*PLAN, "--epochs", 6, "--checkpoint-every", 4)
# What is written in one go leaves this name when its process is killed just then.
HALF_WRITTEN = re.compile(r"\.(config\.json|results\.json|metrics\.jsonl|report\.html)\.\d+")


def cases(table, slow):
    """Parametrise over the names of a table, some of them marked slow."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in table])


def text_of(identity: str) -> str:
    """Return words that no other record has, and that no digest can hold by chance."""
    letters = hashlib.sha256(identity.encode()).hexdigest().translate(LETTERS)
    return " ".join(letters[i : i + 6] for i in range(0, 18, 6))


def write_data(path: Path, ids=IDS) -> Path:
    """Write records of these ids."""
    path.write_text("".join(json.dumps({"id": one, "text": text_of(one)}) + "\n" for one in ids))
    return path


def call(module, *flags) -> SimpleNamespace:
    """Run a command in this process. Returns its exit code and what it said on stderr and stdout."""
    said, printed, code = io.StringIO(), io.StringIO(), 0
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}  # else it would be moved
    with mock.patch.dict(os.environ, cache), contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            command.main(module.run, module.PRESETS, [str(flag) for flag in flags])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, said=said.getvalue(), printed=printed.getvalue())


def done(module, *flags) -> SimpleNamespace:
    """Run a command in this process and require success."""
    outcome = call(module, *flags)
    assert outcome.code == 0, outcome.said
    return outcome


def only_error(outcome: SimpleNamespace, code: int) -> str:
    """Return the last line of what a command said, the one sentence it failed with."""
    assert outcome.code == code, outcome.said
    *told, sentence = outcome.said.splitlines()
    assert sentence.startswith("error: ") and not any("rror" in line for line in told), outcome.said
    return sentence


def places(directory: Path) -> dict[str, tuple[int, int]]:
    """Return id -> shard and slice of every surviving record."""
    with Ledger(directory) as ledger:
        return ledger.where(IDS)


def requests(directory: Path) -> dict[int, str]:
    """Return request -> state."""
    with Ledger(directory) as ledger:
        return {request["request"]: request["state"] for request in ledger.requests()}


def state(directory: Path) -> SimpleNamespace:
    """Read what makes up an ensemble: the places of records, stages in the ledger and on disk, members."""
    with Ensemble(directory) as ensemble:
        like = ensemble.step.init(jax.random.key(0), {"model": ensemble._initial})[0].trainable
        stages = ensemble.ledger.stages()
        loaded = {key: digest(ensemble.store.get(key, like)) for key in stages}
    names = {path.name for path in (directory / "stages").iterdir()}
    weights = (directory / "members").glob("*/model.safetensors")
    members = {str(path.relative_to(directory)): path.read_bytes() for path in weights}
    return SimpleNamespace(places=places(directory), stages=stages, loaded=loaded, names=names, members=members)


_undisturbed = functools.cache(state)  # for these do not change


def assert_same(directory: Path, undisturbed: Path, context: str = "") -> None:
    """Require an ensemble to be what an undisturbed run made: to the bit, with nothing open and nothing left over."""
    ours, theirs = state(directory), _undisturbed(undisturbed)
    assert ours.places == theirs.places, context
    assert ours.stages == theirs.stages and ours.loaded == theirs.loaded, context
    assert ours.loaded == {key: stage["digest"] for key, stage in ours.stages.items()}, context
    assert ours.names == theirs.names == {key[:32] for key in ours.stages}, context
    assert ours.members == theirs.members and ours.members, context
    assert set(requests(directory).values()) <= {"committed"}, context
    left = {path.name for path in directory.iterdir() if not HALF_WRITTEN.fullmatch(path.name)}
    assert left <= {path.name for path in undisturbed.iterdir()}, context
    assert not [path for path in (directory / "members").iterdir() if path.name.startswith(".")], context
    assert_forgotten(directory, set(IDS) - ours.places.keys(), context)


def assert_forgotten(directory: Path, ids, context: str = "") -> None:
    """Require that no file below a directory holds the id, the words or a digest of the words of these records."""
    for path, content in running.files(directory).items():
        for identity in ids if content is not None else ():
            text = text_of(identity)
            for trace in (identity, *text.split(), content_id(None, text)):
                assert trace.encode() not in content, f"{trace} of {identity} in {path} {context}"


def assert_same_training(out: Path, undisturbed: Path, context: str = "") -> None:
    """Require the ensemble, log and results of train.sisa to be those of an undisturbed run."""
    assert_same(out, undisturbed, context)
    assert (out / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes(), context
    assert running.results(out)["results"] == running.results(undisturbed)["results"], context
    assert (out / "report.html").exists(), context


def finish_forgetting(directory: Path, ids, reports: Path, context: str = "") -> None:
    """Resume, require every accepted request to be committed then, and ask again for the ids that were not accepted."""
    accepted = requests(directory)
    outcome = call(train.forget, "--ensemble", directory, "--resume", "--out", reports / "resumed")
    assert outcome.code == 0, f"{outcome.said} {context}"
    assert requests(directory) == dict.fromkeys(accepted, "committed"), context
    if rest := [identity for identity in ids if identity in places(directory)]:
        done(train.forget, "--ensemble", directory, "--id", *rest, "--out", reports / "again")


# ------------------------------------------------------------------------------------------------- breaking in
ADVANCE = "jaxforget.sisa.ledger:Ledger.advance"  # a request enters its next state


def patched(place: str, nth: int, instead):
    """Patch a function, "module:name", so that its nth call is handed to `instead` as a function without arguments."""
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(parents)}" if parents else module)
    whole, calls = getattr(owner, name), 0

    def function(*args, **settings):
        nonlocal calls
        calls += 1
        this = functools.partial(whole, *args, **settings)
        return instead(this) if calls == nth else this()

    return mock.patch.object(owner, name, function)


def broken(when: str, place: str, nth: int, act):
    """Act before or after the nth call of a function."""

    def instead(this):
        if when == "before":
            act()
        result = this()
        if when == "after":
            act()
        return result

    return patched(place, nth, instead)


def flip(path: Path, place: float = 0.5) -> None:
    """Let one byte of a file be wrong."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    path.write_bytes(bytes(content))


def interrupt():
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


def kill():
    """Do what kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(place: str, nth: int = 1, size: int = 16):
    """Let no file be written beyond `size` bytes during the nth call of a function."""

    def instead(this):
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            return this()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    return patched(place, nth, instead)


RUN = "shards.run(*sys.argv[1:])"


def start(code: str, *words) -> subprocess.Popen:
    """Start Python on some code, which finds this module, as `running.start` starts a command."""
    home = {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(running.REPO)))}
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", *map(str, words)], cwd=running.REPO, text=True,
        env=running.environment() | home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def start_broken(boundary, module: str, *flags) -> subprocess.Popen:
    """Start a command that kills itself at a boundary: (when, place, nth)."""
    return start(f"import shards\nwith shards.broken(*{boundary!r}, shards.kill): {RUN}", module, *flags)


def run(module: str, *flags: str) -> None:
    """Run a command in this process, which it ends."""
    command.main(MODULES[module].run, MODULES[module].PRESETS, flags)
