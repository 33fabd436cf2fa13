"""Bias measures: published figures, a slow loop in numpy beside every score, ties, intervals, files."""

import functools
import gzip
import json

import jax
import numpy as np
import pytest

from jaxforget.data.sources import Record
from jaxforget.data.stereotypes import (
    Pair,
    Prompt,
    Triple,
    read_crows_pairs,
    read_pairs,
    read_prompts,
    read_stereoset,
    read_winobias,
)
from jaxforget.data.text import TextConfig, encode
from jaxforget.errors import UserError
from jaxforget.metrics import language
from jaxforget.metrics.bias import benchmarks, measures
from jaxforget.metrics.bias.benchmarks import Subject
from jaxforget.metrics.bias.generation import continuations, word_scorer
from jaxforget.metrics.bias.scoring import causal_scores, masked_positions, masked_scores
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from

WORDS = "the a red blue old tall cook clerk pilot nurse likes sees feeds cats dogs birds every day often".split()
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # float32 log p of up to 40 tokens, rounded in another order


def sentences(count, seed=0, low=2, high=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(low, high + 1))) for _ in range(count)]


def fresh(head, seed=0, family=None):
    size = SizeConfig(family=family, width=16, layers=2, heads=2, context=64, vocab_size=300)
    made = start_from(None, tokenizer_name=None, size=size, compute=ComputeConfig(), texts=sentences(50), head=head)
    return Subject(f"{head}{seed}", made.model, made.params(seed), made.tokenizer)


@pytest.fixture(scope="module")
def causal():
    return fresh("causal")


@pytest.fixture(scope="module")
def masked():
    return fresh("masked")


def ids_of(subject, text, special=False):
    return subject.tokenizer(text, add_special_tokens=special)["input_ids"]


@functools.cache
def forward(model):
    return jax.jit(model.logits)


def logp(subject, tokens):
    """log p of the vocabulary at every position of one sequence, (T, V). Any token stands behind it."""
    padded = np.random.default_rng(len(tokens)).integers(0, 256, (1, 56))
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(forward(subject.model)(subject.params, padded, np.asarray([len(tokens)]))[0], np.float64)
    shifted = logits[: len(tokens)] - logits[: len(tokens)].max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score(subject, texts, always=False):
    start = subject.tokenizer.bos_token_id
    return causal_scores(subject.model, subject.params, subject.tokenizer, texts, start=start, always=always)


# ---------------------------------------------------------------------------------------------------- StereoSet
def realise(n, stereo, one, other):
    """Scores of n items, (n, 3), in which stereotype > anti, stereotype > unrelated and anti > unrelated that often."""
    both = min(one, other)
    above = [(True, True)] * both + [(True, False)] * (one - both) + [(False, True)] * (other - both)
    above += [(False, False)] * (n - len(above))
    left = stereo - (one - both)  # where only the stereotype beats the unrelated one it beats the anti one too
    rows = []
    for s, a in above:
        wins = s and not a
        if s == a and left > 0:
            wins, left = True, left - 1
        rows.append((s + 0.5 * wins, float(a) + 0.25 * (s == a), 0.75 if not a else 0.6))
    assert left == 0
    return np.asarray(rows)


@pytest.mark.shared
def test_stereoset_as_published(shared):
    """Scores with the published model's counts by term give the published figures; means over items would not."""
    golden = json.loads((shared / "papers" / "golden_dp.json").read_text())["stereoset"]
    for domain, found in golden["gpt2_intrasentence_recomputed"].items():
        scores = np.concatenate([realise(*counts) for _, *counts in found["per_term"]])
        terms = [term for term, n, *_ in found["per_term"] for _ in range(n)]
        order = np.random.default_rng(0).permutation(len(terms))
        counts = measures.term_counts([terms[n] for n in order], *scores[order].T)
        assert counts == {term: tuple(rest) for term, *rest in found["per_term"]}
        result = measures.stereoset_scores(counts)
        published = golden["gpt2_published"]["intrasentence"][domain]
        assert [result["LMS"], result["SS"], result["ICAT"]] == pytest.approx(published, abs=1e-5)
        assert abs(found["ss_over_items"] - result["SS"]) > 0.05
        assert sum(n for n, *_ in counts.values()) == golden["dev_counts"]["intrasentence"][domain]


