"""The sets, the model and its training that influence is asked about, from flags; commands and the truth share them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from jaxforget import checks
from jaxforget.data import kinds, skills
from jaxforget.data.sources import Record, content_id
from jaxforget.data.text import TextConfig, encode, read, tokenizer_texts
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.influence.question import Question
from jaxforget.report.run import from_plain
from jaxforget.training.objectives import drawn_token, next_token, next_token_with_kl
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from
from jaxforget.training.step import Objective

HEADS = ("causal", "seq2seq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Which sets, which model, and how it was trained."""

    train: tuple[str, ...] = ()
    """Training datasets, each as NAME=FILE. Not given: the generated corpus."""
    test: tuple[str, ...] = ()
    """Queries, each as NAME=FILE: sets whose loss is to be traced."""
    generated: Literal["kinds", "A", "B"] = "kinds"
    """Corpus that is generated without --train: five kinds of text with a query of each (data/kinds.py), or the paper's
    study, where sets share a skill or a form with one test (data/skills.py): A counts, B deletes characters."""
    rows: int = skills.ROWS
    """Records of each generated set, at most."""
    model: str | None = None
    """The model that was trained on all datasets, as a Hugging Face directory or hub name. Not given: train it."""
    base: str | None = None
    """Without --model: fine-tune this model on all datasets; from scratch when not given, see --size.*"""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the training text."""
    seed: int = 0
    """Seed of initialisation and of data order, in training and in unlearning."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    training: TrainConfig = TrainConfig(epochs=12, learning_rate=3e-3)
    size: SizeConfig = SizeConfig(width=64, context=64, vocab_size=512)


def settings_of(directory: Path) -> StudyConfig:
    """Read what a run of train.untrac asked about. Raises UserError where there is none."""
    try:
        about = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if about["command"] == "train.untrac":
            return from_plain(StudyConfig, about["config"]["study"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{directory} is no --out of train.untrac")


class Study(NamedTuple):
    """What `StudyConfig` says, read."""

    start: Start
    train: dict[str, Examples]
    queries: dict[str, Examples]

    @property
    def objective(self) -> Objective:
        return next_token(self.start.model)

    def question(self, params: Any, seed: int, checkpoints: tuple = ()) -> Question:
        """Ask about these parameters."""
        model = self.start.model
        anchored = next_token_with_kl(model) if model.config.head == "causal" else None
        return Question(self.objective, {"model": params}, self.train, self.queries, seed, checkpoints,
                        math.log(model.vocab_size), anchored, drawn_token(model))  # fmt: skip


def read_study(config: StudyConfig, tell: Callable[[str], None]) -> Study:
    """Read and check everything, or raise UserError."""
    if config.model and config.base:
        raise UserError("--model and --base exclude each other; --model is traced as it is, --base is trained first")
    checks.at_least(0, named="--", seed=config.seed)
    if config.train or config.test:
        files = {flag: named(flag, getattr(config, flag)) for flag in ("train", "test")}
        train, test = ({name: read(file, config.text) for name, file in part.items()} for part in files.values())
        texts = [text for records in train.values() for text in tokenizer_texts(records, config.text)]
    else:
        if config.generated == "kinds":
            train, test = kinds.generate(config.rows)
            known = [train]
        else:
            train, test = skills.generate(config.generated, config.rows)
            known = [part for corpus in skills.CORPORA for part in skills.generate(corpus)]  # one tokenizer for both
        texts = [text for part in known for records in part.values() for text in tokenizer_texts(records, config.text)]
    for sentence in overlaps(train, test):
        tell(sentence)
    start = start_from(config.model or config.base, tokenizer_name=config.tokenizer, size=config.size,
                       compute=config.compute, texts=texts, tell=tell)  # fmt: skip
    return encoded(config, start, train, test, tell)


def encoded(config: StudyConfig, start: Start, train: Mapping[str, Sequence[Record]],
            test: Mapping[str, Sequence[Record]], tell: Callable[[str], None]) -> Study:  # fmt: skip
    """Tokenise the records of a study."""
    head = start.model.config.head
    if head not in HEADS:
        raise UserError(f"{config.model or config.base} has a {head} head; influence needs one of {', '.join(HEADS)}")

    def tokens(sets):
        return {
            name: encode(records, start.tokenizer, config.text, context=start.model.max_length, where=name, tell=tell,
                         task=head, start_id=getattr(start.model.config, "decoder_start_token_id", 0))
            for name, records in sets.items()
        }  # fmt: skip

    return Study(start, tokens(train), tokens(test))


def named(flag: str, values: Sequence[str]) -> dict[str, str]:
    """Split NAME=FILE. Raises UserError for what is malformed or stands there twice."""
    if not values:
        raise UserError(f"--{flag} is missing; give --train and --test as NAME=FILE, or neither for a generated corpus")
    files: dict[str, str] = {}
    names: dict[Any, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file) or "/" in name:
            raise UserError(f"--{flag} {value}: give NAME=FILE, where NAME has no slash")
        if name in files:
            raise UserError(f"--{flag} names {name!r} twice; every dataset needs a name of its own")
        path, colons, choice = file.partition("::")
        place = (str(Path(path).resolve()), choice) if Path(path).exists() else (path, choice)
        if place in names:
            raise UserError(f"--{flag} gives {file} twice, as {names[place]!r} and as {name!r}; give each dataset once")
        files[name], names[place] = file, name
    return files


def overlaps(train: Mapping[str, Sequence[Record]], test: Mapping[str, Sequence[Record]]) -> list[str]:
    """Say which queries hold records of which datasets, compared by content."""

    def contents(records):
        return {content_id(record.prompt, record.text) for record in records}

    known, sentences = {name: contents(records) for name, records in train.items()}, []
    for query, records in test.items():
        mine = contents(records)
        for name, theirs in known.items():
            if shared := len(mine & theirs):
                sentences.append(f"warning: {shared} of {len(mine)} records of query {query} are also in dataset "
                                 f"{name}, whose influence is then that of training on the test")  # fmt: skip
    return sentences
