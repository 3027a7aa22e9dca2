"""The noise of examples/label_noise.py is as much as it says, in one task's training labels, and nowhere else."""

import jax
import noisy_digits as noisy
import numpy as np
import pytest
from digits import load_images

pytestmark = pytest.mark.usefixtures("users_broadcast")

SETTING = noisy.Setting(pairs=200, batch=20, steps=50, width=4)
LEVELS = 0.0, 0.4, 0.8


@pytest.fixture(scope="module")
def digits(users_broadcast):
    return load_images()[0]


def part_changed(found):
    """In what part of the examples anything differs from what there is without noise, by level."""
    return [np.mean(np.any((x != found[0]).reshape(len(x), -1), axis=1)) for x in found]


@pytest.mark.parametrize("level", LEVELS)
def test_the_noise_is_as_much_as_was_asked_for(level):
    rng, labels = np.random.default_rng(0), np.arange(10_000) % 10
    assert np.mean(noisy.is_hit(rng, 10_000, level)) == level
    assert np.mean(noisy.next_digit(rng, labels, level) == (labels + 1) % 10) == level
    assert np.mean(noisy.next_digit(rng, labels, level) != labels) == level
    counts = np.bincount(noisy.redraw(rng, np.zeros(10_000, int), level), minlength=10)
    error = 4 * np.sqrt(0.09 * level / 10_000)  # of a part of the labels that are drawn again
    np.testing.assert_allclose(counts / 10_000, [1 - 0.9 * level, *[level / 10] * 9], atol=error)
    np.testing.assert_allclose(np.std(noisy.add_normal(rng, labels, level) - np.eye(10)[labels]), level, rtol=0.01)


@pytest.mark.parametrize("noise", [noisy.redraw, noisy.next_digit, noisy.add_normal])
def test_nothing_but_one_task_s_targets_has_noise(noise, digits):
    drawn = noisy.draw(SETTING._replace(noise=noise), digits, LEVELS, seed=3)
    alone = [noisy.draw(SETTING._replace(noise=noise), digits, [level], seed=3) for level in LEVELS]
    for i, one in enumerate(alone):  # neither does anything else depend on its level
        expected = drawn._replace(targets=drawn.targets | {"noisy": drawn.targets["noisy"][i : i + 1]})
        jax.tree.map(np.testing.assert_array_equal, one, expected)
    wrong = part_changed(drawn.targets["noisy"])
    # One in ten of the labels that are drawn again stays what it was: of the 200, within four standard errors.
    parts = {noisy.redraw: 0.9 * np.array(LEVELS), noisy.next_digit: LEVELS, noisy.add_normal: np.sign(LEVELS)}
    np.testing.assert_allclose(wrong, parts[noise], atol=4 * np.sqrt(0.09 * 0.8 / 200) if noise is noisy.redraw else 0)
    pairs = jax.device_get(noisy.draw_pairs(jax.random.split(jax.random.key(3))[0], digits, 200))
    np.testing.assert_array_equal(drawn.images, pairs["image"])
    np.testing.assert_array_equal(drawn.targets["clean"].argmax(-1), pairs["left"])
    np.testing.assert_array_equal(drawn.targets["noisy"][0].argmax(-1), pairs["right"])


def test_labels_that_are_drawn_at_every_look_are_those_of_the_examples_that_have_noise(digits):
    drawn = noisy.draw(SETTING._replace(redrawn=True), digits, LEVELS, seed=3)
    targets_at = jax.jit(jax.vmap(lambda one, step: noisy.batch_at(one, step)[1], (None, 0)))
    assert part_changed(drawn.targets["noisy"]) == [0, 0, 0]
    for level, hits in zip(LEVELS, drawn.redrawn[0], strict=True):
        targets = drawn.targets | {"noisy": drawn.targets["noisy"][0]}
        one = drawn._replace(targets=targets, redrawn=(hits, drawn.redrawn[1]))
        targets = jax.device_get(targets_at(one, np.arange(50)))
        true = {name: np.asarray(x)[drawn.rows] for name, x in one.targets.items()}
        wrong, hit = np.any(targets["noisy"] != true["noisy"], axis=-1), hits[drawn.rows]
        assert np.mean(hits) == level
        assert not np.any(wrong & ~hit)
        assert level == 0 or abs(np.mean(wrong[hit]) - 0.9) < 4 * np.sqrt(0.09 / np.sum(hit))
        np.testing.assert_array_equal(targets["clean"], true["clean"])


def test_noise_in_the_pixels_is_in_those_of_one_digit_alone(digits):
    drawn = noisy.draw(SETTING._replace(noise=noisy.cover), digits, LEVELS, seed=3)
    difference = drawn.images - drawn.images[:1]
    assert not np.any(difference[:, :, :8, :8])
    np.testing.assert_allclose(np.std(difference[:, :, 8:, 8:], axis=(1, 2, 3)), LEVELS, rtol=0.1)
    assert part_changed(drawn.targets["noisy"]) == [0, 0, 0]