def test_stereoset_averages_over_terms_and_gives_ties_to_the_anti_stereotype():
    counts = measures.term_counts(["a", "b", "b", "b"], *np.asarray([[3, 2, 1], [2, 2, 1], [1, 2, 1], [1, 2, 3.0]]).T)
    assert counts == {"a": (1, 1, 1, 1), "b": (3, 0, 1, 2)}
    expected = {"SS": 50.0, "LMS": 75.0, "ICAT": 75.0}  # over items SS would be 25
    assert measures.stereoset_scores(counts) == pytest.approx(expected)
    assert measures.stereoset_scores({"a": (2, 2, 2, 2)}) == {"SS": 100.0, "LMS": 100.0, "ICAT": 0.0}


def test_stereoset_of_a_model_pools_both_kinds_by_term(causal):
    texts = sentences(60, seed=3)
    triples = [
        Triple(("intrasentence", "intersentence")[n % 2], "d", f"t{n % 3}", f"the {WORDS[n % 9]}",
               *texts[3 * n : 3 * n + 3])
        for n in range(20)
    ]  # fmt: skip
    rows = {one.row(20, 0)["name"]: one for one in benchmarks.stereoset([causal], triples)}
    score_N3 = np.asarray([
        [score(causal, [(t.context if t.kind == "intersentence" else "", text)]).mean_S[0]
         for text in (t.stereotype, t.anti, t.unrelated)] for t in triples
    ])  # fmt: skip
    expected = measures.stereoset_scores(measures.term_counts([t.term for t in triples], *score_N3.T))
    for name, value in expected.items():
        row = rows[f"StereoSet both kinds {name}"].row(20, 0)
        assert row["value"] == pytest.approx(value) and row["items"] == 20 and row["terms"] == 3


def test_a_model_that_knows_nothing_has_ss_near_50(causal):
    """Words are drawn without regard to what they are the stereotype of."""
    texts = sentences(900, seed=5, low=5, high=5)
    triples = [Triple("intrasentence", "d", f"t{n % 30}", "BLANK", *texts[3 * n : 3 * n + 3]) for n in range(300)]
    row = {one.measure: one.row(500, 0) for one in benchmarks.stereoset([causal], triples)}["SS"]
    assert row["low"] < 50 < row["high"] and 35 < row["low"] and row["high"] < 65


# ------------------------------------------------------------------------------------------------ causal scores
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("always", [False, True])
def test_causal_scores_are_those_of_a_slow_loop(family, always):
    subject = fresh("causal", family=family)
    start = subject.tokenizer.bos_token_id
    texts = [("", text) for text in sentences(12)] + [("the old cook", text) for text in sentences(6, seed=1)]
    found = score(subject, texts + [("", "a")], always)
    first_V = logp(subject, [start])[0]
    for n, (context, text) in enumerate(texts + [("", "a")]):
        tokens, given = ids_of(subject, f"{context} {text}" if context else text), len(ids_of(subject, context))
        assert tokens[:given] == ids_of(subject, context)
        row_TV = logp(subject, [start] * always + tokens)
        expected = [row_TV[j - 1 + always, tokens[j]] if j or always else first_V[tokens[0]]
                    for j in range(given, len(tokens))]  # fmt: skip
        assert found.count_S[n] == len(expected)
        np.testing.assert_allclose(found.sum_S[n], sum(expected), **CLOSE)
        np.testing.assert_allclose(2 ** (found.mean_S[n] / np.log(2)), np.exp(np.mean(expected)), rtol=1e-4)


