"""Scores of a method as a file and as rows of a table. Shapes: K datasets, Q queries, S steps."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxforget.errors import UserError
from jaxforget.files import save_arrays
from jaxforget.influence.question import Answer, Method, Question


class Scores(NamedTuple):
    """What a method said, and what that took."""

    method: str
    datasets: tuple[str, ...]
    queries: tuple[str, ...]
    answer: Answer
    seconds: float  # with compilation
    memory_gb: float | None  # highest use of memory so far in the process, so that only its growth is this method's


def measure(name: str, method: Method, question: Question) -> Scores:
    """Ask a method, on the clock."""
    started = time.perf_counter()
    answer = method.answer(question)
    seconds = time.perf_counter() - started
    return Scores(name, tuple(question.train), tuple(question.queries), answer, seconds, peak_memory())


def peak_memory() -> float:
    """Return the highest use of memory of this process so far, GB: of the accelerator, else of the host."""
    used = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in used:
        return used["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def save(path: Path, scores: Scores) -> None:
    """Write one .npz: scores_KQ, the curves, and examples_<dataset> (N, Q) where the method has them."""
    answer = scores.answer
    about = {"method": scores.method, "datasets": scores.datasets, "queries": scores.queries, "notes": answer.notes,
             "seconds": scores.seconds, "memory_gb": scores.memory_gb, "forward_tokens": answer.forward_tokens,
             "curves": list(answer.curves)}  # fmt: skip
    examples = {f"examples_{name}": values for name, values in (answer.examples or {}).items()}
    curves = {f"curve_{name}": values for name, values in answer.curves.items()}
    save_arrays(path, about=np.array(json.dumps(about)), scores_KQ=answer.scores_KQ, **curves, **examples)


def load(path: Path) -> Scores:
    """Read what `save` wrote. Raises UserError where it is something else."""
    try:
        with np.load(path) as saved:
            about = json.loads(str(saved["about"]))
            examples = {name: saved[f"examples_{name}"] for name in about["datasets"] if f"examples_{name}" in saved}
            curves = {name: saved[f"curve_{name}"] for name in about["curves"]}
            rest = tuple(about["notes"]), about["forward_tokens"]
            answer = Answer(saved["scores_KQ"], examples or None, curves, *rest)
        return Scores(about["method"], tuple(about["datasets"]), tuple(about["queries"]), answer, about["seconds"],
                      about["memory_gb"])  # fmt: skip
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no file of scores that train.untrac wrote ({error})") from None


def found(source: str | Path) -> list[Path]:
    """Return the files of scores in a directory of train.untrac, or the file itself. Raises UserError for none."""
    path = Path(source)
    files = sorted((path / "scores").glob("*.npz"), key=lambda f: f.stat().st_mtime_ns) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{source}: no scores; give a finished --out of train.untrac or one of its scores/*.npz")
    return files


def rows_of(scores: Scores) -> list[dict[str, Any]]:
    """Give a row a dataset: influence_<query> for every query, and what the method cost for all datasets."""
    collapsed_KQ = scores.answer.curves.get("collapsed_at")
    rows = []
    for k, dataset in enumerate(scores.datasets):
        left = collapsed_KQ[k] if collapsed_KQ is not None else np.array([np.nan])
        rows.append({
            "name": f"{scores.method}: {dataset}", "method": scores.method, "dataset": dataset,
            **{f"influence_{query}": float(scores.answer.scores_KQ[k, q]) for q, query in enumerate(scores.queries)},
            "collapsed_at": float(np.nanmin(left)) if np.isfinite(left).any() else None,
            "seconds": scores.seconds, "memory_gb": scores.memory_gb, "forward_tokens": scores.answer.forward_tokens,
        })  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------- drawings


def heat_map(
    scores_KQ: np.ndarray, datasets: Sequence[str], queries: Sequence[str], title: str
) -> Callable[[Any], None]:
    """Draw influences, every query divided by its largest: red helps, blue harms."""

    def draw(axes):
        with np.errstate(invalid="ignore", divide="ignore"):
            shown = scores_KQ / np.abs(scores_KQ).max(axis=0)
        axes.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set(title=title, xticks=range(len(queries)), yticks=range(len(datasets)), xlabel="query", ylabel="dataset")
        size = 9 if max(len(queries), len(datasets)) < 16 else 5
        axes.set_xticklabels(queries, rotation=90, fontsize=size)
        axes.set_yticklabels(datasets, fontsize=size)
        if len(datasets) * len(queries) <= 60:
            for (k, q), value in np.ndenumerate(scores_KQ):
                color = "white" if math.isfinite(shown[k, q]) and abs(shown[k, q]) > 0.6 else "black"
                axes.text(q, k, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)

    return draw


def scatter(scores_KQ: np.ndarray, truth_KQ: np.ndarray, queries: Sequence[str], title: str) -> Callable[[Any], None]:
    """Draw scores against the truth, every query standardised."""

    def draw(axes):
        for q in range(len(queries)):
            sides = [x[:, q] for x in (truth_KQ, scores_KQ)]
            if all(np.isfinite(x).all() and np.ptp(x) > 0 for x in sides):
                axes.scatter(*((x - x.mean()) / x.std() for x in sides), s=12, alpha=0.7,
                             label=queries[q] if len(queries) <= 8 else None)  # fmt: skip
        axes.axline((0, 0), slope=1, lw=0.8, color="0.6")
        axes.set(xlabel="truth (standardised)", ylabel="score (standardised)", title=title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()

    return draw
