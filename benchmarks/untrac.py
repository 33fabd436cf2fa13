"""UnTrac, UnTrac-Inv and the baselines against retraining without each dataset (arXiv 2401.15241).

    python -m benchmarks.untrac --data DIR

Parts: `skills`, the paper's synthetic study on generated sets; `domains`, eleven text domains in equal and unequal
shares, with queries from ToxiGen, WinoBias, TruthfulQA and held-out text; `many`, three splits of every domain, so that
correlations have enough datasets to mean something; `speed`. Models are small and trained from scratch. DIR holds
corpora/<domain>.jsonl.gz, toxigen/prompts.tar.xz, winobias/ and truthfulqa/TruthfulQA.csv; `skills` needs none.

Truths and scores are cells, each a file: a killed run resumes there. Every learning rate tried is a row of its own;
none is chosen by what is reported. The paper's size, on an accelerator:

    python -m benchmarks.untrac --data DIR --parts domains --model facebook/opt-125m --scratch --length 1024 \
        --sequences 40000 --unlearned 10000 --query-rows 256 --training.batch-size 8 --training.epochs 1 \
        --training.learning-rate 5e-5 --retrain.width 4 --rates 5e-5 --inverse-rates 5e-5
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jaxforget import choice, command
from jaxforget.data import behaviours, skills
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.sources import Record, read_records
from jaxforget.data.text import TextConfig, encode, tokenizer_texts
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.influence import METHODS, Question
from jaxforget.influence.comparison import ceilings, compare
from jaxforget.influence.question import Method
from jaxforget.influence.scores import Scores, heat_map, load, measure, peak_memory, save, scatter
from jaxforget.influence.study import Study
from jaxforget.influence.truth import Truth, TruthConfig, load_truth, retrain
from jaxforget.influence.untrac import Optimizer, UnTrac, UnTracInv, answers
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.report.statistics import over_seeds
from jaxforget.training.checkpoints import load_tree, save_tree
from jaxforget.training.optimizer import ScheduleState, TrainConfig, rate_at
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, start_from

DOMAINS = ("novels", "drama", "encyclopedia", "code_c", "code_python", "math_latex", "legal", "abstracts", "math_word",
           "recipes", "stories")  # fmt: skip
SHARES = (6, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1)  # of the domains in the unequal mix
PARTS = ("skills", "domains", "many", "speed")
GRADIENTS = tuple(name for name in METHODS if name not in ("untrac", "untrac_inv"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare influence methods with retraining."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    data: Path | None = None
    """Directory with corpora, toxigen, winobias and truthfulqa; every part but skills needs it."""
    parts: tuple[str, ...] = PARTS
    """What to do: skills, domains, many, speed."""
    methods: tuple[str, ...] = GRADIENTS
    """Baselines of jaxforget/influence/__init__.py besides UnTrac and UnTrac-Inv."""
    settings: tuple[str, ...] = (
        "lissa.hessian_examples=32", "arnoldi.hessian_examples=64", "fisher.fisher_examples=128",
        "ekfac.fisher_examples=128", "trak.dimension=256",
    )  # fmt: skip
    """Method settings as method.field=value."""
    rates: tuple[float, ...] = (1e-5, 5e-5, 2e-4)
    """Learning rates of UnTrac, members of one program."""
    inverse_rates: tuple[float, ...] = (5e-5, 5e-4)
    """Learning rates of UnTrac-Inv, members of one program."""
    optimizers: tuple[Optimizer, ...] = ("adam",)
    """Optimisers of both."""
    model: str | None = None
    """Model to train on the domains, as a Hugging Face directory or hub name. Not given: from scratch, see --size.*"""
    scratch: bool = False
    """Draw the weights of --model anew: only its shape and tokenizer are used."""
    length: int = 64
    """Tokens of a sequence of text."""
    sequences: int = 64
    """Sequences of a domain; the mean in the unequal mix."""
    unlearned: int = 0
    """Sequences of a dataset that UnTrac unlearns; 0 is all."""
    splits: int = 3
    """Datasets made of each domain in part many."""
    split_sequences: int = 16
    """Sequences of each of them."""
    subsets: int = 8
    """Random halves of the datasets of part many, for the linear datamodeling score."""
    query_rows: int = 12
    """Records of a query, and held-out sequences of a domain."""
    snapshots: int = 4
    """Parameters kept on the way of each full run, for TracIn."""
    speed_sequences: int = 16
    """Sequences of a domain in part speed."""
    retrain: TruthConfig = TruthConfig()
    training: TrainConfig = TrainConfig(epochs=2, batch_size=8, learning_rate=3e-3)
    skills_training: TrainConfig = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3)
    size: SizeConfig = SizeConfig(width=48, layers=2, heads=4, context=128, vocab_size=1024)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")


def default() -> Config:
    """small models from scratch, three seeds; about half an hour on two CPU cores, by estimate"""
    return Config()


def smoke() -> Config:
    """two seeds, tiny sets and models; a few minutes, numbers without meaning"""
    return Config(
        methods=("grad_dot", "tracin"), rates=(1e-5, 1e-3), inverse_rates=(1e-3,), sequences=6, splits=2,
        split_sequences=4, subsets=4, query_rows=4, snapshots=2, speed_sequences=4, length=32,
        retrain=TruthConfig(seeds=2), training=TrainConfig(epochs=1, batch_size=8, learning_rate=3e-3),
        size=SizeConfig(width=16, layers=1, heads=2, context=128, vocab_size=512),
    )  # fmt: skip


PRESETS = {"default": default, "smoke": smoke}


class Part(NamedTuple):
    """A truth and the scores that are compared with it."""

    name: str
    study: Study
    training: TrainConfig
    retrain: TruthConfig
    every: int = 0  # steps between evaluations while UnTrac unlearns
    timed: bool = False  # read for part speed alone


def run(config: Config) -> None:
    """Do the cells that are missing, then join them."""
    if wrong := [part for part in config.parts if part not in PARTS]:
        raise UserError(f"unknown part {wrong[0]!r}; valid parts are {', '.join(PARTS)}")
    if config.data is None and set(config.parts) - {"skills"}:
        raise UserError("--data is missing; give the directory with corpora, toxigen, winobias and truthfulqa")
    command.at_least(1, sequences=config.sequences, splits=config.splits, split_sequences=config.split_sequences,
                     query_rows=config.query_rows, snapshots=config.snapshots, length=config.length,
                     speed_sequences=config.speed_sequences)  # fmt: skip
    command.at_least(0, subsets=config.subsets, unlearned=config.unlearned)
    methods = choice.choose(METHODS, config.methods)
    kept = [one for one in config.settings if one.partition(".")[0] in methods or one not in Config().settings]
    methods = choice.adjust({n: m for n, m in methods.items() if n in GRADIENTS}, kept)
    untracs = [UnTrac(optimizer=name, limit=config.unlearned) for name in config.optimizers]
    out = Run("benchmarks.untrac", config, config.out, config.resume)
    everything = list(parts_of(config))
    parts = [part for part in everything if not part.timed]
    out.begin()
    for part in parts:
        home = out.directory / part.name
        truth = truth_cell(config, home, part)
        for seed in range(len(truth.full_OQ)):
            score_cells(config, home, part, truth, seed, methods, untracs)
    speed = speed_cell(config, out.directory, everything) if "speed" in config.parts else []
    finish(config, out, parts, speed)


# ---------------------------------------------------------------------------------------------------- data
def parts_of(config: Config) -> Iterator[Part]:
    """Read and tokenise the parts asked for."""
    if "skills" in config.parts:
        for corpus in skills.CORPORA:
            read = skills.generate(corpus)
            texts = [text for part in read for records in part.values()
                     for text in tokenizer_texts(records, TextConfig())]  # fmt: skip
            size = dataclasses.replace(config.size, vocab_size=512)
            start = start_from(None, tokenizer_name=None, size=size, compute=config.compute, texts=texts)
            train, test = ({name: tokens(one, start, TextConfig()) for name, one in part.items()} for part in read)
            retraining = dataclasses.replace(config.retrain, subsets=0)
            yield Part(f"skills {corpus}", Study(start, train, test), config.skills_training, retraining, every=16)
    if config.data is None or not set(config.parts) - {"skills"}:
        return
    drawn = {domain: documents(config, config.data, domain) for domain in DOMAINS}
    texts = [record.text for records, _ in drawn.values() for record in records[:200]]
    start = start_from(config.model, tokenizer_name=None, size=config.size, compute=config.compute, texts=texts,
                       tell=command.say)  # fmt: skip
    if config.scratch:
        model = start.model
        start = start._replace(params=lambda seed: jax.tree.map(np.asarray, model.init(jax.random.key(seed))))
    pack = TextConfig(text_mode="pack", max_length=config.length)
    blocks = {name: tokens(records, start, pack) for name, (records, _) in drawn.items()}
    held = {name: tokens(rest, start, pack) for name, (_, rest) in drawn.items()}
    held = {f"text {name}": one.take(np.arange(min(config.query_rows, len(one)))) for name, one in held.items()}
    said = {
        f"{source} {name}": tokens(records[: config.query_rows], start, TextConfig())
        for source, sets in (
            ("toxi", behaviours.toxigen(config.data / "toxigen/prompts.tar.xz")),
            ("wino", behaviours.winobias(config.data / "winobias")),
            ("tqa", behaviours.truthfulqa(config.data / "truthfulqa/TruthfulQA.csv")),
        )
        for name, records in sets.items()
    }  # fmt: skip
    if {"domains", "speed"} & set(config.parts):
        sizes = np.array(SHARES) * config.sequences * len(DOMAINS) // sum(SHARES)
        for mix, count_K in (("equal", [config.sequences] * len(DOMAINS)), ("unequal", sizes)):
            train = {name: cut(name, blocks[name], 0, int(n)) for name, n in zip(DOMAINS, count_K, strict=True)}
            study = Study(start, train, {**said, **held})
            if "domains" in config.parts or mix == "equal":
                yield Part(f"domains {mix}", study, config.training, config.retrain,
                           timed="domains" not in config.parts)  # fmt: skip
    if "many" in config.parts:
        train = {f"{name} {i}": cut(name, blocks[name], i * config.split_sequences, config.split_sequences)
                 for name in DOMAINS for i in range(config.splits)}  # fmt: skip
        retraining = dataclasses.replace(config.retrain, subsets=config.subsets)
        yield Part("many", Study(start, train, held), config.training, retraining)


def documents(config: Config, data: Path, domain: str) -> tuple[list[Record], list[Record]]:
    """Give training and held-out documents of a domain, drawn by id, no more than are needed."""
    records = read_records(data / "corpora" / f"{domain}.jsonl.gz", text_field="text", id_field="id")
    drawn = [records[i] for i in order(id_keys([record.id for record in records]), 0, 0)]
    most = max(config.sequences * max(SHARES) * len(DOMAINS) // sum(SHARES), config.splits * config.split_sequences)
    held, rest = drawn[: len(drawn) // 5], drawn[len(drawn) // 5 :]
    return upto(rest, 8 * config.length * most), upto(held, 8 * config.length * config.query_rows)


def upto(records: list[Record], characters: int) -> list[Record]:
    """Take records until there are so many characters."""
    total = np.cumsum([len(record.text) for record in records])
    return records[: int(np.searchsorted(total, characters)) + 1]


def tokens(records, start: Start, text: TextConfig) -> Examples:
    return encode(records, start.tokenizer, text, context=start.model.max_length, where="text", tell=lambda said: None)


def cut(name: str, examples: Examples, first: int, count: int) -> Examples:
    """Take sequences first..first+count-1, or raise UserError."""
    if len(examples) < first + count:
        raise UserError(f"{name} has {len(examples)} sequences; {first + count} are needed; lower --sequences")
    return examples.take(np.arange(first, first + count))


# --------------------------------------------------------------------------------------------------- cells
def truth_cell(config: Config, home: Path, part: Part) -> Truth:
    """Retrain, and keep the models of the full runs and their snapshots."""
    file = home / "truth.npz"
    if not file.exists():
        kept = part.study.train.values()
        steps = -(-sum(map(len, kept)) // part.training.batch_size) * part.training.epochs
        with command.progress(f"{part.name}: retraining") as show:
            retrain(part.study.objective, part.study.start.params, part.study.train, part.study.queries, part.retrain,
                    part.training, home / "truth", keep_every=-(-steps // config.snapshots), show=show,
                    keep=lambda seed, step, params: save_tree(home / f"models/seed{seed}/{step}", params),
                    ).save(file)  # fmt: skip
        command.say(f"done: {part.name}, truth")
    return load_truth(file)


def question_of(part: Part, home: Path, truth: Truth, seed: int) -> Question:
    """Ask about the model of a seed's full run."""
    like, steps = part.study.start.params(seed), truth.about["steps"]
    found = []
    for step in sorted(int(path.name) for path in (home / f"models/seed{seed}").iterdir()):
        at = ScheduleState(np.int32(step - 1), np.float32(part.training.learning_rate), np.float32(steps))
        found.append((float(rate_at(part.training, at)), load_tree(home / f"models/seed{seed}/{step}", like)))
    return part.study.question(found[-1][1], seed, tuple(found))


