"""Train modules that take attributes out of a classifier: `python -m train.debias --data FILE --attributes COLUMN …`.

Leaves the classifier as a Hugging Face directory in OUT/core and a sparse module for every attribute in OUT/modules.
Any set of them can be switched on later, in one batch too (jaxforget/debiasing/serving.py); off is the core, bit for
bit. With --core and --dp.* modules are differentially private. Without --data it trains on generated reviews.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxforget import command
from jaxforget.data.sampling import hash_int
from jaxforget.data.tasks import class_names
from jaxforget.data.text import TextConfig, tokenizer_texts
from jaxforget.debiasing.composition import merged, sets_of, warnings, with_required
from jaxforget.debiasing.data import DataConfig, encode_sets, read_sets
from jaxforget.debiasing.differences import budget, layout_of
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.modules import from_places, inspect, load_modules, save_module
from jaxforget.debiasing.objective import RemovalConfig
from jaxforget.debiasing.page import write_report
from jaxforget.debiasing.removal import REMOVALS
from jaxforget.debiasing.run import Learner, ModuleConfig, Slots, train_fixed, train_gated, train_whole
from jaxforget.debiasing.testbed import Testbed, measured
from jaxforget.debiasing.token_ids import TOKENS, read_vocabulary, scratch_tokens, token_vocabulary, tokens_start
from jaxforget.errors import UserError
from jaxforget.files import remove
from jaxforget.metrics.leakage import AttackConfig
from jaxforget.models import hub
from jaxforget.models.adapters import digest
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.noise import gaussian_noise
from jaxforget.privacy.recipe import PrivateRun, phase_batches, private_run
from jaxforget.report.page import figure, plots, table
from jaxforget.report.run import Run, plain
from jaxforget.training.ensemble import Members
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, require_classifier, start_from, tokenizer_files

TASK = "task"  # the module that is the task itself
PRIVATE = 0x50524956  # what a hash is for
PROMISE = (
    "Holds for all modules of this run together, both phases of each, as long as --seed is secret: who knows it can "
    "repeat the noise. Not for the core, for choices made by looking at several runs, for the names of classes and "
    "attributes, and for the numbers written beside the modules."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train modules that take attributes out of a classifier."""

    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    model: str | None = None
    """Hugging Face directory or hub name to fine-tune as the core. Default: from scratch, see --size.*"""
    core: str | None = None
    """A finished classifier: modules are trained for it as it is."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name. Default: the model's own, or one built from the training text."""
    density: float = 0.01
    """Share of the parameters that a module may change, above 0 and at most 1."""
    task_epochs: int = 5
    """Passes of the core over the task, at --core-rate, before the regime post."""
    task_density: float = 0.0
    """Above 0: the core keeps its starting weights, and the task is a module of this density over them, named task."""
    merge: bool = False
    """Train one module that takes out all attributes, instead of one for each."""
    compose: Literal["sum", "mean", "nonzero_mean"] = "sum"
    """How several modules are joined where they are measured together."""
    store: Literal["float32", "float16"] = "float32"
    """Precision of the values in module files."""
    export: bool = False
    """Also write the model with each measured set of modules on as a Hugging Face directory, in merged/."""
    seed: int = 0
    """Seed of initialisation, data order, gates and attackers."""
    members: Members = "auto"
    """How one program trains several modules; auto is one after the other (map) on a CPU and vmap elsewhere."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    sets: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    text: Annotated[TextConfig, tyro.conf.arg(name="")] = TextConfig()
    size: SizeConfig = SizeConfig(width=64, layers=1, context=40, vocab_size=4096)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig()
    module: Annotated[ModuleConfig, tyro.conf.arg(name="")] = ModuleConfig()
    gates: GateConfig = GateConfig()
    removal: Annotated[RemovalConfig, tyro.conf.arg(name="")] = RemovalConfig()
    attack: AttackConfig = AttackConfig()
    dp: PrivacyConfig = PrivacyConfig()


SCRATCH = ModuleConfig(epochs=8, fixed_epochs=6, learning_rate=1e-3, adversary_rate=1e-3, core_rate=1e-3)


def default() -> Config:
    """a small encoder from scratch on generated reviews, two attributes, about a minute on two CPU cores"""
    return Config(
        density=0.05, task_epochs=4, module=SCRATCH, removal=RemovalConfig(scale=3.0), attack=AttackConfig(epochs=15),
        size=SizeConfig(width=32, layers=1, context=16, vocab_size=512),
    )  # fmt: skip


def smoke() -> Config:
    """a tiny encoder, seconds"""
    return dataclasses.replace(
        default(), task_epochs=2, module=dataclasses.replace(SCRATCH, epochs=2, fixed_epochs=1),
        size=SizeConfig(width=16, layers=1, heads=2, context=16, vocab_size=320), attack=AttackConfig(epochs=2),
        sets=DataConfig(records=300),
    )  # fmt: skip


def paper() -> Config:
    """bert-base-uncased at the rates of the released code; wants an accelerator"""
    return Config(model="bert-base-uncased", task_epochs=15)


PRESETS = {"default": default, "smoke": smoke, "paper": paper}


def run(config: Config) -> None:
    """Read, train the core and its modules, measure."""
    check(config)
    out = Run("train.debias", config, config.out, config.resume)
    sets, names, text = read_sets(config.sets, config.text)
    if unlike := sorted({"core", TASK, "LEACE"} & set(names)):
        raise UserError(f"attribute {unlike[0]} has the name of something else; rename the column")
    if unlike := [name for name in names if "/" in name]:
        raise UserError(f"attribute {unlike[0]} cannot name a file; rename the column")
    start, vocabulary = start_of(config, sets, text)
    model, labels = start.model, start.model.config.labels
    size = layout_of(model, config.module.differs).size  # tells a pattern that matches nothing
    for density in (config.density, *[config.task_density] * bool(config.task_density)):
        budget(density, size)
    encoded = encode_sets(sets, names, text, model, start.tokenizer, vocabulary, command.say)
    testbed = Testbed(encoded, names, labels)
    private = private_modules(config, testbed) if config.dp.private else None
    out.begin()
    core, files = train(config, out, start, testbed, private)
    core, base, modules = with_required(core, load_modules(files, digest(core)))
    for message in warnings(modules):
        command.say(message)
    rows = measured(testbed, model, core, modules, config.compose, config.attack, 1)
    for row in rows:
        if row["name"] in modules:
            row |= {name: value for name, value in inspect(modules[row["name"]]).items()
                    if name in ("density", "achieved_density", "nonzeros", "bytes", "share_by_part")}  # fmt: skip
            row |= private.about if private else {}
    for chosen in sets_of(modules) if config.export else []:
        target = out.directory / "merged" / "+".join(chosen)
        remove(target)  # of a run that was killed
        hub.save(target, model, merged(core, {n: modules[n] for n in chosen}, config.compose),
                 extra_files=tokenizer_files(start.save_tokenizer))  # fmt: skip
    document = out.finish(rows, labels=labels, attributes=names, modules=[str(file.name) for file in files])
    stages: dict[str, list[tuple[int, float]]] = {}
    for line in out.metrics():
        if "density" in line:
            stages.setdefault(line["stage"], []).append((line["step"], float(np.mean(line["density"]))))

    def curves(axes):
        for stage, points in stages.items():
            axes.semilogy(*zip(*points, strict=True), ".-", label=stage)
        axes.set(xlabel="step", ylabel="share of gates open, mean over modules")
        axes.legend()

    sizes = [{"name": name, **inspect(module)} for name, module in (base | modules).items()]
    columns = ("name", "density", "achieved_density", "nonzeros", "bytes")
    note = "Share of gates open without noise, by epoch of the first phase; pruning cuts to the budget."
    sections = [("Density", note, table(sizes, columns) + (plots(figure(curves)) if stages else ""))]
    if private:
        promise = {name.removeprefix("dp_"): value for name, value in private.about.items() if value is not None}
        sections.append(("Differential privacy", PROMISE, table([{"name": config.dp.sampler, **promise}],
                                                                ("name", *promise))))  # fmt: skip
    write_report(out.directory, testbed, rows, document, f"Modules for {', '.join(names)}", sections)
    fields = (*testbed.fields(), "achieved_density")
    command.print_table(rows, fields, f"train.debias · {out.directory}")


def check(config: Config) -> None:
    """Raise UserError for settings that cannot be used, before anything is read."""
    command.at_least(0, seed=config.seed, checkpoint_every=config.checkpoint_every)
    command.at_least(1, task_epochs=config.task_epochs)
    if not 0 < config.density <= 1:
        raise UserError(f"--density is {config.density}; it must be above 0 and at most 1")
    if not 0 <= config.task_density <= 1:
        raise UserError(f"--task-density is {config.task_density}; it must be between 0, for none, and 1")
    if config.module.regime == "task":
        raise UserError("--regime is task; it is post or par, and --task-density trains the task as a module")
    if config.core and config.model:
        raise UserError("--core and --model exclude each other: one is used as it is, the other is fine-tuned")
    if config.module.regime == "par" and (config.core or config.task_density):
        raise UserError("--regime par trains the core beside its modules; leave out --core and --task-density")
    if config.core and config.task_density:
        raise UserError("--core is finished; leave out --task-density")
    if not config.dp.private and config.dp != PrivacyConfig():
        raise UserError("--dp.* flags without --dp.epsilon or --dp.noise: training would not be private")
    if config.dp.private:
        check_private(config)
    if config.sets.token_ids and config.model:
        raise UserError("--token-ids has no tokenizer that fits --model; leave one of them out")


def check_private(config: Config) -> None:
    """Raise UserError for settings with which modules would not be private, or their noise not be accounted for."""
    if not config.core:
        raise UserError("--dp.* makes modules private, not what they are trained for; give a finished --core")
    if config.sets.balance:
        raise UserError("--balance keeps a record or not for what others say; leave it out with --dp.*")
    if REMOVALS[config.removal.removal].couples:
        others = " or ".join(name for name, removal in REMOVALS.items() if not removal.couples)
        raise UserError(f"--removal {config.removal.removal} compares the rows of a batch, so that clipping does not "
                        f"bound what one adds; with --dp.* use {others}")  # fmt: skip
    if config.dp.sampler == "cyclic":
        raise UserError("--dp.sampler cyclic correlates the noise of steps, and modules train in phases; use another")
    if config.dp.groups:
        raise UserError("--dp.groups names what moves, which is not the same in both phases; leave it out")
    if config.dp.estimator not in ("auto", "vmap"):
        raise UserError(f"--dp.estimator {config.dp.estimator} cannot see sparse differences; use vmap")


def private_modules(config: Config, testbed: Testbed) -> PrivateRun:
    """Account for all steps of both phases of all modules as one run."""
    epochs = len(targets_of(config, testbed)) * (config.module.epochs + config.module.fixed_epochs)
    settings = TrainConfig(epochs=epochs, batch_size=config.module.batch_size)
    dp = dataclasses.replace(config.dp, estimator="vmap")
    run = private_run(dp, settings, testbed.examples["train"], config.seed, "record")
    command.say("epsilon {dp_epsilon:.4g} at delta {dp_delta:.3g} for one {dp_unit} ({dp_relation}) and all modules, "
                "{dp_sampler} sampling, noise multiplier {dp_sigma:g}".format(**run.about))  # fmt: skip
    return run


def privately(run: PrivateRun, learners: list[Learner], places: list[int], phase: int, epochs: int):
    """Return the members of a phase, whose modules have these places among all, and their slots.

    Every module and phase has draws of its own, as noise that is added twice can be taken out again. Classes weigh by
    their number alone: their shares would tell of records past the clipping.
    """
    own = hash_int(run.batches.seed, PRIVATE)
    learners = [
        one._replace(seed=(own + 2 * place + phase) % 2**31, shares=[np.full_like(s, 1 / len(s)) for s in one.shares])
        for one, place in zip(learners, places, strict=True)
    ]
    batches = phase_batches(run, [one.examples for one in learners], [one.seed for one in learners], epochs)
    return learners, Slots(batches, run.gradient, gaussian_noise(), run.prepare)


def start_of(config: Config, sets, text: TextConfig) -> tuple[Start, dict[str, int] | None]:
    """Return model and tokenizer to start from, and the vocabulary of token ids if that is what is read."""
    labels = class_names(sets["train"], "training records")
    if not config.sets.token_ids:
        name = config.core or config.model
        start = start_from(
            name, tokenizer_name=config.tokenizer, size=config.size, compute=config.compute, tell=command.say,
            head=None if config.core else "classification", labels=() if config.core else labels,
            texts=tokenizer_texts(sets["train"], text),
        )  # fmt: skip
        require_classifier(start.model, name or "the model")
        return start, None
    if config.core:
        model, params = hub.load(config.core)
        require_classifier(model, config.core)
        vocabulary = read_vocabulary(hub.resolve(config.core) / TOKENS)
        return tokens_start(config.compute.apply(model), lambda seed: params, vocabulary), vocabulary
    vocabulary = token_vocabulary(sets["train"], config.size.vocab_size)
    return scratch_tokens(config.size, config.compute, vocabulary, labels), vocabulary


def train(
    config: Config, out: Run, start: Start, testbed: Testbed, private: PrivateRun | None
) -> tuple[Any, list[Path]]:
    """Train the core and the modules that OUT lacks; returns the core's parameters and the module files."""
    model, (core_dir, folder) = start.model, (out.directory / "core", out.directory / "modules")
    targets = targets_of(config, testbed)
    files = [folder / f"{name}.safetensors" for name in ([TASK] * bool(config.task_density) + list(targets))]
    if all(file.is_file() for file in files):
        return hub.load(config.core or core_dir)[1], files
    folder.mkdir(exist_ok=True)

    def stage(tag: str, function: Callable, *args, slots: Slots | None = None) -> Any:
        """Call a phase with its checkpoints, log and progress bar filled in."""
        with command.progress(tag) as show:
            return function(
                model, *args, how=config.members, show=show, checkpoints=out.directory / "checkpoints" / tag,
                checkpoint_every=config.checkpoint_every, resumed=lambda step: out.rewind(tag, step),
                log=lambda step, metrics: out.log(tag, step, metrics), slots=slots,
            )  # fmt: skip

    def phases(learners, module: ModuleConfig, density: float, before: str = "", after: str = "", places=()):
        first = last = (learners, None)
        if private:
            module = dataclasses.replace(module, max_grad_norm=0.0)  # it would be that of noise, mostly
            first = privately(private, learners, places, 0, module.epochs)
            last = privately(private, learners, places, 1, module.fixed_epochs)
        found = stage(f"{before}gates{after}", train_gated, first[0], module, config.gates, config.removal,
                      slots=first[1])  # fmt: skip
        return stage(f"{before}values{after}", train_fixed, last[0], found, density, module, config.removal,
                     slots=last[1])  # fmt: skip

    def save_core(params) -> None:
        remove(core_dir, *out.directory.glob(".core.*"))  # of a run that was killed
        hub.save(core_dir, model, params, extra_files=tokenizer_files(start.save_tokenizer))

    def save_modules(base, found: dict[str, dict[str, np.ndarray]], density: float, **about: Any) -> None:
        layout = layout_of(model, config.module.differs)
        for name, sparse in found.items():
            settings = {"module": plain(config.module), "gates": plain(config.gates), "removal": plain(config.removal)}
            module = from_places(layout, sparse["place"], sparse["value"], base, attribute=name, density=density,
                                 settings=settings, **about)  # fmt: skip
            save_module(folder / f"{name}.safetensors", module, config.store)

    def learner(params, attributes: tuple[int, ...], targets) -> Learner:
        return testbed.learner(params, attributes, targets, config.seed)

    about: dict[str, Any] = {"objective": config.removal.removal, "regime": config.module.regime}
    if private:
        about["privacy"] = plain({name.removeprefix("dp_"): value for name, value in private.about.items()})
    else:
        about["seed"] = config.seed  # that of private modules stays a secret
    if config.module.regime == "par":
        one = learner(start.params(config.seed), tuple(range(len(testbed.names))), tuple(targets.values()))
        [done] = phases([one], config.module, config.density)
        save_core(done.params)
        save_modules(done.params, dict(zip(targets, done.modules, strict=True)), config.density, **about)
        remove(out.directory / "checkpoints")
        return done.params, files

    core = start.params(config.seed)
    if config.task_density:
        settings = dataclasses.replace(config.module, regime="task")
        [(core, [task])] = phases([learner(core, (), ((),))], settings, config.task_density, before="task ")
        save_core(core)
        save_modules(core, {TASK: task}, config.task_density, objective=TASK, regime="post", seed=config.seed)
        layout = layout_of(model, config.module.differs)
        on = merged(core, {TASK: from_places(layout, task["place"], task["value"], core)})
        about["requires"] = [TASK]
    else:
        if not config.core and not core_dir.exists():
            task = learner(core, (), ((),))
            [core] = stage("core", train_whole, [task], config.module, config.removal, config.task_epochs)
            save_core(core)
        elif not config.core:
            core = hub.load(core_dir)[1]
        on = core
    # Members of one program have equally many classes.
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, target in targets.items():
        groups.setdefault(tuple(testbed.classes[j] for j in target), []).append(name)
    for number, group in enumerate(groups.values()):
        them = [learner(on, targets[name], (tuple(range(len(targets[name]))),)) for name in group]
        places = [list(targets).index(name) for name in group]
        done = phases(them, config.module, config.density, after=str(number), places=places)
        modules = {name: one.modules[0] for name, one in zip(group, done, strict=True)}
        save_modules(core, modules, config.density, **about)
    remove(out.directory / "checkpoints")
    return core, files


def targets_of(config: Config, testbed: Testbed) -> dict[str, tuple[int, ...]]:
    """Return the name of every module and the attributes that it takes out."""
    if config.merge:
        return {"+".join(testbed.names): tuple(range(len(testbed.names)))}
    return {name: (j,) for j, name in enumerate(testbed.names)}


if __name__ == "__main__":
    command.main(run, PRESETS)