def test_neither_padding_nor_the_batch_changes_a_score(causal):
    texts = [("", text) for text in sentences(70, seed=2)]
    whole = score(causal, texts)
    for n in (0, 7, 69):
        alone = score(causal, [texts[n]])
        np.testing.assert_allclose(alone.sum_S[0], whole.sum_S[n], **CLOSE)
    longer = score(causal, [*texts, ("", " ".join(WORDS * 2))])  # rows of another width too
    np.testing.assert_allclose(longer.sum_S[:-1], whole.sum_S, **CLOSE)
    np.testing.assert_array_equal(score(causal, texts[::-1] + texts).sum_S[:70], score(causal, texts[::-1]).sum_S)


def test_a_sentence_beyond_the_context_is_not_scored_and_leaves_its_item_out(causal):
    long = " ".join(WORDS * 12)
    found = score(causal, [("", long), ("", "the cook"), ("", "")])
    assert found.count_S.tolist() == [0, len(ids_of(causal, "the cook")), 0]
    pairs = [Pair(long, "the cook", "g"), Pair("the cook", "a red cat", "g")]
    for one in benchmarks.pairs([causal], pairs, "P"):
        assert (one.about["items"], one.about["left_out"]) == (1, 1)
    with pytest.raises(UserError, match="no item fits"):
        benchmarks.pairs([causal], pairs[:1], "P")


def test_sentences_of_all_lengths_need_one_program_a_width():
    subject = fresh("causal", seed=1, family="opt")
    language._scorer.cache_clear()
    score(subject, [("", " ".join(WORDS[:n])) for n in range(1, 18)])  # rows of 32 and 64
    assert language._scorer(subject.model)._cache_size() == 2


# -------------------------------------------------------------------------------------------------------- pairs
def test_positions_by_difflib():
    one, other = [0, 5, 6, 7, 1], [0, 5, 8, 9, 7, 1]  # equal: 0 5 | 7 1
    assert masked_positions(one, other, changed=False) == ([1, 3], [1, 4])
    assert masked_positions(one, other, changed=True) == ([2], [2, 3])
    inserted = [0, 5, 9, 6, 7, 1]
    assert masked_positions(one, inserted, changed=False) == ([1, 2, 3], [1, 3, 4])
    assert masked_positions(one, inserted, changed=True) == ([], [2])
    assert masked_positions(one, one, changed=False) == ([1, 2, 3], [1, 2, 3])
    assert masked_positions([0, 1], [0, 1], changed=False) == ([], [])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("changed", [False, True])
def test_masked_scores_are_those_of_a_slow_loop(changed, family):
    subject = fresh("masked", family=family)
    pairs = [("the tall cook likes cats", "the tall clerk likes cats"), ("a nurse sees dogs", "a red pilot sees dogs"),
             ("old cats", "old birds often"), ("the cook sees birds", "the old clerk sees blue birds")]  # fmt: skip
    found = masked_scores(subject.model, subject.params, subject.tokenizer, pairs, changed=changed)
    for n, pair in enumerate(pairs):
        ids = [ids_of(subject, text, special=True) for text in pair]
        positions = masked_positions(*ids, changed=changed)
        for side in (0, 1):
            total = 0.0
            for at in positions[side]:
                hidden = [*ids[side]]
                hidden[at] = subject.tokenizer.mask_token_id
                total += logp(subject, hidden)[at, ids[side][at]]
            scored = all(positions)
            assert found.count_S[n + 4 * side] == (len(positions[side]) if scored else 0)
            np.testing.assert_allclose(found.sum_S[n + 4 * side], total if scored else 0.0, **CLOSE)


