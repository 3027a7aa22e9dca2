"""The equations that define the Gramian methods: how far weights are from solving them, judged in float64.

A residual is relative to what the equation adds up, so that rounding the Gramian to float32 moves it by a few 1e-7
whatever the condition of the matrix: that is why one tolerance serves for all.
"""

import functools

import numpy as np
from scipy.optimize import nnls

TOLERANCE = 1e-6
EPS = np.finfo(np.float32).eps


def unstable(result):
    """Whether TorchJD's result moves by more than 1e-4 with the precision or the noise, or does not solve its equation.

    The latter is recorded of FairGrad alone, which iterates.
    """
    return disagreement(result) > 1e-4 or result.get("residual", 0) > TOLERANCE


def disagreement(result):
    """Of TorchJD with itself, over the Jacobian's norm: in float32, and under noise of the size of its rounding."""
    return max(result["difference_in_float32"], result["difference_under_noise"])


def upgrad(rows, weights):
    """The sum of the problems' solutions, which it is compared with; relative to the condition of the problems."""
    root = np.linalg.cholesky(regularized(rows)).T
    lowest = np.eye(len(rows)) / len(rows)
    solution = sum(lower + nnls(root, -root @ lower)[0] for lower in lowest)
    return (
        np.linalg.norm(root @ (weights - solution)) / np.linalg.norm(weights) / np.linalg.norm(np.linalg.inv(root), 2)
    )


def dual_proj(rows, weights):
    """Each weight at its bound or its derivative zero, neither negative."""
    gramian = regularized(rows)
    sizes = np.sqrt(np.diag(gramian))
    above, derivatives = sizes * (weights - 1 / len(rows)), gramian @ weights / sizes
    return np.max(np.abs(np.minimum(above, derivatives))) / np.sum(sizes * weights)


def regularized(rows):
    gramian = rows @ rows.T
    return gramian / (np.trace(gramian) or 1) + 1e-4 * np.eye(len(rows))


