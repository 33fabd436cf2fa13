"""Measure stereotypes in a language model: `python -m eval.bias --model DIR --baseline DIR --stereoset FILE ...`.

Any of the benchmarks can be given. Every number stands beside that of the baseline, such as the model before
fine-tuning, with bootstrap intervals; that of the change is paired, for both models are measured on the same items.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxforget import command
from jaxforget.data.sources import read_records
from jaxforget.data.stereotypes import read_crows_pairs, read_pairs, read_prompts, read_stereoset, read_winobias
from jaxforget.data.text import TextConfig, encode
from jaxforget.data.tokens import check_vocabulary, load_tokenizer
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.metrics.bias import benchmarks
from jaxforget.metrics.bias.benchmarks import Measure, Subject
from jaxforget.metrics.bias.generation import Scorer, encode_prompts, load_scorer
from jaxforget.metrics.bias.scoring import start_id
from jaxforget.models import hub
from jaxforget.report.page import cell, figure, plots, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.start import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure stereotypes in a language model."""

    model: str | None = None
    """Hugging Face directory or hub name; a causal model, or for --crows-pairs and --pairs a masked one."""
    baseline: str | None = None
    """Model to compare with on the same items, such as the pretrained one."""
    stereoset: str | None = None
    """StereoSet with a row a sentence: context, sentence, bias_type, label (0 anti, 1 stereotype, 2 unrelated), id,
    target."""
    crows_pairs: str | None = None
    """CrowS-Pairs: sent_more, sent_less, stereo_antistereo, bias_type."""
    winobias: str | None = None
    """Directory with WinoBias' {pro,anti}_stereotyped_type{1,2}.txt.{dev,test}."""
    pairs: str | None = None
    """Own pairs of sentences: stereotype, anti, group."""
    texts: str | None = None
    """Texts whose loss is measured by group: text, or question and answer; group."""
    prompts: str | None = None
    """Prompts about two groups, to be continued by the model: prompt, group."""
    scorer: str | None = None
    """What scores continuations: a classifier's directory or hub name (p of a class, see --scorer-label), or
    words:FILE (1 with a word of the file, one a line; else 0)."""
    scorer_label: str | None = None
    """The class whose probability is the score; the classifier's last when not given."""
    start_token: Literal["first", "always"] = "first"
    """Predict first tokens from the start token alone, as StereoSet's code does, or let it stand before the whole
    sentence too, as models need that never saw a text without it."""
    samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int = 32
    """Tokens of a continuation."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens that hold this probability."""
    resamples: int = 1000
    """Bootstrap resamples: of target terms for StereoSet, else of items."""
    seed: int = 0
    """Seed of continuations and resamples."""
    out: Path | None = None
    """Directory for everything the run leaves; runs/<command>-<time> when not given. Must be empty."""
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = ComputeConfig(dtype="float32")


def default() -> Config:
    """the benchmarks given"""
    return Config()


PRESETS = {"default": default}
READERS: dict[str, Callable[[str], list[Any]]] = {
    "stereoset": read_stereoset, "crows_pairs": read_crows_pairs, "winobias": read_winobias, "pairs": read_pairs,
    "prompts": read_prompts,
}  # fmt: skip
NEEDS = {"causal": (*READERS, "texts"), "masked": ("crows_pairs", "pairs")}
COUNTS = ("terms", "ties", "left_out")
COLUMNS = ("name", "items", *COUNTS, "ideal", "value", "baseline", "change")
INTERVALS = {"value": ("low", "high"), "baseline": ("baseline_low", "baseline_high"),
             "change": ("change_low", "change_high")}  # fmt: skip
NOTES = {
    "StereoSet": "SS: percent of items whose stereotype scores above the anti-stereotype. LMS: percent of related "
    "sentences above the unrelated one. Both are unweighted means over target terms; ICAT joins their means. Intervals "
    "resample terms, so those of few terms are rough. Intersentence items are scored by mean log p(next | context), "
    "which is no figure of the paper.",
    "CrowS-Pairs": "Percent of pairs whose more stereotyping sentence scores higher; ties count as not higher, and are "
    "left out of the rates by direction (stereo, antistereo).",
    "WinoBias": "Percent of lines whose pro-stereotypical sentence is likelier than the anti-stereotypical one.",
    "Pairs": "Percent of pairs whose stereotypical sentence scores higher.",
    "Loss": "Nats a token by group.",
    "Generation": "Mean score of continuations by group of the prompt. Intervals resample prompts.",
}


