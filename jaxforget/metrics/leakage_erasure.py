"""LEACE: the smallest affine change of a representation after which no linear attacker sees an attribute.

    r(x) = x - W^+ P W (x - mean),   W = Cov(x)^(-1/2),  P the projection onto the columns of W Cov(x, z)

z is the attribute, one column a class. Source: arXiv 2306.03819, theorem 4.3. Shapes: N examples, D width, C classes, R
rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Eraser(NamedTuple):
    """A fitted erasure. Several attributes are erased at once by joining their columns of z."""

    mean_D: np.ndarray
    write_DR: np.ndarray
    read_RD: np.ndarray

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return (x_ND - (x_ND - self.mean_D) @ self.read_RD.T @ self.write_DR.T).astype(np.float32)


def fit_eraser(x_ND: np.ndarray, attributes_NJ: np.ndarray, tolerance: float = 1e-4) -> Eraser:
    """Fit on embeddings and their attributes, int (N,) or (N, J), -1 where unknown; such rows count in Cov(x) alone.

    tolerance: directions whose standard deviation is below this share of the largest are left as they are.
    """
    x_ND, attributes_NJ = np.asarray(x_ND, np.float64), np.asarray(attributes_NJ).reshape(len(x_ND), -1)
    mean_D = x_ND.mean(axis=0)
    variance_D, basis_DD = np.linalg.eigh(np.cov(x_ND, rowvar=False, bias=True).reshape(len(mean_D), -1))
    kept_D = variance_D > tolerance**2 * variance_D.max()
    root_D = np.sqrt(np.where(kept_D, variance_D, 1.0)) * kept_D
    inverse_D = np.where(kept_D, 1.0 / np.where(kept_D, root_D, 1.0), 0.0)
    whiten_DD, colour_DD = (basis_DD * inverse_D) @ basis_DD.T, (basis_DD * root_D) @ basis_DD.T
    columns = []
    for attribute_N in attributes_NJ.T:
        known_N = attribute_N >= 0
        z_NC = (attribute_N[known_N, None] == np.unique(attribute_N[known_N])[None]).astype(np.float64)
        own_ND = x_ND[known_N] - x_ND[known_N].mean(axis=0)
        columns.append(own_ND.T @ (z_NC - z_NC.mean(axis=0)) / known_N.sum())
    left_DC, size_C, _ = np.linalg.svd(whiten_DD @ np.concatenate(columns, axis=1), full_matrices=False)
    left_DR = left_DC[:, size_C > 1e-8 * max(size_C.max(), 1e-30)]
    return Eraser(mean_D, colour_DD @ left_DR, left_DR.T @ whiten_DD)
