"""Golden numbers of a binary predictor and of an ensemble of three, and joints of group, label and votes to draw from.

The numbers were computed once with an LP solver in float64 and rounded to 6 digits; none is of the FairSISA paper.
Optima listed with a table are unique. Shapes: N examples, K members, A groups, Y classes (2), T cells.
"""

import numpy as np

ROUNDED = 2e-6  # of numbers with 6 digits
NAMES = ("first", "second")

# Examples by [group][label][cell]. The cells of G1 and G2 are one vote, those of G4 the votes of three members with the
# first as the highest bit.
G1 = np.array([[[360, 40], [30, 170]], [[60, 40], [60, 240]]], float)
G2 = np.array([[[540, 60], [30, 170]], [[90, 60], [10, 40]]], float)
G4 = np.array(
    [
        [[171, 62, 56, 29, 34, 18, 18, 12], [4, 11, 5, 15, 26, 88, 34, 117]],
        [[105, 26, 28, 9, 22, 4, 5, 1], [11, 24, 21, 47, 20, 46, 39, 92]],
    ],
    float,
)

# Metrics are (accuracy, fpr_A, tpr_A, eo_max, eo_avg, eo_sum).
BASE = {
    "G1": (0.83, (0.1, 0.4), (0.85, 0.8), 0.3, 0.175, 0.35),
    "G2": (0.84, (0.1, 0.4), (0.85, 0.8), 0.3, 0.175, 0.35),
}