def score_cells(config: Config, home: Path, part: Part, truth: Truth, seed: int, methods: Mapping[str, Any],
                untracs: list[UnTrac]) -> None:  # fmt: skip
    """Ask every method about the model of a seed; what has its file is not asked again."""
    place = home / f"scores/seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    question = None
    for method in untracs:
        forward = dataclasses.replace(method, every=part.every)
        inverse = UnTracInv(optimizer=method.optimizer)
        for name, one, rates in (("untrac", forward, config.rates), ("untrac_inv", inverse, config.inverse_rates)):
            labels = [f"{name} {method.optimizer} {rate:g}" for rate in rates]
            if all((place / f"{label}.npz").exists() for label in labels):
                continue
            question = question or question_of(part, home, truth, seed)
            started = time.perf_counter()
            found = answers(one, question, rates)
            seconds = (time.perf_counter() - started) / len(rates)
            for label, answer in zip(labels, found, strict=True):
                one_row = Scores(label, truth.datasets, truth.queries, answer, seconds, peak_memory())
                save(place / f"{label}.npz", one_row)
    for name, method in methods.items():
        if not (place / f"{name}.npz").exists():
            question = question or question_of(part, home, truth, seed)
            save(place / f"{name}.npz", measure(name, method, question))
    if question:
        command.say(f"done: {part.name}, scores of seed {seed}")