def aligned_mtl(scale_mode, rows, weights):
    """The formula, without the eigenvalues that are rounding in float32, along each eigenvector.

    Relative to what it moves by, to first order, when the Gramian does by its largest eigenvalue: the eigenvectors
    turn into each other, and the scale changes.
    """
    eigenvalues, vectors, kept = decomposition(rows @ rows.T)
    if not kept.any():
        return np.max(np.abs(weights - 1 / len(rows)))
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    middle = eigenvalues[(len(eigenvalues) - 1) // 2]
    scale = {"min": eigenvalues[0], "median": middle, "rmse": np.mean(eigenvalues)}[scale_mode]
    roots, preference = np.sqrt(eigenvalues), np.mean(vectors, axis=0)
    turned = np.abs(preference) / (roots * (roots + roots[:, None]))
    condition = eigenvalues[-1] * (np.sum(turned, axis=1) + np.abs(preference) / scale)
    return np.max(np.abs(roots * (weights @ vectors) / np.sqrt(scale) - preference) / condition)


def imtl_g(rows, weights):
    """Equal projections on the gradients' directions; where they depend on each other the shortest least squares."""
    gramian, (norms, cosines) = rows @ rows.T, norms_and_cosines(rows)
    if not weights.any():
        return 0.0 if only_zero_has_equal_projections(rows) else normal_equation(gramian, weights, norms)
    total = abs(np.sum(weights) - 1) / np.sum(np.abs(weights))
    if decomposition(cosines)[2].all():
        return max(total, unequal_projections(cosines, norms * weights))
    eigenvalues, vectors, kept = decomposition(gramian)
    condition = eigenvalues[-1] / np.min(eigenvalues[kept])  # by which rounding turns the range
    superfluous = np.linalg.norm(vectors[:, ~kept].T @ weights) / np.linalg.norm(weights) / condition
    return max(total, superfluous, normal_equation(gramian, weights, norms))


def only_zero_has_equal_projections(rows):
    """Whether one gradient depends on the others, and so that equal projections on all directions must be zero."""
    norms, cosines = norms_and_cosines(rows)
    _, vectors, kept = decomposition(cosines + np.diag(norms == 0))
    return np.sum(~kept) == 1 and abs(np.sum(vectors[norms > 0, 0])) > 1e-3


def config(rows, weights):
    """Equal cosines, or the least squares; and as long as the projections of the gradients together."""
    norms, cosines = norms_and_cosines(rows)
    parts = norms * weights
    projections = cosines @ parts
    longer = abs((parts - norms) @ projections)  # of squares: the length times the gradient's own
    longer /= (np.linalg.norm(parts) + np.linalg.norm(norms)) * np.linalg.norm(cosines, 2) * np.linalg.norm(parts) or 1
    if decomposition(cosines)[2].all():
        return max(longer, unequal_projections(cosines, parts))
    return max(longer, normal_equation(cosines, parts, (norms > 0).astype(float)))


def unequal_projections(cosines, parts):
    """Spread of the projections of the sum of parts, over the parts; 1 for no parts."""
    return np.ptp(cosines @ parts) / np.sum(np.abs(parts)) if parts.any() else 1


def normal_equation(matrix, solution, vector):
    """Residual of ``matrix @ (matrix @ x - vector)`` for the best multiple x of the solution."""
    product = matrix @ solution
    factor = product @ vector / (product @ product or 1)
    size = np.linalg.norm(matrix, 2)
    residual = np.linalg.norm(matrix @ (factor * product - vector))
    return residual / size / (size * np.linalg.norm(factor * solution) + np.linalg.norm(vector))


def fairgrad(rows, weights):
    """A weight times its gain is 1, relative to the terms of the gain; gradients that are zero have no equation."""
    gramian = rows @ rows.T
    moves = np.diag(gramian) > 0
    weights, gramian = weights[moves], gramian[moves][:, moves]
    return np.max(np.abs(weights * (gramian @ weights) - 1) / (weights * (np.abs(gramian) @ weights)), initial=0)


def krum(rows, weights):
    """No score of a selected gradient above that of another, with one Byzantine and two selected."""
    distances = np.sort(np.linalg.norm(rows - rows[:, None], axis=2), axis=1)
    scores = np.sum(distances[:, 1 : len(rows) - 2], axis=1)
    selected = weights > 0
    assert np.sum(selected) == 2
    excess = np.max(scores[selected]) - np.min(scores[~selected])
    return max(excess / np.max(scores), np.max(np.abs(weights - selected / 2)))


def pcd(rows, weights, tau=0.02, eps=1e-8):
    """Of a first call: each other task at its share or without weight, and as long as the first gradient.

    Constraints that contradict each other, because a mean of the other tasks' directions vanishes, may be dropped.
    """
    norms, cosines = norms_and_cosines(rows)
    parts = norms * weights
    if norms[0] == 0:
        return np.max(np.abs(parts))
    scaled = norms / np.sqrt(norms**2 + eps)
    step = parts / parts[0] * scaled[0]
    slack = cosines @ step - tau * scaled
    residual = np.max(np.abs(np.minimum(step, slack))[1:], where=norms[1:] > 0, initial=0) / np.sum(np.abs(step))
    directions = np.divide(rows, norms[:, None], where=norms[:, None] > 0, out=np.zeros_like(rows))[1:]
    if residual > 0 and not weights[1:].any():
        _, shortest = nnls(np.vstack([directions.T, np.ones(len(directions))]), np.append(0 * rows[0], 1))
        residual *= shortest > (10 * EPS) ** 0.5
    return max(residual, abs(parts @ cosines @ parts - norms[0] ** 2) / np.sum(np.abs(parts)) ** 2)


def pcgrad(rows, weights, eps=0.0):
    """Of one task or two: each gradient without what points against the other; GradVac adds eps to denominators."""
    norms, cosines = norms_and_cosines(rows)
    norms = norms / (np.max(norms) or 1)
    others = norms[::-1]
    against = others**2 * norms * np.minimum(cosines, 0).sum(0)
    expected = 1 - against / np.maximum((norms * others + eps) * (norms + eps), np.finfo(float).tiny)
    return np.max(np.abs(weights - expected) / expected)


def norms_and_cosines(rows):
    norms = np.linalg.norm(rows, axis=1)
    divisors = np.where(norms > 0, norms, 1)
    return norms, rows @ rows.T / divisors / divisors[:, None]


def decomposition(matrix):
    """Eigenvalues, ascending, eigenvectors, and which eigenvalues are more than rounding in float32."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return eigenvalues, vectors, eigenvalues > len(matrix) * EPS * eigenvalues[-1]


RESIDUALS = {
    "upgrad": upgrad,
    "dual_proj": dual_proj,
    "aligned_mtl": functools.partial(aligned_mtl, "min"),
    "aligned_mtl_median": functools.partial(aligned_mtl, "median"),
    "aligned_mtl_rmse": functools.partial(aligned_mtl, "rmse"),
    "imtl_g": imtl_g,
    "config": config,
    "fairgrad": fairgrad,
    "krum": krum,
    "pcd": pcd,
    "pcgrad": pcgrad,
    "gradvac": functools.partial(pcgrad, eps=1e-8),  # the first call
}