# (counts, epsilon, objective, constraint): table_AT and its metrics.
BINARY = {
    ("G1", 0.0, "error", "odds"): ([[0.346667, 0.88], [0.0, 1.0]], (0.7, (0.4, 0.4), (0.8, 0.8), 0.0, 0.0, 0.0)),
    ("G1", 0.0, "aif360", "odds"): ([[0.346667, 0.88], [0.0, 1.0]], (0.7, (0.4, 0.4), (0.8, 0.8), 0.0, 0.0, 0.0)),
    ("G1", 0.0, "pleiss", "odds"): ([[0.346667, 0.88], [0.0, 1.0]], (0.7, (0.4, 0.4), (0.8, 0.8), 0.0, 0.0, 0.0)),
    ("G1", 0.02, "error", "odds"): (
        [[0.321333, 0.908], [0.0, 1.0]],
        (0.712, (0.38, 0.4), (0.82, 0.8), 0.02, 0.02, 0.04),
    ),
    ("G1", 0.05, "error", "odds"): ([[0.283333, 0.95], [0.0, 1.0]], (0.73, (0.35, 0.4), (0.85, 0.8), 0.05, 0.05, 0.1)),
    ("G1", 0.1, "error", "odds"): (
        [[0.222222, 1.0], [0.0, 1.0]],
        (0.756667, (0.3, 0.4), (0.883333, 0.8), 0.1, 0.091667, 0.183333),
    ),
    ("G1", 0.0, "error", "opportunity"): (
        [[0.0, 1.0], [0.25, 1.0]],
        (0.83, (0.1, 0.55), (0.85, 0.85), 0.45, 0.225, 0.45),
    ),
    ("G2", 0.0, "error", "odds"): ([[0.0, 0.0], [0.0, 0.0]], (0.75, (0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)),
    ("G2", 0.0, "aif360", "odds"): ([[0.346667, 0.88], [0.0, 1.0]], (0.65, (0.4, 0.4), (0.8, 0.8), 0.0, 0.0, 0.0)),
    ("G2", 0.0, "pleiss", "odds"): ([[0.0, 0.0], [0.0, 0.0]], (0.75, (0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)),
    ("G2", 0.02, "error", "odds"): (
        [[0.0, 0.092308], [0.0, 0.073077]],
        (0.758692, (0.009231, 0.029231), (0.078462, 0.058462), 0.02, 0.02, 0.04),
    ),
    ("G2", 0.05, "error", "odds"): (
        [[0.0, 0.230769], [0.0, 0.182692]],
        (0.771731, (0.023077, 0.073077), (0.196154, 0.146154), 0.05, 0.05, 0.1),
    ),
    ("G2", 0.1, "error", "odds"): (
        [[0.0, 0.461538], [0.0, 0.365385]],
        (0.793462, (0.046154, 0.146154), (0.392308, 0.292308), 0.1, 0.1, 0.2),
    ),
    ("G2", 0.0, "error", "opportunity"): (
        [[0.0, 0.941176], [0.0, 1.0]],
        (0.833529, (0.094118, 0.4), (0.8, 0.8), 0.305882, 0.152941, 0.305882),
    ),
}

# G4: table_AT and metrics of each member by itself, before (no table) and after.
MEMBERS = [
    (
        (0.79, (0.205, 0.16), (0.883333, 0.656667), 0.226667, 0.135833, 0.271667),
        [[0.009902, 0.742088], [0.0, 1.0]],
        (0.748333, (0.16, 0.16), (0.656667, 0.656667), 0.0, 0.0, 0.0),
    ),
    (
        (0.676667, (0.2875, 0.215), (0.57, 0.663333), 0.093333, 0.082917, 0.165833),
        [[0.0, 1.0], [0.152026, 0.782138]],
        (0.64125, (0.2875, 0.2875), (0.57, 0.57), 0.0, 0.0, 0.0),
    ),
    (
        (0.7325, (0.3025, 0.2), (0.77, 0.696667), 0.1025, 0.087917, 0.175833),
        [[0.0, 0.9474], [0.108236, 1.0]],
        (0.721455, (0.286589, 0.286589), (0.729498, 0.729498), 0.0, 0.0, 0.0),
    ),
]

# G4: the plain majority vote, (method, epsilon): table_AT, by all votes for `each`, and its metrics.
MAJORITY = (0.818333, (0.1925, 0.095), (0.846667, 0.746667), 0.1, 0.09875, 0.1975)
ENSEMBLE = {
    ("majority", 0.0): (
        [[0.0, 0.908288], [0.088227, 1.0]],
        (0.797086, (0.174846, 0.174846), (0.769018, 0.769018), 0.0, 0.0, 0.0),
    ),
    ("count", 0.0): (
        [[0.0, 0.0, 0.878005, 1.0], [0.0, 0.20441, 1.0, 1.0]],
        (0.80914, (0.172676, 0.172676), (0.790955, 0.790955), 0.0, 0.0, 0.0),
    ),
    ("vector", 0.0): (
        [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.595808, 1.0], [0.0, 0.052395, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]],
        (0.824523, (0.101811, 0.101811), (0.750858, 0.750858), 0.0, 0.0, 0.0),
    ),
    ("each", 0.0): (
        [
            [0.0, 0.009381, 0.009902, 0.947921, 0.0, 0.703055, 0.742088, 0.986434],
            [0.016455, 0.152026, 0.084655, 0.782138, 0.243807, 1.0, 0.805718, 1.0],
        ],
        (0.781328, (0.166189, 0.147412), (0.722947, 0.722223), 0.018777, 0.009751, 0.019501),
    ),
    ("majority", 0.02): (
        [[0.0, 0.926454], [0.069992, 1.0]],
        (0.801361, (0.178342, 0.158342), (0.784398, 0.764398), 0.02, 0.02, 0.04),
    ),
    ("count", 0.02): (
        [[0.0, 0.0, 0.964275, 1.0], [0.0, 0.293933, 1.0, 1.0]],
        (0.813495, (0.186695, 0.206695), (0.830352, 0.810352), 0.02, 0.02, 0.04),
    ),
    ("vector", 0.02): (
        [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.973054, 1.0], [0.0, 0.336826, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]],
        (0.829079, (0.118787, 0.138787), (0.793613, 0.773613), 0.02, 0.02, 0.04),
    ),
    ("each", 0.02): (
        [
            [0.0, 0.0, 0.0, 0.966348, 0.0, 0.748676, 0.774747, 0.99242],
            [0.014298, 0.132724, 0.092531, 0.835935, 0.193043, 1.0, 0.847346, 1.0],
        ],
        (0.788675, (0.168387, 0.142751), (0.742777, 0.731607), 0.025636, 0.018403, 0.036807),
    ),
    ("majority", 0.05): (
        [[0.0, 0.953703], [0.042638, 1.0]],
        (0.807774, (0.183588, 0.133588), (0.807468, 0.757468), 0.05, 0.05, 0.1),
    ),
    ("count", 0.05): (
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.230769, 1.0, 1.0]],
        (0.816218, (0.1925, 0.182692), (0.846667, 0.796667), 0.05, 0.029904, 0.059808),
    ),
    ("vector", 0.05): (
        [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]],
        (0.83, (0.12, 0.095), (0.796667, 0.746667), 0.05, 0.0375, 0.075),
    ),
    ("each", 0.05): (
        [
            [0.0, 0.0, 0.0, 0.99477, 0.0, 0.823277, 0.827605, 0.999098],
            [0.011313, 0.121253, 0.118495, 0.913819, 0.114277, 1.0, 0.913135, 1.0],
        ],
        (0.798548, (0.176383, 0.139812), (0.774677, 0.747901), 0.036571, 0.031674, 0.063347),
    ),
    ("majority", 0.1): (
        [[0.0, 1.0], [0.0, 1.0]],
        (0.818333, (0.1925, 0.095), (0.846667, 0.746667), 0.1, 0.09875, 0.1975),
    ),
    ("count", 0.1): (
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]],
        (0.818333, (0.1925, 0.095), (0.846667, 0.746667), 0.1, 0.09875, 0.1975),
    ),
    ("vector", 0.1): (
        [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]],
        (0.83, (0.12, 0.095), (0.796667, 0.746667), 0.05, 0.0375, 0.075),
    ),
    ("each", 0.1): (
        [
            [0.0, 0.0, 0.0, 1.0, 0.0, 0.915701, 0.915701, 1.0],
            [0.000475, 0.152046, 0.154696, 1.0, 0.003125, 1.0, 1.0, 1.0],
        ],
        (0.811094, (0.184913, 0.137017), (0.812385, 0.769885), 0.047896, 0.045198, 0.090397),
    ),
}