def speed_cell(config: Config, directory: Path, parts: list[Part]) -> list[dict[str, Any]]:
    """Time one seed's retraining as one program and run by run, and UnTrac; the same work, in this process."""
    file = directory / "speed.json"
    if file.exists():
        return json.loads(file.read_text())
    whole = next(part for part in parts if part.name == "domains equal").study
    few = {name: one.take(np.arange(min(config.speed_sequences, len(one)))) for name, one in whole.train.items()}
    study, rows, runs = whole._replace(train=few), [], len(few) + 1
    ways: dict[str, dict[str, Any]] = {
        "retraining: one program, mapped": {"members": "map"}, "retraining: one program, vmapped": {"members": "vmap"},
        "retraining: one run after another": {"width": 1},
    }  # fmt: skip
    for name, settings in ways.items():
        retraining = dataclasses.replace(config.retrain, seeds=1, subsets=0, **settings)
        started = time.perf_counter()
        place = directory / "speed" / name.partition(", ")[2] / str(settings.get("width", 0))
        found = retrain(study.objective, study.start.params, study.train, study.queries, retraining, config.training,
                        place)  # fmt: skip
        rows.append({"name": name, "runs": runs, "seconds": found.about["seconds"],
                     "seconds_with_compilation": time.perf_counter() - started})  # fmt: skip
    question = study.question(study.start.params(0), 0)
    methods: dict[str, Method] = {"UnTrac: all datasets": UnTrac(), "UnTrac-Inv: all queries": UnTracInv()}
    for name, method in methods.items():
        first, again = (measure(name, method, dataclasses.replace(question)).seconds for _ in range(2))
        rows.append({"name": name, "runs": len(few), "seconds": again, "seconds_with_compilation": first})
    rows += torch_rows(config, study, runs, directory)
    for row in rows:
        row["times_as_fast_as_sequential"] = rows[2]["seconds"] / row["seconds"]
    write_atomic(file, json.dumps(rows, indent=1) + "\n")
    return rows


