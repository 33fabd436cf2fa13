"""Golden values, every formula again in float64 NumPy, and the identities that follow from them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from toys import MODEL, OTHER, PARAMS, SETTING, compiled, first_batch, prepared

from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import IGNORED, Examples
from jaxforget.training.batches import Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import kl_divergence, next_token, token_logp
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, Setting
from jaxforget.unlearning.ceu import CEU, ceu
from jaxforget.unlearning.dpo import DPO
from jaxforget.unlearning.npo import NPO, npo
from jaxforget.unlearning.pdu import PDU, flatness, projected_ascent
from jaxforget.unlearning.recipe import moves, optimized
from jaxforget.unlearning.reference import sequence_logp
from jaxforget.unlearning.rmu import RMU
from jaxforget.unlearning.simnpo import SimNPO, simnpo
from jaxforget.unlearning.task_vector import TaskVector, negated
from jaxforget.unlearning.undial import Undial, undial
from jaxforget.unlearning.weighted_ascent import WGA, SatImp, weighted
from jaxforget.unlearning.whp import WHP, reinforced, whp

# ------------------------------------------------------------------------------------------------ golden values
# Rows of the golden batches: forget, preferred ("win"), retain. Labels as in Hugging Face's files, not shifted.
TOKENS = np.array([[1, 2, 3, 4, 5, 6], [2, 1, 5, 6, 0, 0], [1, 2, 2, 6, 0, 0], [2, 1, 4, 1, 6, 0], [5, 3, 1, 2, 6, 0],
                   [4, 5, 3, 4, 6, 0]])  # fmt: skip
_ = -100
UNSHIFTED = np.array([[_, _, 3, 4, 5, 6], [_, _, 5, 6, _, _], [_, _, 2, 6, _, _], [_, _, 4, 1, 6, _],
                      [_, 3, 1, 2, 6, _], [_, _, _, 4, 6, _]])  # fmt: skip
REAL = np.array([6, 4, 4, 5, 5, 5])
STUDENT = {"shift": np.repeat(np.float32([0.0, 1.1, 2.0]), 2), "blocks": {}}
REFERENCE = {"shift": np.repeat(np.float32([0.5, 1.6, 2.3]), 2), "blocks": {}}


@dataclasses.dataclass(frozen=True)
class Table:
    """Logits 2 sin(0.7 b + 1.3 t + 0.9 v + 0.13 t v + shift), the shift given by what the tokens are."""

    vocab_size: int = 7
    max_length: int = 6
    config = toys.Layered.config

    def batch_logits(self, params, batch):
        same_B6 = (batch["tokens"][:, None] == TOKENS[None]).all(-1)
        b, shift = same_B6 @ (jnp.arange(6) % 2), same_B6 @ jnp.asarray(params["shift"])
        t, v = np.ogrid[:6, :7]
        tv = jnp.asarray(1.3 * t + 0.9 * v + 0.13 * t * v)[None]
        return 2.0 * jnp.sin(0.7 * b[:, None, None] + tv + shift[:, None, None])

    def stream(self, params, batch, blocks):
        return self.batch_logits(params, batch)

    def flops_per_token(self, length):
        return 1.0


def golden_rows(first: int, ids: str, text: bool = False) -> Examples:
    """Two rows of the golden batches; text: every real token after the first is scored."""
    rows = slice(first, first + 2)
    real_BT = np.arange(6)[None] < REAL[rows, None]
    unshifted = np.where(real_BT, TOKENS[rows], -100) if text else UNSHIFTED[rows]
    labels = np.full_like(unshifted, -100)
    labels[:, :-1] = unshifted[:, 1:]
    columns = {"tokens": TOKENS[rows].astype(np.int32), "labels": labels.astype(np.int32),
               "length": REAL[rows].astype(np.int32), "key": id_keys(tuple(ids))}  # fmt: skip
    return Examples(tuple(ids), columns)


def golden_setting(text: bool = False, reference=REFERENCE) -> Setting:
    sets = {"forget": golden_rows(0, "ab", text), "retain": golden_rows(4, "cd", text)}
    records = [toys.Record(one, "y", "x", {"perturbed_answer": ["z"]}) for one in "ab"]
    return Setting(Table(), reference, sets, 2, 0, records=records, encode=lambda records: golden_rows(2, "ab"))


def golden_loss(method, setting, params=STUDENT) -> float:
    recipe = method.recipe(setting)
    parts = dict(recipe.parts)
    if "target" in parts:  # u = (1..7) / norm instead of a random one
        parts["target"] = method.steer * np.arange(1, 8, dtype=np.float32) / np.sqrt(140.0).astype(np.float32)
    batch = first_batch(recipe)
    return toys.mean_loss(recipe.objective({"model": params, **parts}, batch, None), batch)


ALONE = {"retain_weight": 0.0}
ONLY_RETAIN = {"forget_weight": 0.0, "retain_weight": 1.0}
GOLDEN = {
    "GradAscent": (WGA(beta=0.0, **ALONE), {}),
    "CE_forget": (WGA(beta=0.0, **ALONE), {"sign": -1}),
    "CE_retain": (WGA(**ONLY_RETAIN), {}),
    "GradDiff_g1_a1": (WGA(beta=0.0), {}),
    "NPO_b0.1": (NPO(**ALONE), {}),
    "NPO_b1": (NPO(beta=1.0, **ALONE), {}),
    "NPO_b0.1_at_ref": (NPO(**ALONE), {"params": REFERENCE}),
    "DPO_b0.1": (DPO(**ALONE), {}),
    "DPO_b0.1_at_ref": (DPO(**ALONE), {"params": REFERENCE}),
    "SimNPO_b4.5_d0_forget": (SimNPO(forget_weight=1.0, **ALONE), {}),
    "SimNPO_b3.5_d1_forget": (SimNPO(beta=3.5, delta=1.0, forget_weight=1.0, **ALONE), {}),
    "SimNPO_b0.5_d0_forget": (SimNPO(beta=0.5, forget_weight=1.0, **ALONE), {}),
    "WGA_b1": (WGA(**ALONE), {}),
    "WGA_b0": (WGA(beta=0.0, **ALONE), {}),
    "SatImp_5_1": (SatImp(**ALONE), {}),
    "SatImp_0_0": (SatImp(beta1=0.0, beta2=0.0, **ALONE), {}),
    "CEU_skip1": (CEU(), {}),
    "CEU_skip0": (CEU(skip=0), {}),
    "UNDIAL_b10_masked": (Undial(), {}),
    "UNDIAL_b0_masked_at_ref": (Undial(beta=0.0), {"params": REFERENCE}),
    "PDU_forget_shifted": (PDU(epsilon=2.7320246991105797), {}),  # the retain loss: the other term is 0
    "KL_retain_labelled": (WGA(retain_loss="kl", **ONLY_RETAIN), {}),
    "KL_retain_nonpad_targets": (WGA(retain_loss="kl", **ONLY_RETAIN), {"text": True}),
    "RMU_forget_c2": (RMU(**ALONE), {}),
    "RMU_forget_c2_mse_all": (RMU(positions="all", **ALONE), {}),
    "RMU_retain_EMBED_DIFF": (RMU(**ONLY_RETAIN), {}),
    "Yao_GA_microbatch1": (METHODS["gradient_ascent"], {"text": True}),
}
ELSEWHERE = {  # golden losses that are no method's, or another code's
    "Yao_seq_mean_CE_forget", "Yao_seq_mean_CE_retain", "Yao_GA_plus_GD_pair_f0_r1", "ME_KL_uniform",
    "CrossEntropy_ref_student_all_positions", "CrossEntropy_ref_student_nonpad_targets", "KL_retain_all_positions",
    "PDU_forget_unshifted", "RMU_forget_c2_released_broadcast", "RMU_retain_released_broadcast",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(shared):
    values = json.loads((shared / "papers/golden_unlearning.json").read_text())["losses"]["values"]
    return {name: one["value"] for name, one in values.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_golden(name, golden):
    method, how = GOLDEN[name]
    value = golden_loss(method, golden_setting(how.get("text", False)), how.get("params", STUDENT))
    # float32; SimNPO's smallest value is e^-12.4, where an error in the exponent counts tenfold.
    assert how.get("sign", 1) * value == pytest.approx(golden[name], rel=2e-5 if golden[name] < 1e-5 else 3e-6)


def test_every_golden_loss_is_accounted_for(golden):
    assert golden.keys() == GOLDEN.keys() | ELSEWHERE


def test_the_losses_of_yao_et_al_are_golden(golden):
    forget, retain = golden_rows(0, "ab", True).columns, golden_rows(4, "cd", True).columns
    one = np.ones(2, np.float32)
    losses = [next_token(Table())({"model": STUDENT}, {**part, "factor": one}, None) for part in (forget, retain)]
    np.testing.assert_allclose(losses[0], golden["Yao_seq_mean_CE_forget"], rtol=1e-6)
    np.testing.assert_allclose(losses[1], golden["Yao_seq_mean_CE_retain"], rtol=1e-6)
    method = METHODS["ascent_descent_indist"]  # the released trainer on forget sequence 0 and retain sequence 1
    value = -method.forget_weight * losses[0][0] + method.retain_weight * losses[1][1]
    assert float(value) == pytest.approx(golden["Yao_GA_plus_GD_pair_f0_r1"], rel=1e-5)


def test_the_released_kl_differs_by_the_entropy_of_the_reference(golden):
    examples = golden_rows(4, "cd", True)
    reference, student = (Table().batch_logits(params, examples.columns) for params in (REFERENCE, STUDENT))
    p = jax.nn.softmax(reference)
    cross_BT = -(p * jnp.log(jax.nn.softmax(student) + 1e-12)).sum(-1)  # as released
    entropy_BT = -(p * jax.nn.log_softmax(reference)).sum(-1)
    np.testing.assert_allclose(cross_BT - kl_divergence(reference, student), entropy_BT, rtol=1e-5)
    value = float(cross_BT[examples.scored].mean())
    assert value == pytest.approx(golden["CrossEntropy_ref_student_nonpad_targets"], rel=1e-6)


# ------------------------------------------------------------------------------------- the formulas in float64
# A row is (z, r, y): logits of the model and of the starting one at the scored positions, (n, V), and the labels (n,).
def logp(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def of_labels(z, y):
    return logp(z)[np.arange(len(y)), y]


def total(z, y):
    """log pi."""
    return of_labels(z, y).sum()


def token_mean(rows, value):
    return np.concatenate([value(*row) for row in rows]).mean()


def sequence_mean(rows, value):
    return np.mean([value(*row) for row in rows])


def log_sigmoid(x):
    return -np.log1p(math.exp(-x))


def kl(z, r, y):
    return (np.exp(logp(r)) * (logp(r) - logp(z))).sum(-1)


def cross_entropy(p, z):
    return -(p * logp(z)).sum(-1)


def without_true(z, r, y):
    p = np.exp(logp(z))
    p[np.arange(len(y)), y] = 0.0
    return cross_entropy(p / p.sum(-1, keepdims=True), z)


def lowered(z, r, y, beta):
    r = r.copy()
    r[np.arange(len(y)), y] -= beta
    return cross_entropy(np.exp(logp(r)), z)


def generic(z, r, s, a):
    return cross_entropy(np.exp(logp(r - a * np.maximum(s - r, 0.0))), z)


def npo_64(x, b):
    return np.mean([2 / b * np.log1p((math.exp(total(z, y)) / math.exp(total(r, y))) ** b) for z, r, y in x.forget])


def dpo_64(x, b):
    gains = [total(z, y) - total(r, y) for z, r, y in x.forget]
    wanted = [total(z, y) - total(r, y) for z, r, y in x.preferred]
    return np.mean([-2 / b * log_sigmoid(b * (w - g)) for g, w in zip(gains, wanted, strict=True)])


def weighted_64(x, b1, b2):
    def value(z, r, y):
        p = np.exp(of_labels(z, y))
        return p**b1 * (1 - p) ** b2 * np.log(p)

    return token_mean(x.forget, value)


def ascend(x):
    return sequence_mean(x.forget, lambda z, r, y: of_labels(z, y).mean())


def descend(x):
    return -ascend(x)


def nll(rows):
    return -token_mean(rows, lambda z, r, y: of_labels(z, y))


def distance(rows, target):
    """rows: hidden states of answer tokens, those of the starting model."""
    return np.mean([((h - (was if target is None else target)) ** 2).mean() for h, was in rows])


FORMULAS = {
    "gradient_ascent": ascend,
    "random_labels": descend,
    "adversarial_samples": descend,
    **{f"ascent_descent_{where}": lambda x: 0.5 * ascend(x) - 0.5 * sequence_mean(
        x.retain, lambda z, r, y: of_labels(z, y).mean()) for where in ("indist", "general")},
    **{f"ascent_kl_{where}": lambda x: ascend(x) + sequence_mean(x.retain, lambda z, r, y: kl(z, r, y).mean())
       for where in ("indist", "general")},
    "npo": lambda x: npo_64(x, 0.1) + nll(x.retain),
    "simnpo": lambda x: 0.125 * np.mean([-2 / 4.5 * log_sigmoid(-4.5 * of_labels(z, y).mean()) for z, r, y in x.forget])
    + nll(x.retain),
    **{name: lambda x: dpo_64(x, 0.1) + nll(x.retain) for name in ("dpo", "idk_dpo", "alt_po")},
    "idk_nll": lambda x: nll(x.forget) + nll(x.retain),
    "rmu": lambda x: distance(x.forget_states, x.target) + distance(x.retain_states, None),
    "undial": lambda x: token_mean(x.forget, lambda z, r, y: lowered(z, r, y, 10.0)),
    "wga": lambda x: weighted_64(x, 1, 0) + nll(x.retain),
    "satimp": lambda x: weighted_64(x, 5, 1) + 0.1 * nll(x.retain),
    "ceu": lambda x: token_mean(x.forget, without_true),
    "pdu": lambda x: token_mean(x.forget, lambda z, r, y: (z.max(-1) - z.mean(-1)) ** 2) + nll(x.retain) - x.epsilon,
    "task_vector": lambda x: nll(x.forget),
    "whp": lambda x: np.concatenate([generic(z, r, s, 5.0)
                                     for (z, r, y), s in zip(x.forget, x.reinforced, strict=True)]).mean(),
}  # fmt: skip


def in_float64(recipe, batch, params):
    """Take a batch apart: rows of logits and of hidden states, in float64."""
    batch = {name: np.asarray(column) for name, column in batch.items()}
    x = toys.SimpleNamespace()

    def logits(params, part):
        return np.asarray(MODEL.batch_logits(params, part), np.float64)

    def rows(kind, which):
        part = {"tokens": batch[f"{kind}tokens"][which]}
        z, r = (logits(p, part) for p in (params, PARAMS))
        labels = batch[f"{kind}labels"][which]
        return [(z[n][row != IGNORED], r[n][row != IGNORED], row[row != IGNORED]) for n, row in enumerate(labels)]

    x.forget, x.retain = (rows("", batch["stream"] == stream) for stream in (0, 1))
    if "preferred_tokens" in batch:
        x.preferred = rows("preferred_", batch["stream"] == 0)
    if "reinforced" in recipe.parts:
        z = logits(recipe.parts["reinforced"], batch)
        x.reinforced = [z[n][row != IGNORED] for n, row in enumerate(batch["labels"])]
    blocks = 2  # min(7, 2 // 2) + 1
    h, was = (np.asarray(MODEL.stream(p, batch, blocks), np.float64) for p in (params, PARAMS))
    answers = [1 + np.flatnonzero(row != IGNORED) for row in batch["labels"]]
    states = [(h[n][answer], was[n][answer]) for n, answer in enumerate(answers)]
    x.forget_states = [s for s, stream in zip(states, batch["stream"], strict=True) if stream == 0]
    x.retain_states = [s for s, stream in zip(states, batch["stream"], strict=True) if stream == 1]
    x.target = np.asarray(recipe.parts.get("target", np.zeros(6)), np.float64)
    return x


@pytest.mark.parametrize("name", METHODS)
def test_formulas(name):
    recipe, batch = prepared(name)
    x = in_float64(recipe, batch, OTHER)
    if name == "pdu":  # 1.1 times the loss of the starting model on all of retain
        retain = SETTING.sets["retain"].columns
        z = np.asarray(MODEL.batch_logits(PARAMS, retain), np.float64)
        x.epsilon = 1.1 * nll([(z[n][row != IGNORED], None, row[row != IGNORED])
                               for n, row in enumerate(retain["labels"])])  # fmt: skip
    value = toys.mean_loss(toys.forward(recipe.objective)(OTHER, dict(recipe.parts), batch), batch)
    assert value == pytest.approx(FORMULAS[name](x), rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["npo", "undial", "rmu", "pdu"])
def test_the_retain_term_may_be_a_kl(name):
    method = dataclasses.replace(METHODS[name], retain_weight=1.0, **({"epsilon": 0.5} if name == "pdu" else {}))
    recipe = dataclasses.replace(method, retain_loss="kl", forget_weight=0.0).recipe(SETTING)
    batch = first_batch(recipe)
    value = toys.mean_loss(toys.forward(recipe.objective)(OTHER, dict(recipe.parts), batch), batch)
    expected = token_mean(in_float64(recipe, batch, OTHER).retain, kl)
    assert value == pytest.approx(expected - (0.5 if name == "pdu" else 0.0), rel=2e-5)


# --------------------------------------------------------------------------------------------------- identities
Z = jnp.asarray(np.random.default_rng(0).normal(0, 2, (3, 5, 7)), jnp.float32)
R = jnp.asarray(np.random.default_rng(1).normal(0, 2, (3, 5, 7)), jnp.float32)
LABELS = np.array([[2, 5, 0, 3, -100], [-100, 1, 1, -100, -100], [6, -100, -100, -100, -100]], np.int32)
COUNT = np.array([4, 2, 1])
BATCH = {"labels": LABELS, "stream": np.zeros(3, np.int32)}


def term(loss, z=Z, parts=None, **columns):
    """Return (losses_B, gradient of their sum in the logits)."""
    batch = {**BATCH, **columns}

    def values(z):
        losses_B = loss({"reference": R, **(parts or {})}, batch, z)
        return losses_B.sum(), losses_B

    grads, losses_B = jax.grad(values, has_aux=True)(z)
    return np.asarray(losses_B), np.asarray(grads)


def towards_labels(z=Z):
    """Return the gradient of the sum of log p in the logits: onehot - p at scored positions, 0 elsewhere."""
    onehot = np.asarray(jax.nn.one_hot(LABELS, 7))
    return np.where((LABELS != -100)[..., None], onehot - np.asarray(jax.nn.softmax(z)), 0.0)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_at_the_reference(beta):
    logp_B = np.asarray(sequence_logp(Z, LABELS))
    losses_B, grads = term(npo(beta), reference_logp=logp_B)
    np.testing.assert_allclose(losses_B, 2.0 / beta * math.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(grads, towards_labels(), atol=1e-6)  # ascent on the sum


def test_npo_weighs_ascent_by_the_ratio():
    logp_B, reference_B = (np.asarray(sequence_logp(z, LABELS), np.float64) for z in (Z, R))
    for beta in (1e-6, 0.1, 1.0, 4.0):
        losses_B, grads = term(npo(beta), reference_logp=np.float32(reference_B))
        assert (losses_B >= 0).all()
        weight_B = 2.0 / (1.0 + np.exp(-beta * (logp_B - reference_B)))  # 2 pi^b / (pi^b + pi_ref^b)
        np.testing.assert_allclose(grads, weight_B[:, None, None] * towards_labels(), rtol=1e-4, atol=1e-5)
        if beta == 1e-6:
            np.testing.assert_allclose(weight_B, 1.0, atol=1e-4)  # plain ascent
    ratio_B = logp_B - reference_B
    losses_B, _ = term(npo(0.01), reference_logp=np.float32(reference_B))
    near = ratio_B + 0.01 * ratio_B**2 / 4  # the first two terms in beta
    np.testing.assert_allclose(losses_B - 200 * math.log(2.0), near, atol=2e-3)


def test_dpo_at_the_reference():
    """The value is that of NPO, and the gradient prefers one answer as much as it rejects the other."""
    method = dataclasses.replace(METHODS["dpo"], retain_weight=0.0)
    recipe = method.recipe(SETTING)
    batch = first_batch(recipe)
    loss, grads = compiled(recipe.objective)(PARAMS, dict(recipe.parts), batch)
    assert float(loss) == pytest.approx(20.0 * math.log(2.0), rel=1e-6)

    def gain(params):
        better = sequence_logp(MODEL.batch_logits(params, {"tokens": batch["preferred_tokens"]}),
                               batch["preferred_labels"])  # fmt: skip
        return jnp.mean(sequence_logp(MODEL.batch_logits(params, batch), batch["labels"]) - better)

    expected = jax.jit(jax.grad(gain))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected)


def test_simnpo():
    mean_B = -np.asarray(sequence_logp(Z, LABELS), np.float64) / COUNT
    for n, delta in enumerate(mean_B):
        assert term(simnpo(4.5, float(delta)))[0][n] == pytest.approx(2 / 4.5 * math.log(2.0), rel=1e-4)
    _, grads = term(simnpo(1.5, 0.7))
    weight_B = 2.0 / (1.0 + np.exp(1.5 * (mean_B - 0.7))) / COUNT
    np.testing.assert_allclose(grads, weight_B[:, None, None] * towards_labels(), rtol=1e-4, atol=1e-6)
    outside, inside = term(simnpo(1.5, 0.0, 1.05)), term(simnpo(1.5, 0.7))
    np.testing.assert_allclose(outside[0], inside[0], rtol=1e-5)  # gamma of the paper is beta * delta


def test_weighted_ascent():
    ascent = towards_labels() / COUNT[:, None, None]
    for loss in (weighted(0.0, 0.0), weighted(1.0, 0.0), weighted(5.0, 1.0)):
        b1, b2 = {weighted(0.0, 0.0): (0, 0), weighted(1.0, 0.0): (1, 0)}.get(loss, (5, 1))
        p_BT = np.exp(np.take_along_axis(logp(np.asarray(Z, np.float64)), np.maximum(LABELS, 0)[..., None], -1))
        # The weight is no path for the gradient.
        np.testing.assert_allclose(term(loss)[1], p_BT**b1 * (1 - p_BT) ** b2 * ascent, rtol=1e-4, atol=1e-6)
    forgotten = Z - 80.0 * np.asarray(jax.nn.one_hot(LABELS, 7))
    for loss in (weighted(1.0, 0.0), weighted(0.5, 0.0)):
        losses_B, grads = term(loss, forgotten)
        assert np.abs(losses_B).max() < 1e-12 and np.abs(grads).max() < 1e-12


def test_ceu():
    losses_B, grads = term(ceu)
    p = np.exp(logp(np.asarray(Z, np.float64)))
    for b, t in zip(*np.nonzero(LABELS != -100), strict=True):
        y = LABELS[b, t]
        expected = p[b, t] - np.where(np.arange(7) == y, 0.0, p[b, t] / (1 - p[b, t, y]))  # p - p*: no path by p*
        assert expected[y] > 0  # so z_y falls
        np.testing.assert_allclose(grads[b, t], expected / COUNT[b], rtol=1e-4, atol=1e-6)
    b, t, y = 2, 0, 6  # the only target of its row
    target = np.delete(p[b, t], y) / (1 - p[b, t, y])
    assert losses_B[b] == pytest.approx(-(target * np.log(target)).sum() - math.log(1 - p[b, t, y]), rel=1e-5)


def test_constants_added_to_logits():
    """PDU, the KL and the likelihoods do not see them, at any position."""
    shifts = jnp.asarray(np.random.default_rng(2).normal(0, 3, (3, 5, 1)), jnp.float32)
    for loss in (flatness, ceu, weighted(1.0, 0.0), simnpo(4.5), npo(0.1)):
        columns = {"reference_logp": np.float32([-9.0, -4.0, -2.0])}
        np.testing.assert_allclose(term(loss, Z + shifts, **columns)[0], term(loss, **columns)[0], rtol=2e-5)
    np.testing.assert_allclose(kl_divergence(R, Z + shifts), kl_divergence(R, Z), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kl_divergence(R + shifts, Z), kl_divergence(R, Z), rtol=1e-4, atol=1e-5)


def test_pdu_is_0_where_all_logits_are_equal():
    flat = jnp.broadcast_to(jnp.asarray(np.arange(15.0).reshape(3, 5, 1), jnp.float32), Z.shape)
    np.testing.assert_allclose(term(flatness, flat)[0], 0.0, atol=1e-10)  # rounding of the mean
    assert (term(flatness, flat.at[:, :, 2].add(0.1))[0] > 0).all()


def test_undial_without_lowering_is_distillation():
    loss = undial(_Logits(), 0.0)
    losses_B, grads = term(loss, R)
    assert np.abs(grads).max() < 1e-6  # rounding of p - q
    entropy_BT = -np.asarray((jax.nn.softmax(R) * jax.nn.log_softmax(R)).sum(-1))
    expected = [entropy[label != -100].mean() for entropy, label in zip(entropy_BT, LABELS, strict=True)]
    np.testing.assert_allclose(losses_B, expected, rtol=1e-5)


def test_whp_takes_off_what_reinforcement_adds():
    """In float64; without a scale, or where no logit rises, it is distillation of the starting model."""
    S = jnp.asarray(np.random.default_rng(3).normal(0, 2, (3, 5, 7)), jnp.float32)
    scored = LABELS != -100
    for scale, added in ((2.5, S), (0.0, S), (2.5, R - jnp.abs(S))):
        losses_B, grads = term(whp(_Logits(), scale), parts={"reinforced": added})
        z, r, s = (np.asarray(x, np.float64) for x in (Z, R, added))
        expected = [generic(z[b], r[b], s[b], scale)[scored[b]].mean() for b in range(3)]
        np.testing.assert_allclose(losses_B, expected, rtol=1e-5)
        target = np.exp(logp(r - scale * np.maximum(s - r, 0.0)))
        gap = (np.exp(logp(z)) - target) * scored[..., None] / COUNT[:, None, None]
        np.testing.assert_allclose(grads, gap, rtol=1e-4, atol=1e-6)  # no gradient by the target
        if added is not S or not scale:
            assert np.abs(term(whp(_Logits(), scale), R, {"reinforced": added})[1]).max() < 1e-6  # rounding of p - q


def test_the_reinforced_model_is_tuned_on_the_forget_set_once(tmp_path, monkeypatch):
    setting, optimizer = SETTING._replace(cache=tmp_path), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @jax.jit
    def update(params, state, tokens, labels):
        def loss(params):
            logp_BT, scored_BT = token_logp(MODEL.batch_logits(params, {"tokens": tokens}), labels)
            return -logp_BT.sum() / scored_BT.sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    batches = toys.Batches((Stream(SETTING.sets["forget"], 4),), 4, 0)
    for n in range(batches.steps):
        batch = batches.take(n, n + 1, 1)
        params, state = update(params, state, batch["tokens"][0], batch["labels"][0])
    found = reinforced(setting, 4, 1e-2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, params)
    monkeypatch.setattr("jaxforget.unlearning.whp.fit", None)  # read from here on
    again = WHP(reinforce_epochs=4, reinforce_rate=1e-2).recipe(setting).parts["reinforced"]
    jax.tree.map(np.testing.assert_array_equal, again, found)
    with pytest.raises(TypeError):
        reinforced(setting, 4, 2e-2)  # another one


class _Logits:
    def batch_logits(self, params, batch):
        return params


def test_rmu_is_0_at_its_target():
    class Still(toys.Layered):
        def stream(self, params, batch, blocks):
            return jnp.broadcast_to(params["h"][None, None], (*batch["tokens"].shape, 6))

    method = dataclasses.replace(METHODS["rmu"], retain_weight=0.0)
    recipe = method.recipe(SETTING._replace(model=Still(), params={"h": np.zeros(6, np.float32)}))
    batch = first_batch(recipe)
    u = np.asarray(recipe.parts["target"]) / 2.0
    assert np.linalg.norm(u) == pytest.approx(1.0) and (u > 0).all()
    assert not recipe.objective({"model": {"h": 2.0 * u}, **recipe.parts}, batch, None).any()
    assert np.allclose(recipe.objective({"model": {"h": 0.0 * u}, **recipe.parts}, batch, None), 4.0 / 6.0)
    again, other = (method.recipe(SETTING._replace(seed=seed)).parts["target"] for seed in (0, 1))
    np.testing.assert_array_equal(again, recipe.parts["target"])
    assert not np.allclose(other, again)


@pytest.mark.parametrize("depth, blocks", [(1, 1), (2, 2), (12, 7), (14, 8), (16, 8), (32, 8)])
def test_the_block_that_rmu_steers(depth, blocks):
    """Block 7, or the middle one."""
    model = toys.SimpleNamespace(config=toys.SimpleNamespace(stacks={"blocks": depth}))
    assert RMU().blocks(model) == blocks
    assert RMU(layer=0).blocks(model) == 1


def test_rmu_reads_the_blocks_that_it_computes_and_no_others():
    recipe = RMU(layer=0).recipe(SETTING)
    assert recipe.parts["reference"]["blocks"]["mix"]["kernel"].shape == (1, 6, 6)
    _, grads = compiled(recipe.objective)(OTHER, dict(recipe.parts), first_batch(recipe))
    kernel_LDF = np.asarray(grads["blocks"]["mix"]["kernel"])
    assert kernel_LDF[0].any() and not kernel_LDF[1].any() and not np.any(grads["head"]["kernel"])


def test_task_vector():
    for scale, expected in ((0.0, PARAMS), (-1.0, OTHER)):
        found = negated(scale)({"reference": PARAMS, "model": OTHER})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    recipe = TaskVector(scale=2.0).recipe(SETTING)
    for how, moving in {"everything": everything(), **toys.MOVING}.items():
        wrapped = moves(moving, (), recipe.finish)
        trainable, frozen = wrapped.init(jax.random.key(0), {"model": OTHER, "reference": PARAMS})
        in_step, saved = (wrapped.combine(frozen, trainable, key)["model"] for key in (jax.random.key(0), None))
        plain = moving.combine(frozen, trainable["own"])["model"]
        assert jax.tree.structure(in_step) == jax.tree.structure(plain), how
        expected = jax.tree.map(lambda was, x: was - 2.0 * (x - was), PARAMS, OTHER)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), saved, expected)


# ------------------------------------------------------------------------------------------------------ the dual
def test_projected_ascent():
    transform = projected_ascent(0.5, 2)
    state, value, seen = transform.init(1.0), jnp.float32(1.0), []
    for gradient in (3.0, 3.0, 2.0, -5.0, -1.0, 4.0):
        update, state = transform.update(jnp.float32(gradient), state, value)
        value = optax.apply_updates(value, update)
        seen.append(float(value))
    assert seen == [1.0, 1.0, 2.0, 0.0, 0.0, 2.0]


def test_the_dual_follows_the_retain_loss():
    """lambda <- max(0, lambda + eta (L_retain - epsilon)), whatever the model's optimizer and clipping do."""
    method = PDU(epsilon=2.5, eta=0.7, warmup_epochs=1, retain_weight=3.0)
    recipe = method.recipe(SETTING)
    inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1))
    step = make_step(recipe.objective, moves(everything(), ("dual",)), mean_gradient(),
                     optimized(inner, tuple(recipe.optimizers.items())))  # fmt: skip
    state, frozen = step.init(jax.random.key(0), {"model": PARAMS, **recipe.parts})
    batches = toys.Batches(recipe.streams, 4, 0)
    assert batches.steps_per_epoch == 2
    update, expected = jax.jit(step.update), 3.0
    for n in range(batches.steps):
        batch = {name: column[0] for name, column in batches.take(n, n + 1, 1).items()}
        model = step.combine(frozen, state.trainable)["model"]
        loss = nll(in_float64(recipe, batch, model).retain)
        state, _ = update(state, frozen, batch)
        if n >= 2:
            expected = max(0.0, expected + 0.7 * (loss - 2.5))
        assert float(state.trainable["others"]["dual"]) == pytest.approx(expected, rel=1e-4, abs=1e-5), n
    assert expected != 3.0
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, step.combine(frozen, state.trainable)["model"], PARAMS))
    assert 0 < float(moved) < 1.01 * 8 * 0.1 * 1e-3
