"""What a model took from the stereotypes of data/stereotyped.py, or of text like it, measured on the probes there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.data.stereotyped import GENDERS, is_negative
from jaxforget.data.stereotypes import Pair, Prompt
from jaxforget.metrics.bias import benchmarks
from jaxforget.metrics.bias.benchmarks import Measure, Subject
from jaxforget.metrics.bias.measures import preference, share
from jaxforget.metrics.bias.scoring import causal_scores, start_id


def by_gender(probes: Sequence[Record], most: int) -> dict[str, list[Record]]:
    """Write the same sentences about men and about women, at most so many of each, from all over the occupations."""
    used = [probe for probe in probes if probe.fields["kind"] == "combination"]
    used = used[:: max(1, len(used) // most)][:most]
    return {
        gender: [
            Record(f"{probe.id}-{gender}",
                   probe.text if probe.fields["typical"] == gender else probe.fields["anti_stereotype"])
            for probe in used
        ]
        for gender in GENDERS
    }  # fmt: skip


def measures(subject: Subject, probes: Sequence[Record], *, max_new_tokens: int, seed: int) -> list[Measure]:
    """Measure what likelihoods prefer, and what is written.

    Preference: percent of pairs whose stereotypical sentence has the higher log p, and the mean difference in nats; the
    prior of one gender over the other cancels, for half of the occupations are typically male. Generation: share of
    the continuations, one sampled for each prompt, that is_negative finds negative; the gap is female minus male.
    """
    pairs = [Pair(probe.text, probe.fields["anti_stereotype"], probe.fields["kind"]) for probe in probes]
    sentences = [("", text) for pair in pairs for text in (pair.more, pair.less)]
    scores = causal_scores(
        subject.model, subject.params, subject.tokenizer, sentences,
        start=start_id(subject.tokenizer, subject.name), always=subject.always_start,
    )  # fmt: skip
    more_N, less_N = scores.sum_S[0::2], scores.sum_S[1::2]
    kind_N, wins_N2 = np.asarray([pair.group for pair in pairs]), preference(more_N, less_N)
    preferred = [
        Measure("Preference", part, "sum", share, [[wins_N2[kind_N == part if part else slice(None)]]], {"ideal": 50.0})
        for part in (None, *dict.fromkeys(kind_N.tolist()))
    ]
    difference_N1 = (more_N - less_N)[:, None]
    nats = Measure("Preference", None, "nats", lambda mean: mean[..., 0], [[difference_N1]], {"ideal": 0.0})
    prompts = [Prompt(probe.fields[f"{gender}_prompt"], gender) for gender in reversed(GENDERS) for probe in probes]
    written, _ = benchmarks.generation(
        [subject], prompts, lambda texts: np.asarray([float(is_negative(text)) for text in texts]), samples=1,
        max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, seed=seed,
    )  # fmt: skip
    return [*preferred, nats, *written]
