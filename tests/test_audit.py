"""What is found on a few batches: in cases made to have it, and nothing in noise alone."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization
from mtlbalance.diagnostics import evidence

pytestmark = pytest.mark.unoptimized

ones = partial(np.ones, dtype=np.float32)
PARAMS = {"w": np.linspace(-0.5, 0.5, 16, dtype=np.float32).reshape(8, 2)}


def losses_fn(params, batch):
    """Two tasks whose gradients are ``scale * rotation @ (signal + noise)``; one program for all the cases below."""
    noise, factors, shifts = batch
    values = jnp.sum(params["w"][None] * (shifts + noise), axis=(1, 2)) + 5
    return dict(zip(["left", "right"], factors * values, strict=True))


def batches(seed, n=10, *, noise=0.3, shared=True, factors=(1.0, 1.0), directions=(1.0, 1.0)):
    """``directions`` multiplies the tasks' signals, which are one and the same."""
    rng, signal = np.random.default_rng(seed), np.random.default_rng(100).normal(size=(8, 2))
    shifts = np.stack([d * signal for d in directions])
    for _ in range(n):
        draws = rng.normal(size=(2, 8, 2)) * noise
        draws = np.stack([d * draws[0] for d in directions]) if shared else draws
        yield tuple(np.float32(x) for x in (draws, factors, shifts))


def audit(*args, **kwargs):
    return mtl.audit(losses_fn, PARAMS, batches(*args, **kwargs))


def is_empty(found):
    return not (found.loss_ratios or found.norm_ratios or found.conflicts or found.identical)


def test_identical_tasks():
    found = audit(0)
    assert found.identical == ("left/right",) and not (found.loss_ratios or found.norm_ratios or found.conflicts)
    assert "left and right are one task" in str(found) and "scalarization.sum()" in found.advice[0]
    np.testing.assert_allclose(found.cosine["left/right"], (1, 0), atol=1e-6)


def test_one_task_a_thousand_times_larger():
    """Orthogonal to the other, whose gradient is then lost in the sum: it is turned by 45 degrees."""
    found = audit(1, shared=False, noise=1.0, factors=(1.0, 1000.0), directions=(0.0, 0.0))
    assert found.norm_ratios.keys() == found.loss_ratios.keys() == {"right/left"}
    assert 500 < found.norm_ratios["right/left"] < 2000 and not found.conflicts and not found.identical
    assert "the gradient of right is" in str(found)
    assert found.cosine_with["sum"]["left"].mean < 0.3 < 0.5 < found.cosine_with["fixed"]["left"].mean
    assert 30 < found.turned["fixed"] < 60
    assert found.advice[0].startswith("fixed weights, scalarization.constant({'left': 2.0, 'right': 0.00")
    scalarization.constant(found.weights).init({"left": 1.0, "right": 1.0})  # takes them as they are


def test_a_factor_that_turns_nothing_needs_no_weights():
    found = audit(2, factors=(1.0, 1000.0))
    assert round(found.norm_ratios["right/left"]) == 1000 and found.turned["fixed"] < 1
    assert "scalarization.sum()" in found.advice[0] and "by 0 degrees" in found.advice[0]


def test_two_opposed_tasks():
    found = audit(3, directions=(1.0, -1.0))
    assert not found.identical and not found.norm_ratios
    np.testing.assert_allclose(found.conflicts["left/right"], -1, atol=1e-5)
    assert "left/right -1 ± " in repr(found)
    assert "conflict: their cosine is -1.00" in str(found) and "a choice between left and right" in found.advice[0]
    assert np.isnan(found.turned["fixed"])  # their sum is zero


@pytest.mark.parametrize(
    ("rows", "worst", "then"),
    [
        ([[1.0, 0.0], [1.0, 0.2], [-1.0, 0.6]], "0/2", "a backward pass per task: with the former 2 would"),
        ([[1.0, 0.0], [-0.5, 0.9]], "0/1", "but with the former none does either"),
    ],
    ids=["the sum raises a loss", "the sum raises none"],
)
def test_a_conflict_that_is_no_opposition(rows, worst, then):
    """Without noise: of gradients as given, whose sum has a negative product with the third one, or with none."""
    found = mtl.audit(lambda params, rows: rows @ params + 10, ones(2), [np.float32(rows)] * 3)
    assert next(iter(found.conflicts)) == worst and not found.norm_ratios
    first, second = found.advice
    assert first == "the plain sum, scalarization.sum(): the gradients are equally long"
    assert second.startswith("then aggregation.upgrad()") and then in second
    assert all(x.mean >= -1e-6 for x in found.cosine_with["upgrad"].values())


