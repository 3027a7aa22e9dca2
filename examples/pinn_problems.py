"""The two equations of ``pinn.py``: networks, residuals, points and solutions. No script: it imports them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance import scalarization


class Problem(NamedTuple):
    """An equation inside a rectangle, and a condition on its rim.

    Attributes:
      title: what to call it.
      condition: the name of the condition, which is a task; the other one is ``"equation"``.
      pointwise: ``(tol) -> scalarizer`` of the equation's squared residuals, in the order of the points.
      predict: ``(params, inputs) -> u`` at inputs of shape ``[n, 2]``.
      residuals: ``(params, points) -> {"equation": [n], condition: [m]}``.
      draw: ``(key, n, dtype) -> points``, new ones to train on.
      init_params: ``(key) -> params``.
      grid: inputs ``[rows, columns, 2]`` of which the solution is known; rows and columns are what ``axes`` names.
      solution: it, ``[rows, columns]``.
    """

    title: str
    condition: str
    pointwise: Callable
    predict: Callable
    residuals: Callable
    draw: Callable
    init_params: Callable
    grid: np.ndarray
    solution: np.ndarray
    axes: tuple[str, str]


# The network, and its derivatives.


def init_params(widths, key):
    draw, keys = jax.nn.initializers.glorot_normal(dtype=jnp.float32), jax.random.split(key, len(widths) - 1)
    return [
        (draw(key, shape), jnp.zeros(shape[1], jnp.float32))
        for key, shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def network(params, features):
    *hidden, (last, offset) = params
    for weight, bias in hidden:
        features = jnp.tanh(features @ weight + bias)
    return (features @ last + offset)[:, 0]


def derivatives(u, inputs, axis):
    """The value of ``u``, its first and its second derivative along one axis, at all inputs at once.

    In forward mode: each costs another pass through the network, and nothing is kept for a way back.
    """
    along = jnp.zeros_like(inputs).at[:, axis].set(1)
    value_and_first = lambda inputs: jax.jvp(u, (inputs,), (along,))
    (value, first), (_, second) = jax.jvp(value_and_first, (inputs,), (along,))
    return value, first, second


def lattice(key, n, dtype):
    """Points that fill the unit square evenly, sorted by the first coordinate: a lattice, shifted at random."""
    i = np.arange(n)
    golden_ratio = (1 + 5**0.5) / 2
    points = jnp.asarray(np.stack([i / n, i * golden_ratio % 1], axis=1), dtype)
    return (points + jax.random.uniform(key, (2,), dtype) * jnp.array([1 / n, 1], dtype)) % 1


# u_xx + u_yy + u = f on a square, u = 0 on its rim.


def helmholtz(a=4):
    """Of Wang et al., 2021: the solution is ``sin(pi x) sin(a pi y)``, and the rim is what a plain sum misses."""

    def solution(inputs, xp=jnp):
        return xp.sin(np.pi * inputs[..., 0]) * xp.sin(a * np.pi * inputs[..., 1])

    def residuals(params, points):
        u = lambda inputs: network(params, inputs)
        value, _, u_xx = derivatives(u, points["inside"], 0)
        _, _, u_yy = derivatives(u, points["inside"], 1)
        f = (1 - (1 + a**2) * np.pi**2) * solution(points["inside"])
        return {"equation": u_xx + u_yy + value - f, "boundary": u(points["rim"])}

    def draw(key, n, dtype):
        inside, rim = jax.random.split(key)
        along, side = 2 * lattice(rim, n // 2, dtype).T - 1
        # Each point of a square goes to the nearer one of a pair of sides, by turns of the two pairs.
        side, by_turns = jnp.sign(side), jnp.arange(n // 2) % 2 == 0
        rim = jnp.where(by_turns[:, None], jnp.stack([along, side], axis=1), jnp.stack([side, along], axis=1))
        return {"inside": 2 * lattice(inside, n, dtype) - 1, "rim": rim}

    line = np.linspace(-1, 1, 65)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    start = lambda key: init_params((2, 32, 32, 32, 1), key)
    mean = lambda tol: scalarization.mean()
    return Problem("Helmholtz", "boundary", mean, network, residuals, draw, start, grid, solution(grid, np), ("x", "y"))


# u_t = 0.0001 u_xx + 5 u - 5 u^3 for t from 0 to 1, periodic in x, with u = x^2 cos(pi x) at the start.

HARMONICS = 5


def allen_cahn(end):
    """Of Raissi et al., 2019: errors at the start grow by a hundred until t = 1, so that early times go first."""

    def at_start(x):
        return x**2 * jnp.cos(jnp.pi * x)

    def predict(params, inputs):
        """Even and periodic in x by its features, as the solution is: cosines, and a square, for the start's kink."""
        t, x = inputs[:, :1], inputs[:, 1:]
        waves = jnp.cos(jnp.pi * jnp.arange(1, HARMONICS + 1, dtype=x.dtype) * x)
        return network(params, jnp.concatenate([2 * t / end - 1, x**2, waves], axis=1))

    def residuals(params, points):
        u = lambda inputs: predict(params, inputs)
        value, u_t, _ = derivatives(u, points["inside"], 0)
        _, _, u_xx = derivatives(u, points["inside"], 1)
        start = points["start"]
        return {
            "equation": u_t - 1e-4 * u_xx - 5 * (value - value**3),
            "start": u(start) - at_start(start[:, 1]),
        }

    def draw(key, n, dtype):
        """Sorted by time, as causal weights want it; in half of space, and densest where all begins to grow from 0."""
        inside, start = jax.random.split(key)
        t, x = lattice(inside, n, dtype).T
        first = lattice(start, n // 8, dtype)[:, 0] ** 2
        inside = jnp.stack([end * t, x**2], axis=1)
        return {"inside": inside, "start": jnp.stack([jnp.zeros_like(first), first], axis=1)}

    t, x, expected = by_fourier(end, n_steps=1000, n_points=512)
    some = slice(None, None, 20), slice(None, None, 4)
    grid, expected = np.stack(np.meshgrid(t, x, indexing="ij"), axis=-1)[some], expected[some]
    start = lambda key: init_params((2 + HARMONICS, 32, 32, 32, 1), key)
    title = f"Allen-Cahn until t = {end:g}"
    return Problem(title, "start", scalarization.causal, predict, residuals, draw, start, grid, expected, ("t", "x"))


def by_fourier(end, n_steps, n_points):
    """Allen-Cahn's solution at all times and points: Runge-Kutta for the reaction, between exact steps of diffusion."""
    x = -1 + 2 * np.arange(n_points) / n_points
    frequency = np.pi * np.fft.rfftfreq(n_points, 1 / n_points)
    step = end / n_steps
    half = np.exp(-1e-4 * frequency**2 * step / 2)  # diffusion, for half a step

    def reaction(waves):
        u = np.fft.irfft(waves, n_points)
        return step * np.fft.rfft(5 * (u - u**3))

    waves = [np.fft.rfft(x**2 * np.cos(np.pi * x))]
    for _ in range(n_steps):
        now = waves[-1]
        k1 = reaction(now)
        k2 = reaction(half * (now + k1 / 2))
        k3 = reaction(half * now + k2 / 2)
        k4 = reaction(half * (half * now + k3))
        waves.append(half * (half * (now + k1 / 6) + (k2 + k3) / 3) + k4 / 6)
    return np.linspace(0, end, n_steps + 1), x, np.fft.irfft(np.array(waves), n_points)
