"""Measure what a classifier's representation tells of attributes: `python -m eval.leakage --model DIR --data FILE …`.

Fresh attackers train on frozen embeddings of the model, with each module on, with all, and after LEACE. Beside every
leakage stands the label-only floor: what the gold task label alone tells, below which leakage falls only at the price
of the task. Group fairness of the task's decisions comes with it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxforget import command
from jaxforget.data.text import TextConfig
from jaxforget.data.tokens import check_vocabulary, load_tokenizer
from jaxforget.debiasing.composition import COMPOSITIONS, warnings, with_required
from jaxforget.debiasing.data import DataConfig, encode_sets, read_sets
from jaxforget.debiasing.modules import load_modules
from jaxforget.debiasing.page import write_report
from jaxforget.debiasing.testbed import Testbed, measured
from jaxforget.debiasing.token_ids import TOKENS, read_vocabulary
from jaxforget.errors import UserError
from jaxforget.metrics.leakage import AttackConfig
from jaxforget.models import hub
from jaxforget.models.adapters import digest
from jaxforget.report.run import Run
from jaxforget.training.start import require_classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what a classifier's representation tells of attributes."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    model: str | None = None
    """Hugging Face directory or hub name of a classifier: the base of the modules."""
    modules: tuple[Path, ...] = ()
    """Files of modules for this base."""
    compose: str = "sum"
    """How several modules are joined: sum, mean or nonzero_mean."""
    seeds: int = 1
    """Attacks on every embedding, each by fresh attackers."""
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    sets: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    attack: AttackConfig = AttackConfig()


def default() -> Config:
    """attack a classifier with and without its modules"""
    return Config()


PRESETS = {"default": default}


def run(config: Config) -> None:
    """Embed, attack, compare."""
    if config.model is None:
        raise UserError("--model is missing; give a classifier")
    if config.compose not in COMPOSITIONS:
        raise UserError(f"--compose is {config.compose!r}; valid names are {', '.join(COMPOSITIONS)}")
    command.at_least(1, seeds=config.seeds)
    out = Run("eval.leakage", config, config.out, False)
    model, params = hub.load(config.model)
    require_classifier(model, config.model)
    params, _, modules = with_required(params, load_modules(config.modules, digest(params)))
    sets, names, text = read_sets(config.sets, config.text)
    vocabulary = tokenizer = None
    if config.sets.token_ids:
        vocabulary = read_vocabulary(hub.resolve(config.model) / TOKENS)
    else:
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(tokenizer, model.vocab_size, config.model)
    encoded = encode_sets(sets, names, text, model, tokenizer, vocabulary, command.say)
    testbed = Testbed(encoded, names, model.config.labels)
    for message in warnings(modules):
        command.say(message)
    out.begin()
    rows = measured(testbed, model, params, modules, config.compose, config.attack, config.seeds)
    document = out.finish(rows, labels=model.config.labels, attributes=names)
    write_report(out.directory, testbed, rows, document, f"What {Path(config.model).name} tells")
    command.print_table(rows, testbed.fields(), f"eval.leakage · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