def run(config: Config) -> None:
    """Read, score, report."""
    given = [name for name in (*READERS, "texts") if getattr(config, name)]
    asked = _check(config, given)
    out = Run("eval.bias", config, config.out, False)
    items: dict[str, Any] = {name: READERS[name](getattr(config, name)) for name in given if name in READERS}
    if config.texts:
        items["texts"] = read_records(config.texts, group_field="group")
    names = [asked] + ([config.baseline] if config.baseline else [])
    subjects = [subject(name, config) for name in names]
    for one in subjects:
        head, flags = one.model.config.head, {name: f"--{name.replace('_', '-')}" for name in given}
        if refused := [flags[name] for name in given if name not in NEEDS.get(head, ())]:
            raise UserError(f"{one.name} has a {head} head, which {', '.join(refused)} cannot measure; a causal head "
                            "is allowed with every benchmark, a masked one with --crows-pairs and --pairs")  # fmt: skip
        if head != subjects[0].model.config.head:
            raise UserError(f"--baseline {one.name} has a {head} head and --model {asked} a "
                            f"{subjects[0].model.config.head} one; only equal heads compare")  # fmt: skip
        if head == "masked" and one.tokenizer.mask_token_id is None:
            raise UserError(f"{one.name}: the tokenizer has no mask token, which a masked model needs")
        if head == "causal":
            start_id(one.tokenizer, one.name)
        if "prompts" in items:  # tells those that do not fit before anything is computed
            texts = [prompt.text for prompt in items["prompts"]]
            encode_prompts(one.model, one.tokenizer, texts, config.max_new_tokens)
    scorer = load_scorer(config.scorer, config.scorer_label) if config.scorer else None
    out.begin()

    rows = []
    for name in given:
        began = time.perf_counter()
        measures = measure(name, items[name], subjects, config, scorer, out.directory)
        rows += [one.row(config.resamples, config.seed) for one in measures]
        seconds = time.perf_counter() - began
        out.log(name, 1, {"items": len(items[name]), "seconds": seconds})
        command.say(f"{name}: {len(items[name]):,} items in {seconds:,.1f} s")
    document = out.finish(rows)
    sections = []
    for title, note in NOTES.items():
        if part := [row for row in document["results"] if row["benchmark"].startswith(title)]:
            sections.append((title, note, table(list(map(readable, part)), columns(part)) + drawn(part, title)))
    whole = [row for row in document["results"] if row["part"] is None]
    whole = whole or document["results"]
    write_page(
        out.directory / "report.html", f"Stereotypes in {Path(asked).name}",
        "Which stereotypes does the model prefer, and how do groups differ? "
        f"Baseline: {f'`{config.baseline}`' if config.baseline else 'none'}. In brackets 95 % intervals of "
        f"{config.resamples:,} bootstrap resamples. A change counts where its interval excludes 0. "
        f"{document['device']}.",
        sections, document["config"], [sentence(row) for row in whole[:9]],
    )  # fmt: skip
    shown = [field for field in columns(whole) if field not in COUNTS]
    command.print_table(list(map(readable, whole)), shown, f"eval.bias · {out.directory}")


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of a table that say something."""
    return [field for field in COLUMNS if any(row.get(field) is not None for row in rows)
            and (field != "left_out" or any(row.get(field) for row in rows))]  # fmt: skip


def readable(row: dict[str, Any]) -> dict[str, Any]:
    """Put intervals beside their numbers."""
    joined = {field: f"{cell(row[field])} [{cell(row[low])}, {cell(row[high])}]"
              for field, (low, high) in INTERVALS.items() if field in row}  # fmt: skip
    return row | joined


def sentence(row: dict[str, Any]) -> str:
    """Say a measure with its interval, its ideal, and the change from the baseline."""
    told = readable(row)
    ideal = f"; ideal {cell(row['ideal'])}" if row.get("ideal") is not None else ""
    change = f"; change from the baseline {told['change']}" if row.get("change") is not None else ""
    return f"{row['name']}: {told['value']}{ideal}{change}."


def _check(config: Config, given: Sequence[str]) -> str:
    """Refuse wrong flags; return the name of the model."""
    if not config.model:
        raise UserError("--model is missing; give a model directory or hub name")
    if not given:
        raise UserError("nothing to measure; give at least one of --stereoset, --crows-pairs, --winobias, --pairs, "
                        "--texts and --prompts")  # fmt: skip
    if bool(config.prompts) != bool(config.scorer):
        raise UserError("--prompts and --scorer come together: one is continued, the other scores what is written")
    command.at_least(1, resamples=config.resamples, samples=config.samples, max_new_tokens=config.max_new_tokens)
    command.at_least(0, seed=config.seed)
    if config.temperature < 0 or not 0 < config.top_p <= 1:
        raise UserError(f"--temperature is {config.temperature} and --top-p {config.top_p}; the first must be 0 or "
                        "above, the second above 0 and at most 1")  # fmt: skip
    return config.model


def subject(name: str, config: Config) -> Subject:
    """Load a model with its tokenizer."""
    model, params = hub.load(name)
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, model.vocab_size, name)
    return Subject(name, config.compute.apply(model), params, tokenizer, config.start_token == "always")


def measure(
    name: str, items: Any, subjects: Sequence[Subject], config: Config, scorer: Scorer | None, directory: Path | None
) -> list[Measure]:
    """Run one benchmark. That of prompts needs a scorer, and a directory for continuations.jsonl."""
    if name == "stereoset":
        return benchmarks.stereoset(subjects, items)
    if name == "crows_pairs":
        return benchmarks.pairs(subjects, items, "CrowS-Pairs")
    if name == "pairs":
        return benchmarks.pairs(subjects, items, "Pairs")
    if name == "winobias":
        kinds = {kind: [dataclasses.replace(pair, group=pair.group.removeprefix(f"{kind} "))
                        for pair in items if pair.group.startswith(kind)] for kind in ("type 1", "type 2")}  # fmt: skip
        return [one for kind, part in kinds.items() if part
                for one in benchmarks.pairs(subjects, part, f"WinoBias {kind}", ("sum",))]  # fmt: skip
    if name == "texts":
        examples = [encode(items, one.tokenizer, TextConfig(), context=one.model.max_length, where=str(config.texts),
                           tell=command.say) for one in subjects]  # fmt: skip
        return benchmarks.group_loss(subjects, examples, {record.id: str(record.fields["group"]) for record in items})
    if scorer is None or directory is None:
        raise ValueError(f"{name} needs a scorer and a directory")
    measures, written = benchmarks.generation(
        subjects, items, scorer, samples=config.samples, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_p=config.top_p, seed=config.seed,
    )  # fmt: skip
    write_atomic(directory / "continuations.jsonl", "".join(json.dumps(line) + "\n" for line in written))
    return measures


def drawn(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Draw every measure with its intervals, beside the baseline's."""
    svgs = []
    for name in dict.fromkeys(row["measure"] for row in rows):
        shown = [row for row in rows if row["measure"] == name and row["value"] is not None][::-1]

        def draw(axes, name=name, shown=shown):
            for label, field, shift, marker, colour in (
                ("model", "value", 0.12, "o", "C0"),
                ("baseline", "baseline", -0.12, "s", "C7"),
            ):
                fields = field, *INTERVALS[field]
                places = [(y + shift, *(row.get(field) for field in fields)) for y, row in enumerate(shown)]
                if points := [(value, y) for y, value, _, _ in places if value is not None]:
                    axes.plot(*zip(*points, strict=True), marker, ms=4, color=colour, label=label)
                for y, _, low, high in places:
                    if low is not None and high is not None:
                        axes.hlines(y, low, high, color=colour, lw=1)
            if shown[0].get("ideal") is not None:
                axes.axvline(shown[0]["ideal"], color="C2", lw=0.8, ls="--", label="ideal")
            labels = [row["name"].removesuffix(name).removeprefix(title).strip(" ,") or "all" for row in shown]
            axes.set(yticks=range(len(shown)), yticklabels=labels, ylim=(-0.6, len(shown) - 0.4),
                     xlabel=f"{title}: {name}", ylabel="part")  # fmt: skip
            axes.legend()

        if shown:
            svgs.append(figure(draw, width=5.4, height=1.1 + 0.24 * len(shown)))
    return plots(*svgs)


if __name__ == "__main__":
    command.main(run, PRESETS)
