"""Start commands as a user does, and look at what they leave."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from jaxforget.data import fictional
from jaxforget.data.fictional import FictionalConfig
from jaxforget.models import hub
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from

REPO = Path(__file__).resolve().parents[2]
CORPUS = FictionalConfig(people=12, general_records=40, general_test_records=20)  # of train.unlearn's smoke preset


def environment() -> dict[str, str]:
    """No network, and the compile cache of the other tests."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}


def start(module: str, *flags) -> subprocess.Popen:
    """Start a command in a process group of its own, so that a kill reaches its helpers too."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, flags)], cwd=REPO, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(module: str, *flags) -> subprocess.CompletedProcess:
    """Run a command to its end and require success."""
    process = start(module, *flags)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)


def files(directory: Path) -> dict[str, bytes | None]:
    """Return path -> content (None for directories) of everything below a directory."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes() for path in directory.rglob("*")
    }


def results(out: Path) -> dict:
    """Read results.json as strict JSON: NaN and Infinity are refused."""

    def refuse(constant):
        raise AssertionError(f"results.json holds {constant}")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def row(out: Path, name: str) -> dict:
    return next(row for row in results(out)["results"] if row["name"] == name)


def metrics(out: Path) -> list[dict]:
    """Read the complete lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def save_model(directory: Path, *, family="llama", head="causal", width=16, vocab_size=300, context=32) -> Path:
    """Save a tiny untrained model with a tokenizer."""
    size = SizeConfig(family=family, width=width, layers=1, heads=2, context=context, vocab_size=vocab_size)
    fresh = start_from(
        None, tokenizer_name=None, size=size, compute=ComputeConfig(), texts=fictional.tokenizer_texts(), head=head
    )
    with tempfile.TemporaryDirectory() as scratch:
        fresh.save_tokenizer(Path(scratch))
        return hub.save(directory, fresh.model, fresh.params(0), tokenizer_dir=scratch)


def write_jsonl(path: Path, texts, prefix: str = "") -> Path:
    """Write plain texts, with ids where a prefix for them is given."""
    ids = [{"id": f"{prefix}{i}"} if prefix else {} for i in range(len(texts))]
    lines = [json.dumps({**one, "text": text}) for one, text in zip(ids, texts, strict=True)]
    path.write_text("".join(line + "\n" for line in lines))
    return path