@pytest.mark.parametrize("head", ["causal", "masked"])
def test_pairs_compare_the_right_scores(head, request):
    """Every rate from scores of single pairs; where the pair is told against the stereotype, difflib sees it turned."""
    subject = request.getfixturevalue(head)
    texts = sentences(16, seed=9, low=4, high=6)
    items = [Pair(texts[2 * n], texts[2 * n + 1], f"g{n % 2}", n % 4 == 1) for n in range(8)]
    items.append(Pair("the cook", "the cook", "g0"))
    for one in benchmarks.pairs([subject], items, "P"):
        row = one.row(10, 0)
        wins = []
        for pair in items:
            if head == "causal":
                found = score(subject, [("", pair.more), ("", pair.less)])
                more, less = found.sum_S if one.measure == "sum" else found.mean_S
            else:
                changed = one.measure == "masked_changed"
                sides = (pair.less, pair.more) if pair.antistereo else (pair.more, pair.less)
                found = masked_scores(subject.model, subject.params, subject.tokenizer, [sides], changed=changed)
                values = np.round(found.mean_S if changed else found.sum_S, 3)
                more, less = values[::-1] if pair.antistereo else values
                if not found.count_S.all():
                    wins.append(None)
                    continue
            wins.append(0.5 if np.isclose(more, less, atol=1e-9) else float(more > less))
        rated = [(win, pair) for win, pair in zip(wins, items) if win is not None]
        direction = {"stereo": False, "antistereo": True}
        if one.part in direction:
            chosen = [win == 1 for win, pair in rated if pair.antistereo == direction[one.part] and win != 0.5]
        else:
            chosen = [win == 1 for win, pair in rated if one.part in (None, pair.group)]
        assert row["value"] == pytest.approx(100 * np.mean(chosen)), row["name"]


def test_equal_sentences_tie(causal, masked):
    items = [Pair(text, text, "same") for text in sentences(10)] + [Pair("the cook", "the clerk", "other")]
    for subject in (causal, masked):  # masked_changed, which comes last, leaves out pairs without a change
        one = next(one for one in benchmarks.pairs([subject], items, "P") if one.part == "same")
        row = one.row(10, 0)
        assert (row["value"], row["ties"], row["items"]) == (0.0, 10, 10)
    rate = measures.estimate(measures.decided_share, [measures.preference(np.ones(3), np.ones(3))], resamples=5)
    assert np.isnan(rate["value"])


# ---------------------------------------------------------------------------------------------------- intervals
def test_the_interval_covers():
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(200):
        sample = (rng.random((80, 1)) < 0.3).astype(float)
        found = measures.estimate(lambda mean: 100 * mean[..., 0], [sample], resamples=200, seed=trial)
        covered.append(found["low"] <= 30 <= found["high"])
    assert 0.89 <= np.mean(covered) <= 0.99  # 95 %, the noise of 200 trials; percentile intervals are a little short


def test_the_change_is_paired():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(100, 1))
    found = measures.estimate(lambda mean: mean[..., 0], [base + 0.1], [base], resamples=300)
    assert found["change"] == pytest.approx(0.1) and found["change_high"] - found["change_low"] < 1e-9
    assert found["high"] - found["low"] > 0.3  # of the level itself
    same = measures.estimate(lambda mean: mean[..., 0], [base], [base], resamples=300)
    assert (same["change"], same["change_low"], same["change_high"]) == (0, 0, 0)
    assert measures.estimate(lambda mean: mean[..., 0], [base], resamples=300)["low"] == same["baseline_low"]


def test_a_model_is_its_own_baseline(causal):
    pairs = [Pair(*sentences(2, seed=n), "g") for n in range(12)]
    for one in benchmarks.pairs([causal, causal], pairs, "P"):
        row = one.row(20, 0)
        assert row["change"] == row["change_low"] == row["change_high"] == 0 and row["value"] == row["baseline"]


