"""What the benchmark of unlearning methods can be told, and its presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxforget.data import fictional
from jaxforget.data.stereotyped import StereotypedConfig
from jaxforget.data.text import TextConfig
from jaxforget.metrics.benchmark import MeasureConfig
from jaxforget.training.ensemble import Members
from jaxforget.training.lora import LoraConfig
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare unlearning methods, each at its best of a sweep, with retraining."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    methods: tuple[str, ...] = ("all",)
    """Names from METHODS in jaxforget/unlearning/__init__.py; paper is the seven of arXiv 2402.15159, all is every
    one."""
    settings: tuple[str, ...] = ()
    """Method settings as method.field=value."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Rates of every method."""
    strengths: tuple[float, ...] = (0.5, 1.0, 4.0)
    """Factors of the weight of the retain term; methods without one have 1 alone."""
    checkpoints: int = 3
    """Evenly spaced steps of each run at which models are measured and may be chosen."""
    seeds: int = 3
    """Seeds of training and unlearning."""
    choosing_seeds: int = 0
    """So many seeds run all settings, and the others the one chosen on them; 0 is all seeds. From as many ensembles the
    requests are also deleted exactly, each at the cost of retraining."""
    base: str | None = None
    """Model to train both yardsticks from, as a Hugging Face directory or hub name. Not given: from scratch."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the retain text."""
    forget: str | None = None
    """Questions and answers to forget, with TOFU's paraphrased_answer and perturbed_answer."""
    retain: str | None = None
    """Questions and answers that stay in training."""
    retain_perturbed: str | None = None
    """Those of --retain that are measured, with the fields of --forget; --retain itself when not given."""
    approximate: str | None = None
    """Never-trained records of the same kind. Default: as many as --forget has, from the end of --retain, which are
    then left out of all training."""
    general: str | None = None
    """Other text that must stay known."""
    real_authors: str | None = None
    """TOFU's questions about real authors, with perturbed_answer."""
    world_facts: str | None = None
    """TOFU's questions about the world, with perturbed_answer."""
    stereoset: str | None = None
    """StereoSet, to measure side effects, as eval.bias reads it."""
    crows_pairs: str | None = None
    """CrowS-Pairs, likewise."""
    winobias: str | None = None
    """Directory of WinoBias, likewise."""
    texts: str | None = None
    """Texts whose loss is measured by group: text, or question and answer; group. Records to retain with a field
    'group' are measured anyway."""
    start_token: Literal["first", "always"] = "first"
    """Predict first tokens of stereotypes from the start token alone, or let it stand before the whole sentence."""
    resamples: int = 1000
    """Bootstrap resamples of stereotypes and texts."""
    metrics: tuple[str, ...] = ("language", "overall")
    """Metrics of eval.unlearning to report; overall is tofu, memorisation and membership."""
    validation_records: int = 60
    """Most records of a set in its validation half."""
    test_records: int = 200
    """Most records of a set in its test half."""
    bits: tuple[int, ...] = (8, 4)
    """Widths of quantised weights that chosen models are measured with."""
    relearn: TrainConfig = TrainConfig(epochs=1, learning_rate=1e-3, schedule="constant", warmup=0.0)
    """How chosen models are tuned on the forget set again."""
    relearn_every: int = 2
    """Steps between measurements meanwhile; 0 leaves this attack out."""
    shards: int = 4
    """Shards of the ensemble from which the forget set is deleted exactly (SISA); 0 leaves it out."""
    slices: int = 2
    """Slices of a shard."""
    requests: int = 5
    """Parts of the forget set that are also unlearned one after another; 0 leaves this out."""
    trainable: tuple[str, ...] = ()
    """Unlearn in parameters whose path matches one of these regular expressions alone."""
    lora: LoraConfig = LoraConfig(rank=0)
    members: Members = "auto"
    """How one program trains many models; auto is map on a CPU and vmap elsewhere."""
    width: int = 0
    """Models in one program, which bounds memory; 0 is all."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")
    measures: Annotated[MeasureConfig, tyro.conf.arg(name="measures")] = MeasureConfig(max_new_tokens=32)
    unlearning: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(
        epochs=6, learning_rate=0.0, schedule="constant", warmup=0.0
    )
    train: TrainConfig = TrainConfig(epochs=12, learning_rate=3e-3)
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    size: SizeConfig = SizeConfig()
    corpus: fictional.FictionalConfig = fictional.FictionalConfig()
    stereotyped: StereotypedConfig = StereotypedConfig(records=800, test_records=1, rate=0.9)
    """Sentences with a gender stereotype in the generated general text. Half as many at rate 0.8 are hardly learnt."""


def default() -> Config:
    """100 fictional people, a model of 0.3 M parameters, every method, 27 runs of each"""
    return Config()


def smoke() -> Config:
    """12 fictional people, a tiny model, three methods; two minutes, numbers without meaning"""
    return Config(
        methods=("gradient_ascent", "npo", "task_vector"), learning_rates=(1e-3, 1e-2), strengths=(1.0, 4.0), seeds=2,
        checkpoints=2, validation_records=12, test_records=12, bits=(4,), requests=2, shards=2,
        size=SizeConfig(width=32, layers=2, heads=2, context=64, vocab_size=512),
        corpus=fictional.FictionalConfig(people=12, general_records=40, general_test_records=20),
        stereotyped=StereotypedConfig(records=40, test_records=1), resamples=100,
        train=TrainConfig(epochs=15, learning_rate=5e-3), measures=MeasureConfig(max_new_tokens=12),
        unlearning=dataclasses.replace(Config().unlearning, epochs=4, batch_size=4),
        relearn=dataclasses.replace(Config().relearn, batch_size=4),
    )  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}
