"""The pre-training setting of Yao et al. (arXiv 2402.15159) at CPU size: forget documents of one domain at a time.

    python -m benchmarks.yao_pretraining --corpora DIR --out runs/yao

DIR holds one <domain>.jsonl.gz a domain with a `text` column. One small model is trained on several domains. For each
forgotten domain in turn a sample of its documents is the forget set; `retain` is the rest of the domain, `approximate`
held-out documents of it, `general` the other domains (and held-out documents of theirs to measure on). A model is
retrained without the forget set, all seven methods run, and the tables are joined. The paper forgets from arXiv, books
and GitHub; the stand-ins are abstracts, novels and code_python.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxforget import command
from jaxforget.data.sampling import id_keys, order
from jaxforget.data.sources import Record, read_records
from jaxforget.data.text import TextConfig
from jaxforget.errors import UserError
from jaxforget.report.page import cell, table, write_page
from jaxforget.report.run import Run
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import SizeConfig
from jaxforget.unlearning.page import FIELDS, TERMINAL, YARDSTICKS
from train import lm, unlearn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Reproduce the pre-training setting of Yao et al. at CPU size."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    resume: bool = False
    """Continue the run in --out; settings must be the same."""
    corpora: Path | None = None
    """Directory with one <domain>.jsonl.gz a domain."""
    domains: tuple[str, ...] = ("abstracts", "novels", "code_python", "encyclopedia", "stories")
    """Domains the model is trained on."""
    forgotten: tuple[str, ...] = ("abstracts", "novels", "code_python")
    """Domains forgotten from, one after the other."""
    documents: int = 160
    """Training documents of each domain."""
    forget_documents: int = 32
    """Documents to forget, and held-out documents of every domain."""
    methods: tuple[str, ...] = ("paper",)
    """Unlearning methods."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4)
    """Rates tried for each method; the choice never sees the retrained model."""
    settings: tuple[str, ...] = ()
    """Method settings, as for train.unlearn."""
    seed: int = 0
    """Seed of the split, of initialisation and of data order."""
    train: TrainConfig = TrainConfig(epochs=12, learning_rate=3e-3)
    unlearning: TrainConfig = TrainConfig(epochs=15, batch_size=8, learning_rate=1e-4, schedule="constant", warmup=0.0)
    size: SizeConfig = SizeConfig(width=96, layers=2, context=128, vocab_size=2048)


def default() -> Config:
    """five domains, three forgotten in turn; about half an hour on two CPU cores"""
    return Config()


PRESETS = {"default": default}


def split(config: Config, corpora: Path) -> dict[str, tuple[list[Record], list[Record]]]:
    """Return, a domain, training and held-out documents, drawn by id."""
    result = {}
    for domain in config.domains:
        records = read_records(corpora / f"{domain}.jsonl.gz", id_field="id")
        needed = config.documents + config.forget_documents
        if len(records) < needed:
            raise UserError(f"{domain} has {len(records)} documents; --documents and --forget-documents need {needed}")
        drawn = [records[i] for i in order(id_keys([record.id for record in records]), config.seed, 0)[:needed]]
        result[domain] = (drawn[: config.documents], drawn[config.documents :])
    return result


def write(path: Path, records: list[Record]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": record.id, "text": record.text}) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(config: Config) -> None:
    """Split, train the original, then retrain and unlearn for each forgotten domain."""
    if config.corpora is None:
        raise UserError("--corpora is missing; give the directory with one <domain>.jsonl.gz a domain")
    unknown = set(config.forgotten) - set(config.domains)
    if unknown:
        raise UserError(f"--forgotten names {', '.join(sorted(unknown))}, which --domains does not train on")
    out = Run("benchmarks.yao_pretraining", config, config.out, config.resume)
    documents = split(config, config.corpora)
    out.begin()
    home, text = out.directory, TextConfig(id_field="id")
    shared: dict[str, Any] = {"seed": config.seed, "text": text, "train": config.train, "size": config.size}
    everything = write(home / "data" / "train.jsonl", [record for kept, _ in documents.values() for record in kept])

    def once(command_run, sub_config) -> Path:
        """Run a command unless it has finished; continue it where it stopped."""
        where = sub_config.out
        if not (where / "results.json").exists():
            command_run(dataclasses.replace(sub_config, resume=(where / "config.json").exists()))
        return where

    original = once(lm.run, lm.Config(out=home / "original", data=(everything,), **shared)) / "model"
    rows = []
    for domain in config.forgotten:
        data = home / "data" / domain
        kept, held_out = documents[domain]
        others = [pair for name, pair in documents.items() if name != domain]
        forget = write(data / "forget.jsonl", kept[: config.forget_documents])
        retrained = once(lm.run, lm.Config(
            out=home / domain / "retrained", data=(everything,), exclude=(forget,), tokenizer=str(original), **shared,
        )) / "model"  # fmt: skip
        where = once(unlearn.run, unlearn.Config(
            out=home / domain / "unlearning", model=str(original), retrained=str(retrained), methods=config.methods,
            settings=config.settings, forget=forget,
            retain=write(data / "retain.jsonl", kept[config.forget_documents :]),
            approximate=write(data / "approximate.jsonl", held_out),
            general=write(data / "general.jsonl", [record for pair in others for record in pair[0]]),
            general_test=write(data / "general_test.jsonl", [record for pair in others for record in pair[1]]),
            learning_rates=config.learning_rates, unlearning=config.unlearning, seed=config.seed, text=text,
        ))  # fmt: skip
        results = json.loads((where / "results.json").read_text(encoding="utf-8"))["results"]
        rows += [{**row, "domain": domain} for row in results]
    document = out.finish(rows)
    tables = [
        (f"Forgetting {domain}", "Losses (nll) in nats a token; the goal is the row `retrained`.",
         table([row for row in rows if row["domain"] == domain], FIELDS, lambda row: row["name"] in YARDSTICKS))
        for domain in config.forgotten
    ]  # fmt: skip
    found = []
    for domain in config.forgotten:
        mine = [row for row in rows if row["domain"] == domain and row["name"] not in YARDSTICKS]
        passed = ", ".join(f"`{row['name']}`" for row in mine if row.get("verdict") == "like retraining")
        nearest = min((row for row in mine if row.get("gap_to_retrained") is not None),
                      key=lambda row: row["gap_to_retrained"], default=None)  # fmt: skip
        found.append(f"{domain}: {passed or 'no method'} ended like retraining"
                     + (f"; nearest to it `{nearest['name']}`, {cell(nearest['gap_to_retrained'])} nats a token away."
                        if nearest else "."))  # fmt: skip
    lead = ("Can a small pre-trained model be made to forget documents of one domain as if it had never read them? "
            "Each domain has its own page under <domain>/unlearning.")  # fmt: skip
    write_page(home / "report.html", "Forgetting pre-training documents", lead, tables, document["config"], found)
    for domain in config.forgotten:
        command.print_table([row for row in rows if row["domain"] == domain], TERMINAL, f"forgetting {domain}")


if __name__ == "__main__":
    command.main(run, PRESETS)
