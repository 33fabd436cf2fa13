"""What switching modules per request costs: mixed batches, and module files of a BERT-base-shaped model.

    python -m benchmarks.modular_serving

Four module sets in one batch, against a batch of the same size whose rows agree, a loop over the sets, and merging the
weights again for every row. All ways are timed in turns in one process; the median counts.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxforget import command
from jaxforget.debiasing.composition import merged
from jaxforget.debiasing.differences import layout_of, sparse
from jaxforget.debiasing.modules import DTYPES, Module, from_places, load_module, save_module
from jaxforget.debiasing.serving import Modular
from jaxforget.models.adapters import digest
from jaxforget.models.bert import Config as Bert
from jaxforget.models.model import build
from jaxforget.report.page import cell, table, write_page
from jaxforget.report.run import Run

SETS: tuple[tuple[str, ...], ...] = ((), ("age",), ("gender",), ("age", "gender"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure mixed batches and module files."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    width: int = 256
    """Width of the model that answers mixed batches."""
    layers: int = 4
    """Its layers."""
    vocab_size: int = 8192
    """Its vocabulary."""
    batch: int = 64
    """Rows of a batch."""
    tokens: int = 32
    """Tokens of a row."""
    density: float = 0.01
    """Of every module."""
    buckets: tuple[int, ...] = (4, 8, 16, 32)
    """Rows of a bucket, each measured."""
    repeats: int = 15
    """Turns."""
    base: bool = True
    """Also measure module files of a BERT-base-shaped model (about 3 GB of memory)."""


def default() -> Config:
    """a 4-layer encoder and a BERT-base-shaped one, about two minutes on two CPU cores"""
    return Config()


def smoke() -> Config:
    """a tiny encoder, seconds"""
    return Config(width=32, layers=1, vocab_size=300, batch=16, tokens=8, buckets=(4,), repeats=2, base=False)


PRESETS = {"default": default, "smoke": smoke}
FIELDS = ("name", "milliseconds", "ratio", "largest_difference")
FILES = ("name", "milliseconds", "megabytes")


def run(config: Config) -> None:
    """Time everything and report."""
    command.at_least(1, batch=config.batch, repeats=config.repeats)
    out = Run("benchmarks.modular_serving", config, config.out, False)
    out.begin()
    rows = mixed(config)
    files = base_files(config) if config.base else []
    document = out.finish(rows + files)
    note = "Ratio: to a batch whose rows have the same modules on. Difference: from each row's own modules alone."
    sections = [("One batch, four sets of modules", note, table(rows, FIELDS))]
    if files:
        sections.append(("Files of a BERT-base-shaped model", "A module of 1 %.", table(files, FILES)))
    lead = ("What does a batch cost whose rows want different modules? "
            f"{config.batch} rows of {config.tokens} tokens, {document['device']}.")  # fmt: skip
    found = [f"{row['name'].capitalize()}: {cell(row['milliseconds'])} ms, {cell(row['ratio'])} times that of rows "
             "that agree." for row in rows[1:]]  # fmt: skip
    write_page(out.directory / "report.html", "Switching modules per request", lead, sections, document["config"],
               found)  # fmt: skip
    command.print_table(rows, FIELDS, f"modular_serving · {out.directory}")
    if files:
        command.print_table(files, FILES, "module files, BERT-base shape")


def encoder(width: int, layers: int, vocab_size: int, context: int):
    """Make a classifier of BERT's shape."""
    config = Bert(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
                  intermediate_size=4 * width, max_position_embeddings=context, head="classification",
                  labels=("0", "1"))  # fmt: skip
    model = build(config, scan_layers=layers > 5)
    return model, jax.tree.map(np.asarray, model.init(jax.random.key(0)))


def module_of(model, params, density: float, seed: int) -> Module:
    """Draw a module with values about as large as trained ones."""
    layout = layout_of(model)
    values_N = np.random.default_rng(seed).normal(scale=0.02, size=layout.size).astype(np.float32)
    found = sparse(values_N, density)
    return from_places(layout, found["place"], found["value"], params, attribute=f"attribute {seed}")