def torch_rows(config: Config, study: Study, runs: int, directory: Path) -> list[dict[str, Any]]:
    """Time the same number of steps of the same model in PyTorch, where it is installed: one run, times the runs."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return []
    from jaxforget.models import hub

    hub.save(directory / "speed/model", study.start.model, study.start.params(0))
    model = AutoModelForCausalLM.from_pretrained(directory / "speed/model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate, weight_decay=0.0)
    rows = [one for examples in study.train.values() for one in examples.columns["tokens"]]
    batches = [torch.tensor(np.stack(rows[i : i + config.training.batch_size]), dtype=torch.long)
               for i in range(0, len(rows), config.training.batch_size)]  # fmt: skip
    started = time.perf_counter()
    for _ in range(config.training.epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    seconds = (time.perf_counter() - started) * runs
    return [{"name": "retraining: PyTorch, one run after another", "runs": runs, "seconds": seconds,
             "seconds_with_compilation": None}]  # fmt: skip


# -------------------------------------------------------------------------------------------------- report
FIELDS = ("name", "pearson", "pearson_low", "pearson_high", "spearman", "lds", "sign", "sign_centred", "top_recall",
          "seconds", "cost_vs_truth", "collapsed")  # fmt: skip


def finish(config: Config, out: Run, parts: list[Part], speed: list[dict[str, Any]]) -> None:
    """Compare the scores of every seed's model with the truth over all seeds; one row a method and part."""
    rows, sections, told = [], [], []
    for part in parts:
        home = out.directory / part.name
        truth = load_truth(home / "truth.npz")
        seeds = [sorted((home / f"scores/seed{seed}").glob("*.npz"), key=lambda f: f.stat().st_mtime_ns)
                 for seed in range(len(truth.full_OQ))]  # fmt: skip
        found = [[load(file) for file in files] for files in seeds]
        joined = over_seeds([[{**compare(one, truth, 3), "collapsed": collapsed(one)} for one in s] for s in found])
        limits = ceilings(truth)
        mine = joined + limits
        rows += [{**row, "name": f"{part.name}: {row['name']}", "part": part.name, "method": row["name"]}
                 for row in mine]  # fmt: skip
        note = ("Means and 95 % intervals over the models of the seeds, each against the truth averaged over all "
                "seeds. pearson: over datasets, averaged over queries; in brackets, of one seed: 95 % bootstrap over "
                "datasets. Collapsed: losses out of range, in percent. Plots: of the first seed; red helps, blue "
                "harms.")  # fmt: skip
        sections.append((part.name, note, table(mine, FIELDS, limits.__contains__)
                         + plots(*drawings(part, truth, found[0]))))  # fmt: skip
        known = sorted((row for row in joined if row["pearson"] is not None and np.isfinite(row["pearson"])),
                       key=lambda row: -row["pearson"])  # fmt: skip
        highest = ", ".join(f"`{row['name']}` {cell(row['pearson'], row.get('pearson_ci95'))}" for row in known[:3])
        told.append(f"{part.name}: the highest Pearson correlations with retraining, of {len(joined)} methods and "
                    f"settings: {highest or 'none'}. A perfect method is expected to reach "
                    f"{cell(limits[0]['pearson'])} at most.")  # fmt: skip
    if speed:
        fields = ("name", "runs", "seconds", "seconds_with_compilation", "times_as_fast_as_sequential")
        note = "The same retraining of one seed; seconds without compilation."
        sections.append(("Speed", note, table(speed, fields)))
    document = out.finish(rows, speed=speed)
    told += [f"{row['name'].capitalize()}: {cell(row['seconds'])} s." for row in speed]
    lead = ("Does unlearning a dataset tell what retraining without it would do? "
            f"{config.retrain.seeds} seeds, {config.retrain.protocol}; {document['device']}.")  # fmt: skip
    write_page(out.directory / "report.html", "Influence by unlearning", lead, sections, document["config"], told)
    for part in parts:
        mine = [{**row, "name": row["method"]} for row in rows if row["part"] == part.name]
        command.print_table(mine, FIELDS, f"{part.name} · {out.directory}")
    if speed:
        command.print_table(speed, fields, "speed")