# G4, vector, epsilon 0: the dual's optimum.
MULTIPLIER = [[0.078842, -0.148952], [-0.078842, 0.148952]]
DUAL_ERROR = 0.175477
REDUCED = [
    [0.107448, 0.035741, 0.033945, 0.013398, 0.012874, -0.018189, 0.0, -0.031774],
    [0.114264, 0.0, 0.006445, -0.051455, 0.000409, -0.056262, -0.045726, -0.121118],
]


def check_metrics(found, expected):
    """Compare what group_metrics returned with golden metrics."""
    accuracy, fpr_A, tpr_A, *gaps = expected
    np.testing.assert_allclose([found["accuracy"], found["error"]], [accuracy, 1 - accuracy], atol=ROUNDED)
    np.testing.assert_allclose(found["fpr_A"], fpr_A, atol=ROUNDED)
    np.testing.assert_allclose(found["tpr_A"], tpr_A, atol=ROUNDED)
    np.testing.assert_allclose([found[name] for name in ("eo_max", "eo_avg", "eo_sum")], gaps, atol=ROUNDED)


def rates(count_AYT, p_AT):
    """Return the false positive and true positive rate of every group, (A, 2), in float64."""
    return np.einsum("ayt,at->ay", count_AYT, p_AT) / count_AYT.sum(axis=-1)


def gap(count_AYT, p_AT):
    """Return max - min over groups of the two rates."""
    return np.ptp(rates(count_AYT, p_AT), axis=0)


def error(count_AYT, p_AT):
    """Return P(output != label)."""
    wrong = np.sum(count_AYT[:, 0] * p_AT) + np.sum(count_AYT[:, 1] * (1 - p_AT))
    return wrong / count_AYT.sum()


def rows(count_AYT, members):
    """Spell counts by the vector of votes out as (votes_NK, label_N, group_N)."""
    A, _, T = count_AYT.shape
    group, label, code = np.indices((A, 2, T)).reshape(3, -1)
    repeat = np.round(count_AYT).astype(int).reshape(-1)
    group_N, label_N, code_N = (np.repeat(value, repeat) for value in (group, label, code))
    return (code_N[:, None] >> np.arange(members)[::-1]) & 1, label_N, group_N


def joint(rng, members, groups):
    """Draw P(group, label, votes), joint_AYT by the vector of votes: votes that tell of the label, and depend."""
    T = 2**members
    bit_TK = (np.arange(T)[:, None] >> np.arange(members)[::-1]) & 1
    right_AYK = rng.uniform(0.45, 0.95, (groups, 2, members))
    one_AYK = np.where(np.arange(2)[None, :, None] == 1, right_AYK, 1 - right_AYK)
    independent_AYT = np.prod(np.where(bit_TK == 1, one_AYK[:, :, None], 1 - one_AYK[:, :, None]), axis=-1)
    any_AYT = rng.dirichlet(np.full(T, 0.5), (groups, 2))
    share_AY = rng.dirichlet(np.full(2 * groups, 3.0)).reshape(groups, 2)
    return share_AY[..., None] * (0.6 * independent_AYT + 0.4 * any_AYT)


def collapsed(joint_AYT, code_T, cells):
    """Add up the cells of the vector of votes that have one code of another statistic."""
    return np.stack([joint_AYT[..., code_T == cell].sum(axis=-1) for cell in range(cells)], axis=-1)


def finite_sample(rng, members, examples):
    """Draw (votes_NK, label_N, group_N) of a made-up ensemble whose members err together."""
    group_N = rng.random(examples) < 0.26
    label_N = rng.random(examples) < np.where(group_N, 0.84, 0.51)
    shared_N, own_NK = rng.normal(size=examples), rng.normal(size=(examples, members))
    score_NK = (0.75 * (2 * label_N - 1) + 0.45 * group_N + np.sqrt(0.6) * shared_N)[:, None] + np.sqrt(0.4) * own_NK
    return (score_NK > 0).astype(int), label_N.astype(int), group_N.astype(int)