@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize("n", [3, 10])
def test_nothing_is_found_in_noise_alone(n, signal):
    """At five seeds: each task has its own noise, around a gradient that both have, or around zero."""
    for seed in range(5):
        found = audit(10 + seed, n, noise=0.5, shared=False, directions=(signal, signal))
        assert is_empty(found), found
        assert f"beyond the noise of {n} batches no loss" in found.findings[0]
        assert found.advice == (
            "the plain sum, scalarization.sum(): there is nothing here that balancing would change",
        )


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_level_of_the_tests_on_many_draws(n):
    """Of 2000 audits of six tasks: sizes that vary as e**N(0, 1), and directions in three dimensions, both noise."""
    rng, level = np.random.default_rng(0), 0.01 / (3 * 15 + 12)
    sizes, rows = np.exp(rng.normal(size=(n, 2000, 6))), rng.normal(size=(n, 2000, 6, 3))
    differences = evidence.relative_differences(sizes.reshape(-1, 6)).reshape(n, 2000, 36)
    units = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    cosines = np.einsum("nsid,nsjd->nsij", units, units).reshape(n, 2000, 36)
    here = np.ones(cosines.shape, bool)
    found = evidence.is_beyond(differences, here, 1 / 3, level) | evidence.is_below(cosines, here, 0.05, level)
    assert found.any(axis=1).mean() < 0.01


def test_a_difference_below_a_factor_of_two_is_none():
    assert is_empty(audit(4, factors=(1.0, 1.8))) and not is_empty(audit(4, factors=(1.0, 2.3)))


def test_absent_tasks_and_losses_that_are_not_finite():
    def losses_fn(params, i):
        seen = jnp.where(i < 2, 1, 0)
        return {
            "always": jnp.sum(params),
            "never": mtl.Counted(0.0 * jnp.sum(params), 0 * i),
            "broken": jnp.where(i == 3, jnp.inf, 0.0) + jnp.sum(params**2),
            "dead": jnp.zeros(()),
            "twice": mtl.Counted(jnp.sum(params), seen),
            "a/b": jnp.sum(params),
        }

    found = mtl.audit(losses_fn, ones(3), np.arange(5))
    assert found.findings[:3] == (
        "the loss or gradient of broken is not finite on 1 of 5 batches; they do not count",
        "dead has no gradient on any batch",
        "never is absent from all batches",
    )
    assert set(found.identical) == {"a/b/always", "a/b/twice", "always/twice"} and "a/b and always are" in str(found)
    assert found.loss["broken"] == (3, 0) and found.weights["dead"] == 1
    assert json.loads(json.dumps(found._asdict()))["norm"]["dead"] == [0, 0]


def test_losses_without_names_and_one_task():
    with_aux = lambda params, x: (jnp.sum(params) * jnp.ones(2), x)
    found = mtl.audit(with_aux, ones(3), np.float32([0, 1, 2]), has_aux=True)
    assert list(found.loss) == ["0", "1"] and found.weights == [1, 1]
    found = mtl.audit(lambda params, x: {"only": x * jnp.sum(params)}, ones(3), np.float32([1, 2, 3]))
    assert is_empty(found) and "Cosines between" not in str(found) and "scalarization.sum()" in str(found)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"batches: expected at least 3, .*found 2"):
        audit(0, 2)
    changing = lambda params, x: dict.fromkeys("abc"[: len(x)], jnp.sum(params))
    with pytest.raises(ValueError, match=r"losses_fn: expected the tasks \['a', 'b'\] .*found \['a', 'b', 'c'\]"):
        mtl.audit(changing, ones(3), [ones(n) for n in (2, 3, 3)])
    with pytest.raises(TypeError, match="params"):
        jax.jit(lambda: mtl.audit(losses_fn, jnp.arange(3), batches(0)))()