def collapsed(scores: Scores) -> float | None:
    """Give the percentage of losses that left their range."""
    left_KQ = scores.answer.curves.get("collapsed_at")
    return None if left_KQ is None else 100.0 * float(np.isfinite(left_KQ).mean())


def drawings(part: Part, truth: Truth, found: list[Scores]) -> Iterator[str]:
    """Draw influence and scatter of the first seed's scores, and curves where UnTrac was watched on the way."""
    truth_KQ = truth.influence_OKQ.mean(axis=0)
    size = {"width": max(3.0, 1.8 + 0.3 * len(truth.queries)), "height": max(2.6, 1.8 + 0.2 * len(truth.datasets))}
    yield figure(heat_map(truth_KQ, truth.datasets, truth.queries, "truth"), **size)
    for scores in found:
        yield figure(heat_map(scores.answer.scores_KQ, truth.datasets, truth.queries, scores.method), **size)
        yield figure(scatter(scores.answer.scores_KQ, truth_KQ, truth.queries, scores.method), width=3.4, height=3.0)
        if len(scores.answer.curves.get("step", ())) > 1:
            yield figure(unlearning_curve(scores))


def unlearning_curve(scores: Scores) -> Callable[[Any], None]:
    """Draw the paper's figure 2: how the loss of the queries changes while each dataset is unlearned."""

    def draw(axes):
        for k, name in enumerate(scores.datasets):
            axes.plot(scores.answer.curves["step"], scores.answer.curves["query_change"][:, k].mean(axis=1), label=name)
        axes.set(xlabel="step of unlearning", ylabel="change of loss (nats a token)", title=scores.method)
        axes.legend()

    return draw


if __name__ == "__main__":
    command.main(run, PRESETS)
