"""Score saved models on forget, retain, approximate and general sets: `python -m eval.unlearning --models DIR ...`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxforget import command
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.data.tokens import check_vocabulary, load_tokenizer
from jaxforget.errors import UserError
from jaxforget.models import hub
from jaxforget.report.run import Run
from jaxforget.training.stage import finished
from jaxforget.training.start import ComputeConfig, require_causal
from jaxforget.unlearning.page import TERMINAL, write_report
from jaxforget.unlearning.scoring import COST, gaps, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Score saved models with the metrics of train.unlearn."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Redo an unfinished evaluation in --out; settings must be the same."""
    models: tuple[str, ...] = ()
    """Hugging Face directories or hub names. A row's name is the last part of its path."""
    retrained: str | None = None
    """The model trained without the forget set: the yardstick for gaps."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: each model's own."""
    forget: str | None = None
    """Records that were to be forgotten."""
    retain: str | None = None
    """Records that must stay known."""
    approximate: str | None = None
    """Never-trained records of the same kind: the non-members of the attacks."""
    general: str | None = None
    """Other text."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()


def default() -> Config:
    """score the models given"""
    return Config()


def run(config: Config) -> None:
    """Read, score, report."""
    if not config.models:
        raise UserError("--models is missing; give one or more model directories")
    if not config.forget:
        raise UserError("--forget is missing; give the records that were to be forgotten")
    out = Run("eval.unlearning", config, config.out, config.resume)
    names = ("forget", "retain", "approximate", "general")
    records = {name: read(getattr(config, name), config.text) for name in names if getattr(config, name)}
    paths = ([config.retrained] if config.retrained else []) + list(config.models)
    loaded = [(path, *hub.load(path)) for path in paths]
    out_rows, encoded = [], {}
    for path, model, params in loaded:
        require_causal(model, path)
        tokenizer = load_tokenizer(config.tokenizer or path)
        check_vocabulary(tokenizer, model.vocab_size, path)
        sets = {
            name: encode(part, tokenizer, config.text, context=model.max_length, where=name, tell=command.say)
            for name, part in records.items()
        }
        encoded[path] = (config.compute.apply(model), params, sets)
    out.begin()
    for path, (model, params, sets) in encoded.items():
        record = finished(Path(path)) or {}
        cost = {field: record.get(field) for field in COST}
        name = "retrained" if path == config.retrained else Path(path).name
        name = path if any(row["name"] == name for row in out_rows) else name
        out_rows.append({"name": name, "path": path, **score(model, params, sets), **cost})
    yardstick = out_rows[0] if config.retrained else None
    for row in out_rows:
        row.update(gaps(row, yardstick))
        if yardstick and yardstick["train_flops"] and row["train_flops"]:
            row["flops_vs_retraining"] = row["train_flops"] / yardstick["train_flops"]
    document = out.finish(out_rows)
    write_report(out.directory / "report.html", "Unlearning, evaluated", out_rows, [], document["config"])
    command.print_table(out_rows, TERMINAL, f"eval.unlearning · {out.directory}")


if __name__ == "__main__":
    command.main(run, {"default": default})