def mixed(config: Config) -> list[dict[str, Any]]:
    """Time the ways to answer a batch of four sets."""
    model, params = encoder(config.width, config.layers, config.vocab_size, config.tokens)
    modules = {name: module_of(model, params, config.density, seed) for seed, name in enumerate(("age", "gender"))}
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, config.vocab_size, (config.batch, config.tokens)).astype(np.int32),
             "length": np.full(config.batch, config.tokens, np.int32)}  # fmt: skip
    even = [SETS[i % len(SETS)] for i in range(config.batch)]
    drawn = [SETS[i] for i in rng.integers(0, len(SETS), config.batch)]
    servers = {rows: Modular(model, params, modules, rows=rows, slots=4) for rows in config.buckets}
    one = next(iter(servers.values()))
    plain, ready = jax.jit(model.batch_logits), {names: one.params(names) for names in SETS}
    expected = {names: np.asarray(plain(on, batch)) for names, on in ready.items()}

    def loop():
        found = [np.asarray(plain(ready[names], {n: c[i :: len(SETS)] for n, c in batch.items()}))
                 for i, names in enumerate(SETS)]  # fmt: skip
        return np.stack(found, axis=1).reshape(config.batch, -1)

    def merging(rows: int = 4):
        """Merge for every one of the first rows, which differ; the time is scaled to the batch."""
        for i in range(rows):
            on = jax.tree.map(jax.numpy.asarray, merged(params, {name: modules[name] for name in even[i]}))
            jax.block_until_ready(plain(on, {name: column[i : i + 1] for name, column in batch.items()}))

    ways: dict[str, tuple[Callable[[], Any], list | None, float]] = {
        "rows that agree": (lambda: plain(ready[("age",)], batch), None, 1.0),
        "loop over sets": (loop, even, 1.0),
        "merging for every row": (merging, None, config.batch / 4),
    }
    for rows, server in servers.items():
        ways[f"mixed evenly, buckets of {rows}"] = (functools.partial(server.mixed, batch, even), even, 1.0)
        ways[f"mixed at random, buckets of {rows}"] = (functools.partial(server.mixed, batch, drawn), drawn, 1.0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differences: dict[str, float | None] = {}
    for name, (function, mix, _) in ways.items():  # compile, and compare
        found = np.asarray(jax.block_until_ready(function()))
        wanted = None if mix is None else np.stack([expected[names][b] for b, names in enumerate(mix)])
        differences[name] = None if mix is None else float(np.abs(found - wanted).max())
    for _ in range(config.repeats):
        for name, (function, _, scale) in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(scale * (time.perf_counter() - began))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {"name": name, "milliseconds": 1e3 * value, "ratio": value / median["rows that agree"],
         "largest_difference": differences[name]}
        for name, value in median.items()
    ]  # fmt: skip


def base_files(config: Config) -> list[dict[str, Any]]:
    """Time saving, loading and merging a module of a BERT-base-shaped model, and the digest of that base."""
    model, params = encoder(768, 12, 30522, 512)
    module = module_of(model, params, config.density, 0)
    timed: dict[str, list[float]] = {}

    def clock(name: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        timed.setdefault(name, []).append(time.perf_counter() - began)
        return result

    with tempfile.TemporaryDirectory() as scratch:
        files = {dtype: Path(scratch) / f"{dtype}.safetensors" for dtype in DTYPES}
        for dtype, file in files.items():
            for _ in range(3):
                clock(f"save, {dtype}", save_module, file, module, dtype)
                loaded = clock(f"load, {dtype}", load_module, file)
                clock(f"merge, {dtype}", merged, params, {"a": loaded})
                clock(f"load and merge, {dtype}", lambda file: merged(params, {"a": load_module(file)}), file)
        clock("digest of the base, once a process", digest, params)
        sizes = {dtype: file.stat().st_size / 1e6 for dtype, file in files.items()}
    return [
        {"name": f"BERT-base shape, {layout_of(model).size / 1e6:.1f} M: {name}",
         "milliseconds": 1e3 * statistics.median(values), "megabytes": sizes.get(name.rpartition(", ")[2])}
        for name, values in timed.items()
    ]  # fmt: skip


if __name__ == "__main__":
    command.main(run, PRESETS)