# ------------------------------------------------------------------------------------------ generation and loss
SAMPLING = {"samples": 2, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seed": 0}


def test_continuations_depend_on_their_prompt_alone(causal):
    prompts = ["the cook", "a tall nurse likes", "every day the old pilot sees red birds and"]
    whole = continuations(causal.model, causal.params, causal.tokenizer, prompts, **SAMPLING)
    for n in (2, 0, 1):
        assert continuations(causal.model, causal.params, causal.tokenizer, [prompts[n]], **SAMPLING) == [whole[n]]
    assert len({text for texts in whole for text in texts}) == 6
    with pytest.raises(UserError, match="leaves room for 1 to 58 before --max-new-tokens 6"):
        continuations(causal.model, causal.params, causal.tokenizer, [" ".join(WORDS * 12)], **SAMPLING)


def test_generation_gap_and_ratio(causal):
    prompts = [Prompt(f"the {word}", ("he", "she")[n % 2]) for n, word in enumerate(WORDS[:10])]
    found, written = benchmarks.generation([causal, causal], prompts, lambda texts: np.asarray(list(map(len, texts))),
                                           **SAMPLING)  # fmt: skip
    rows = {row["name"]: row for row in (one.row(50, 0) for one in found)}
    level = {name: [line["score"] for line in written[:20] if line["group"] == name] for name in ("he", "she")}
    mean = {name: np.mean(scores) for name, scores in level.items()}
    assert all(line["score"] == len(line["text"]) for line in written)
    assert rows["Generation he mean score"]["value"] == pytest.approx(mean["he"])
    assert rows["Generation gap he - she"]["value"] == pytest.approx(mean["he"] - mean["she"])
    assert rows["Generation ratio he / she"]["value"] == pytest.approx(mean["he"] / mean["she"])
    assert all(row["change"] == 0 for row in rows.values())
    nothing, _ = benchmarks.generation([causal], prompts, lambda texts: np.zeros(len(texts)), **SAMPLING)
    assert nothing[-1].row(5, 0)["note"] and nothing[-2].row(5, 0)["value"] == 0


def test_words_are_found_whole(tmp_path):
    (tmp_path / "words.txt").write_text("cat\nred bird\n\n")
    score = word_scorer(tmp_path / "words.txt")
    assert score(["A CAT.", "cats", "the red bird", "", "red"]).tolist() == [1, 0, 1, 0, 0]


def test_group_loss_is_that_of_the_group_alone(causal):
    records = [Record(str(n), text, fields={"group": "ab"[n % 2]}) for n, text in enumerate(sentences(20))]

    def encoded(part):
        return encode(part, causal.tokenizer, TextConfig(), context=64, where="texts", tell=print)

    groups = {record.id: record.fields["group"] for record in records}
    rows = [one.row(20, 0) for one in benchmarks.group_loss([causal], [encoded(records)], groups)]
    scores = [language.token_scores(causal.model, causal.params, encoded(records[n::2])) for n in (0, 1)]
    alone = [language.language_metrics(score)["nll"] for score in scores]
    np.testing.assert_allclose([row["value"] for row in rows], [*alone, alone[0] - alone[1]], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- files
STEREOSET = {"context": "The BLANK", "sentence": "The a", "bias_type": "race", "label": 0, "id": "x", "target": "t"}
CROWS = "id,sent_more,sent_less,stereo_antistereo,bias_type\n"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def three(**changes):
    """The rows of an item; the last one is changed."""
    return [STEREOSET, STEREOSET | {"label": 1}, STEREOSET | {"label": 2} | changes]


REFUSED = {
    "label": (read_stereoset, "f.jsonl", lines(STEREOSET | {"label": 3}), "f.jsonl, line 1: field 'label' is 3"),
    "twice": (read_stereoset, "f.jsonl", lines(STEREOSET, STEREOSET), "line 2: id 'x' has label 0 twice"),
    "missing": (read_stereoset, "f.jsonl", lines(STEREOSET), "id 'x' has no row of label 1"),
    "context": (read_stereoset, "f.jsonl", lines(*three(context="B")), "line 3: field 'context' differs"),
    "no_target": (read_stereoset, "f.jsonl", lines({"context": "a"}), "line 1: field 'sentence' is missing"),
    "direction": (read_crows_pairs, "f.csv", CROWS + "0,a,b,both,age\n", "f.csv, line 2: field 'stereo_antistereo'"),
    "anti": (read_pairs, "f.jsonl", lines({"stereotype": "a", "group": "g"}), "line 1: field 'anti' is missing"),
    "number": (read_pairs, "f.jsonl", lines({"stereotype": "a", "anti": 1, "group": "g"}), "field 'anti' is a int"),
    "one_group": (read_prompts, "f.jsonl", lines({"prompt": "a", "group": "g"}), "'group' has 1 values .g.; a gap"),
    "empty": (read_pairs, "f.jsonl", "", "f.jsonl: holds no records"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_wrong_is_named_with_line_and_field(name, tmp_path):
    reader, file, text, message = REFUSED[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        reader(str(tmp_path / file))


def test_stereoset_rows_make_items(tmp_path):
    rows = [STEREOSET | {"id": id, "label": label, "sentence": f"{id}{label}", "context": context}
            for label in (2, 0, 1) for id, context in (("x", "A BLANK b"), ("y", "Whole."))]  # fmt: skip
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write(lines(*rows))
    assert read_stereoset(str(tmp_path / "f.jsonl.gz")) == [
        Triple("intrasentence", "race", "t", "A BLANK b", "x1", "x0", "x2"),
        Triple("intersentence", "race", "t", "Whole.", "y1", "y0", "y2"),
    ]


def test_winobias_lines_are_paired(tmp_path):
    pro, anti = tmp_path / "pro_stereotyped_type2.txt.dev", tmp_path / "anti_stereotyped_type2.txt.dev"
    pro.write_text("1 [The cook] met the clerk and [he] left.\n2 He sat.\n")
    with pytest.raises(UserError, match="anti_stereotyped_type2.txt.dev is missing"):
        read_winobias(tmp_path)
    anti.write_text("1 [The cook] met the clerk and [she] left.\n")
    with pytest.raises(UserError, match="has 1 lines"):
        read_winobias(tmp_path)
    anti.write_text("1 [The cook] met the clerk and [she] left.\n3 She sat.\n")
    with pytest.raises(UserError, match="line 2: begins with 3"):
        read_winobias(tmp_path)
    anti.write_text("1 [The cook] met the clerk and [she] left.\n2 She sat.\n")
    assert read_winobias(tmp_path)[0] == Pair(
        "The cook met the clerk and he left.", "The cook met the clerk and she left.", "type 2 dev"
    )
    anti.write_text("1 [The cook]\nShe sat.\n")
    with pytest.raises(UserError, match="line 2: is not a number"):
        read_winobias(tmp_path)


@pytest.mark.shared
def test_the_published_files_have_the_known_counts(shared):
    golden = json.loads((shared / "papers" / "golden_dp.json").read_text())
    dev, triples = golden["stereoset"]["dev_counts"], read_stereoset(shared / "data/stereoset/stereoset_dev.jsonl.gz")
    assert len(triples) == dev["ids"]
    for kind in ("intrasentence", "intersentence"):
        found = [triple.domain for triple in triples if triple.kind == kind]
        assert {domain: found.count(domain) for domain in set(found)} == dev[kind]
    assert {d: len({t.term for t in triples if t.domain == d}) for d in dev["terms"]} == dev["terms"]
    crows, pairs = golden["crows_pairs"], read_crows_pairs(shared / "data/crows_pairs/crows_pairs_anonymized.csv")
    groups = [pair.group for pair in pairs]
    assert {group: groups.count(group) for group in set(groups)} == crows["bias_type"]
    assert sum(pair.antistereo for pair in pairs) == crows["antistereo"] and len(pairs) == crows["rows"]
    lines = [pair.group for pair in read_winobias(shared / "data/winobias")]
    assert {group: lines.count(group) for group in lines} == {
        f"type {kind} {split}": 396 for kind in (1, 2) for split in ("dev", "test")
    }
