"""What chosen models go through: test halves, rounded weights, relearning, requests in a row; exact deletion beside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.unlearning.config import Config
from benchmarks.unlearning.models import loaded, side_by_side
from benchmarks.unlearning.study import Half, Study, asked_of, halved, look, said
from jaxforget import command
from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig
from jaxforget.data.tokens import Examples
from jaxforget.files import write_atomic
from jaxforget.metrics import benchmark
from jaxforget.metrics.evidence import Evidence, Reader, Scored
from jaxforget.models import hub
from jaxforget.models.quantize import quantized
from jaxforget.report.run import Run
from jaxforget.sisa.deletion import ask, serve
from jaxforget.sisa.ensemble import Ensemble, locked
from jaxforget.sisa.ledger import NAME
from jaxforget.sisa.scoring import ensemble_token_scores
from jaxforget.training.lora import moving_parts
from jaxforget.training.start import tokenizer_files
from jaxforget.unlearning.sweep import grid, sweep
from train import sisa


def relearn(config: Config, study: Study, names: Sequence[str], models: Mapping[str, list[Path]]) -> list:
    """Tune every model but the original on the forget set again, side by side; measure the test half on the way."""
    runs = [(name, seed) for name in names if name != "original" for seed in range(config.seeds)]
    points = []

    def watch(k: int, step: int, params) -> None:
        points.append({"name": runs[k][0], "seed": runs[k][1], "step": step, **look(study, study.test, params)})

    forget = study.setting.sets["forget"]
    start_K = [loaded(study, models[name][seed]) for name, seed in runs]
    side_by_side(config, study, "relearning", start_K, [forget] * len(runs), [seed for _, seed in runs], config.relearn,
                 watch, config.relearn_every)  # fmt: skip
    return points


def test(config: Config, study: Study, path: Path) -> dict[str, Any]:
    """Measure a model on the test half: items of the metrics, and what it knows with its weights in fewer bits."""
    params, one = loaded(study, path), study.test
    items = benchmark.measure(study.metrics, study.reported, one.reader, params, one.sets, config.measures)
    bits: dict[str, Any] = {}
    for width in (32, *config.bits):
        weights = params if width == 32 else quantized(one.reader.model, params, width)
        found = look(study, one, weights)
        bits |= {f"{name}_{width}bit": found[name] for name in ("memorisation", "es", "utility")}
    return {"items": items, "bits": bits}


# ------------------------------------------------------------------------------------------------ requests
class Asked(NamedTuple):
    """A request to forget some records. half: the test records of this request and those before, and what must stay."""

    records: list[Record]
    examples: Examples
    half: Half


def requests_of(config: Config, study: Study) -> list[Asked]:
    """Cut the forget set in parts, the test half evenly, by a hash of the ids."""
    if not config.requests:
        return []
    setting, test = study.setting, study.test
    by_half = [record.id for half in halved(setting.records).values() for record in half]
    part_of = {identity: rank % config.requests for rank, identity in enumerate(by_half)}
    found = []
    for number in range(config.requests):
        records = [record for record in setting.records if part_of[record.id] == number]
        forget = setting.sets["forget"]
        examples = forget.take(np.flatnonzero([part_of[identity] == number for identity in forget.ids]))
        sets = {**test.sets, "forget": [one for one in test.sets["forget"] if part_of[one.id] <= number]}
        reader = Reader(test.reader.model, test.reader.tokenizer, test.reader.text)
        found.append(Asked(records, examples, Half(sets, reader, asked_of(reader, sets))))
    return found


def serve_requests(config: Config, out: Run, study: Study, parts: Sequence[Asked], original: Sequence[Path],
          models: Sequence[Path], name: str, swept: Mapping[str, Any] | None) -> list[dict[str, Any]]:  # fmt: skip
    """Unlearn one request after another, each from the model before, all seeds side by side; measure after each.

    A yardstick serves none: it is measured on the same records.
    """
    if swept is None:
        return [{"name": name, "seed": seed, "request": number, **look(study, one.half, params)}
                for seed, params in enumerate(loaded(study, path) for path in models)
                for number, one in enumerate(parts, 1)]  # fmt: skip
    chosen = swept["chosen"]
    epoch = -(-len(study.setting.sets["forget"]) // config.unlearning.batch_size)
    training = dataclasses.replace(config.unlearning, epochs=max(1, round(chosen["step"] / epoch)))
    params_K, points = [loaded(study, path) for path in original], []
    for number, one in enumerate(parts, 1):
        settings = [study.setting._replace(params=params, seed=seed, cache=out.directory / "reference",
                                           sets={**study.setting.sets, "forget": one.examples}, records=one.records)
                    for seed, params in enumerate(params_K)]  # fmt: skip
        runs = grid(study.methods[name], settings, (chosen["learning_rate"],), (chosen["strength"],))
        moving = moving_parts(config.trainable, config.lora)
        params_K = sweep(study.methods[name], runs, training, moving, how=config.members).params
        points += [{"name": name, "seed": seed, "request": number, **look(study, one.half, params)}
                   for seed, params in enumerate(params_K)]  # fmt: skip
    return points


# ---------------------------------------------------------------------------------------------------- exact
def shard_models(config: Config, out: Run, study: Study, seed: int) -> Path:
    """Train an ensemble on all records, what is missing of it. Returns its directory."""
    directory, start = out.directory / "sisa" / f"seed{seed}", study.start
    home = directory / "ensemble"
    if not (home / NAME).exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        base = hub.save(directory / "start", start.model, start.params(seed),
                        extra_files=tokenizer_files(start.save_tokenizer))  # fmt: skip
        known = [dataclasses.replace(one, id=f"{name} {one.id}") for name, some in study.records.items()
                 if name != "general" or config.base is None for one in some]  # fmt: skip
        files = []
        for name, plain_text in (("questions", False), ("texts", True)):
            lines = [json.dumps({"id": one.id, "text": one.text} if plain_text else
                                {"id": one.id, "question": one.prompt, "answer": one.text}) + "\n"
                     for one in known if (one.prompt is None) == plain_text]  # fmt: skip
            if lines:
                write_atomic(directory / f"{name}.jsonl", "".join(lines))
                files.append(str(directory / f"{name}.jsonl"))
        text = TextConfig(id_field="id", max_length=config.text.max_length, prompt_template=config.text.prompt_template)
        settings = sisa.Config(out=home, data=tuple(files), model=str(base), shards=config.shards,
                               slices=config.slices, seed=seed, text=text, train=config.train, compute=config.compute,
                               members=config.members, export=False)  # fmt: skip
        sisa.plan(settings, Run("train.sisa", settings, home, False))
    with Ensemble(home) as ensemble, locked(home, wait=True, tell=command.say):
        serve(ensemble, export=False)
    return home


@contextlib.contextmanager
def copied(home: Path) -> Iterator[Ensemble]:
    """Open a copy of an ensemble, to delete from."""
    copy = home.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    with Ensemble(copy) as ensemble, locked(copy, wait=True, tell=command.say):
        yield ensemble
    shutil.rmtree(copy)


def delete(ensemble: Ensemble, records: Sequence[Record]) -> dict[str, Any]:
    """Delete records of the forget set exactly. Returns the receipt."""
    ensemble.ledger.receive(ask(ensemble, [f"forget {one.id}" for one in records]).new)
    (receipt,) = serve(ensemble, export=False)
    return receipt


def exact(config: Config, out: Run, study: Study, seed: int) -> dict[str, Any]:
    """Delete the forget set from a SISA ensemble: what it knows before, after, and while tuned on that set again."""
    with copied(shard_models(config, out, study, seed)) as ensemble:
        before = voted(study, study.test, ensemble)
        receipt = delete(ensemble, study.records["forget"])
        after = voted(study, study.test, ensemble)
        points = relearn_together(config, study, ensemble, seed) if config.relearn_every else []
    cost = {"deletion_seconds": receipt["seconds"],
            "deletion_share": receipt["examples_revisited"] / receipt["examples_of_full_retraining"]}  # fmt: skip
    return {"before": before, "after": {**after, **cost}, "relearned": points}


def relearn_together(config: Config, study: Study, ensemble: Ensemble, seed: int) -> list[dict[str, Any]]:
    """Tune every member on the forget set again, and measure their vote on the way."""
    start_K, weight_K = members_of(ensemble)
    points, last = [], len(start_K) - 1
    found: list[Any] = []

    def watch(k: int, step: int, params) -> None:
        found.append(params)
        if k == last:
            points.append({"name": "sisa", "seed": seed, "step": step, **vote(study, study.test, found, weight_K)})
            found.clear()

    forget = study.setting.sets["forget"]
    whole = dataclasses.replace(config, width=0)
    side_by_side(whole, study, "relearning of shards", start_K, [forget] * len(start_K), [seed] * len(start_K),
                 config.relearn, watch, config.relearn_every)  # fmt: skip
    return points


def serve_exactly(config: Config, out: Run, study: Study, parts: Sequence[Asked]) -> list[dict[str, Any]]:
    """Delete one request after another from ensembles of the seeds that choose; measure after each."""
    points = []
    for seed in range(config.choosing_seeds or config.seeds):
        with copied(shard_models(config, out, study, seed)) as ensemble:
            for number, one in enumerate(parts, 1):
                delete(ensemble, one.records)
                found = voted(study, one.half, ensemble)
                points.append({"name": "sisa", "seed": seed, "request": number, **found})
    return points


def members_of(ensemble: Ensemble) -> tuple[list[Any], np.ndarray]:
    """Return the parameters and the weights of those that vote."""
    return [ensemble.params(shard) for shard in ensemble.final_keys()], ensemble.weights()


def voted(study: Study, half: Half, ensemble: Ensemble) -> dict[str, Any]:
    return vote(study, half, *members_of(ensemble))


def vote(study: Study, half: Half, params_K: Sequence[Any], weight_K: np.ndarray) -> dict[str, Any]:
    """Return what models know of a half together: the mean of their probabilities."""
    scored = {}
    for name, examples in half.asked.scored.items():
        scores = ensemble_token_scores(study.start.model, params_K, examples, "mean_probability", weight_K)
        scored[name] = Scored(examples, scores, np.zeros_like(scores.logp_NT))
    return said(Evidence(scored, {}, {}), half.reader, half.sets, study.measures)
