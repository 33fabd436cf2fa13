"""Settings and presets of the measurement of speed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jaxforget import command
from jaxforget.errors import UserError
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig

Part = Literal["start", "families", "methods", "members", "inference"]
Family = Literal["gpt2", "llama", "opt", "gpt_neox", "bert", "roberta", "distilbert", "t5"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how fast everything is, beside peers."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure; `start` comes first."""
    families: tuple[Family, ...] = get_args(Family)
    """Families of the part `families`, all of the shape --size; gpt2 is measured in any case."""
    size: SizeConfig = SizeConfig(width=256, layers=4, heads=4, context=128, vocab_size=8192)
    """Shape of the models."""
    shard: SizeConfig = SizeConfig(width=64, layers=2, heads=4, context=64, vocab_size=2048)
    """Shape of a member of the part `members`, a GPT-2; --train.batch-size rows each."""
    members: int = 8
    """Members of an ensemble."""
    private_microbatch: int = 4
    """Rows at a time in private steps, jax_privacy's too."""
    generate: int = 8
    """Prompts of half the context, continued to its end."""
    steps: int = 2
    """Steps of a turn; batches of an evaluation."""
    repeats: int = 5
    """Turns, after one that warms up."""
    starts: int = 2
    """Processes that compile their first step, and as many after them that find it compiled."""
    product: int = 2048
    """Rows and columns of the matrices whose product is the peak where no peak of the device is stated."""
    peers: bool = True
    """Also PyTorch, Opacus and jax_privacy, where they are installed."""
    compute: ComputeConfig = ComputeConfig()
    train: TrainConfig = TrainConfig(epochs=1, learning_rate=1e-4, schedule="constant", warmup=0.0)


def cpu() -> Config:
    """width 256, 4 layers, vocabulary 8192: about five minutes on two CPU cores with all peers"""
    return Config()


def h200() -> Config:
    """GPT-2-small's shape in bfloat16, 32 rows of 1,024 tokens, for one large GPU; not run yet"""
    return Config(
        size=SizeConfig(width=768, layers=12, heads=12, context=1024, vocab_size=50257),
        shard=SizeConfig(width=256, layers=4, heads=4, context=128, vocab_size=8192),
        private_microbatch=8, generate=64, steps=8, repeats=7, product=8192, compute=ComputeConfig(dtype="bfloat16"),
        train=dataclasses.replace(Config.train, batch_size=32),
    )  # fmt: skip


def smoke() -> Config:
    """tiny models, one turn: seconds, numbers without meaning"""
    tiny = SizeConfig(width=16, layers=1, heads=2, context=16, vocab_size=64)
    return Config(
        families=("bert", "t5"), size=tiny, shard=tiny, members=3, private_microbatch=2, generate=2, steps=2,
        repeats=1, starts=1, product=64, peers=False, train=dataclasses.replace(Config.train, batch_size=4),
    )  # fmt: skip


PRESETS = {"cpu": cpu, "h200": h200, "smoke": smoke}


def check(config: Config) -> None:
    """Raise UserError for settings that cannot be measured."""
    counts = ("members", "private_microbatch", "generate", "steps", "repeats", "starts", "product")
    command.at_least(1, **{name: getattr(config, name) for name in counts})
    if not config.parts:
        raise UserError("--parts is empty; give one or more")
    for name, size in (("size", config.size), ("shard", config.shard)):
        if size.family is not None:
            raise UserError(f"--{name}.family is not for this command; --families says which are measured")
        if size.context < 4:
            raise UserError(f"--{name}.context is {size.context}; it must be at least 4")
    rows = config.train.batch_size
    if rows % 2:
        raise UserError(f"--train.batch-size is {rows}; half of the rows are to be forgotten, so it must be even")
    if rows % config.private_microbatch:
        raise UserError(f"--private-microbatch {config.private_microbatch} does not divide the batch of {rows}")
    if config.train.weight_decay or config.train.schedule != "constant" or config.train.warmup:
        raise UserError("--train.weight-decay 0, --train.schedule constant and --train.warmup 0 are what peers do here")
    config.train.microbatch_of(rows // 2)
