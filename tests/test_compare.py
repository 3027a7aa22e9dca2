"""The comparison's statistics, its grids, and that no method is left out of its tables."""

import csv
import pathlib
import re
from types import SimpleNamespace

import compare
import compare_jobs
import compare_methods
import compare_tables
import jax
import numpy as np
import optax
import pytest
from scipy import stats

import mtlbalance as mtl

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "evidence.md"
INFINITE = (0.0, float("inf"))


def test_holm_by_hand():
    """4 x .005; 3 x .01; 2 x .03; and of .04 no less than of .03."""
    np.testing.assert_allclose(compare_tables.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(compare_tables.holm([0.6, 0.7]), [1, 1])


def test_paired_is_scipys():
    ours, theirs = np.random.default_rng(0).normal([[0.0], [0.4]], 1.0, (2, 16))
    found, expected = compare_tables.paired(ours - theirs), stats.ttest_rel(ours, theirs)
    np.testing.assert_allclose(found.p, expected.pvalue)
    np.testing.assert_allclose((found.low, found.high), expected.confidence_interval(0.95))


def test_of_equal_differences():
    assert compare_tables.paired(np.zeros(3)) == (0, 0, 0, 1)
    assert compare_tables.paired(np.full(3, 0.5)) == (0.5, 0.5, 0.5, 0)


def test_a_verdict_is_at_the_corrected_level_and_of_what_a_table_shows():
    """With p below 0.05 for itself a method among four is not better; nor is one that surely differs by rounding."""
    seeds = np.random.default_rng(0).normal(size=16)
    noise = np.tile([1.0, -1.0], 8)
    scores = {"base": seeds, "a": seeds - 0.6 + noise, "b": seeds + noise, "c": seeds + 5 + noise, "d": seeds + 1e-3}
    found = compare_tables.distances(scores, "base", smallest=0.05)
    assert 0.03 < found["a"].paired.p < 0.04
    assert found["a"].p == pytest.approx(2 * found["a"].paired.p)
    assert found["d"].p < 1e-9
    assert [name for name, distance in found.items() if distance.verdict] == ["c"]
    assert found["c"].verdict == "worse"


def test_delta_m_by_hand():
    """Accuracy .8 for 1: 20% worse; .5 for .4: 25% better; an error of 3 for 2: 50% worse."""
    found = compare_jobs.delta_m(np.array([[0.8, 0.5, 3.0]]), np.array([1.0, 0.4, 2.0]), (1, 1, -1))
    np.testing.assert_allclose(found, [(20 - 25 + 50) / 3])


@pytest.mark.parametrize(
    ("best", "limits", "expected"),
    [
        (0.1, INFINITE, [0.01, 0.1, 1.0, 10.0]),
        (10.0, INFINITE, [0.1, 1.0, 10.0, 100.0]),
        (1.0, INFINITE, [0.1, 1.0, 10.0]),
        (10.0, (0.0, 20.0), [0.1, 1.0, 10.0, 20.0]),
        (10.0, (0.0, 10.0), [0.1, 1.0, 10.0]),
    ],
)
def test_a_best_at_the_edge_widens_the_grid_up_to_the_limit(best, limits, expected):
    np.testing.assert_allclose(compare.wider([0.1, 1.0, 10.0], best, limits), expected)


def tune_to(best, widenings):
    """Of a trainer whose scores are least at a learning rate of 0.03 and a value of ``best``; and the seeds it saw."""
    seeds = set()

    def measured(name, rate, value, seed):
        seeds.add(seed)
        return np.array([[abs(np.log10(rate / 0.03)) + abs(np.log10(value / best))], [np.nan]])

    entry = compare_methods.Entry("any", None, "knob", (0.1, 1.0, 10.0))
    trainer = SimpleNamespace(job=SimpleNamespace(ignorant=(9.0,)), measured=measured)
    progress = SimpleNamespace(update=lambda n: None, total=0)
    return compare.tune(trainer, entry, compare.Plan(widenings=widenings), lambda x: x[..., 0], progress), seeds


@pytest.mark.parametrize(
    ("best", "value", "n_values", "edges"),
    [(1.0, 1.0, 3, []), (1e2, 1e2, 5, []), (1e3, 1e3, 5, ["knob"]), (1e9, 1e3, 5, ["knob"])],
)
def test_tuning_follows_the_best_for_two_widenings_and_says_where_it_stopped(best, value, n_values, edges):
    found, seeds = tune_to(best, widenings=2)
    assert found == (0.03, pytest.approx(value), 3 * n_values, edges)
    assert max(seeds) < 1000  # from there on seeds are the test's


def test_a_setting_that_diverged_is_never_the_best_while_another_is_not():
    def measured(name, rate, value, seed):
        return np.array([[np.nan if rate == 0.03 and seed == 2 else 6.8], [np.nan]])

    entry = compare_methods.Entry("any", None)
    trainer = SimpleNamespace(job=SimpleNamespace(ignorant=(1.0,)), measured=measured)
    progress = SimpleNamespace(update=lambda n: None, total=0)
    rate, *_ = compare.tune(trainer, entry, compare.Plan(widenings=0), lambda x: x[..., 0], progress)
    assert rate != 0.03


@pytest.mark.parametrize("kind", compare_jobs.STEPS)
def test_all_methods_train_on_the_same_batches(kind):
    job, drawn = compare_jobs.solve_helmholtz(), []
    watched = job._replace(draw=lambda key: (drawn.append(key), job.draw(key))[1])
    entry = next(entry for entry in compare_methods.entries_for(job).values() if entry.kind == kind)
    optimizer, method_key = optax.sgd(0.1), jax.random.key(0)
    init, decide = compare_jobs.STEPS[kind](watched, [entry], 0, entry.values[0], method_key, optimizer)

    def step(key):
        params = job.init_params(key)
        state = init(params, job.draw(key))
        drawn.clear()
        gradient, _ = decide(params, state, optimizer.init(params), key)
        return gradient, sum(found is key for found in drawn)

    with jax.numpy_rank_promotion("allow"):
        assert jax.make_jaxpr(step)(method_key).jaxpr.outvars[-1].val == 1


def test_a_diverged_training_counts_as_one_that_has_learnt_nothing():
    job = SimpleNamespace(ignorant=(0.1, 0.1, 4.0))
    metrics = np.array([[0.9, 0.8, 2.0], [0.9, 0.8, np.nan]])
    np.testing.assert_array_equal(compare.known(metrics, job), [[0.9, 0.8, 2.0], [0.1, 0.1, 4.0]])


def test_every_public_method_has_a_row():
    job = compare_jobs.solve_helmholtz()
    assert {info.full_name for info in mtl.methods()} <= compare_methods.entries_for(job).keys()
    assert len(job.sweep) >= 5


@pytest.mark.parametrize("name", compare_jobs.JOBS)
def test_every_public_method_is_in_the_page(name):
    section = PAGE.read_text().split(f"<!-- {name}: made by compare.py -->")[1].split(f"<!-- {name}: end -->")[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    names = {re.sub(r"^\d+ |: needs \d tasks$| \(\d+ diverged\)$", "", cell) for cell in cells}
    assert {compare_tables.called(info.full_name) for info in mtl.methods()} <= names


def found_on(job, names, unable=()):
    """As of trainings with 4 seeds, the later names the worse."""
    entries = [compare_methods.Entry(name, None, "knob") for name in names]
    entries += [compare_methods.Entry(name, None, fewest_tasks=3) for name in unable]
    noise = np.random.default_rng(0).uniform(0.01, 0.02, (len(names), 4, 1))
    row = {"rate": 0.01, "value": 0.3, "tried": 9, "edges": ["knob"], "diverged": 0}
    row |= {"microseconds": 1.0, "times_plain": 2.0}
    kept = {name: row | {"metrics": (noise[i] * 10**i).tolist()} for i, name in enumerate(names)}
    return compare_tables.find(job, entries, kept | {"single": [[], []]})


def test_tables_have_all_rows_the_best_first(tmp_path):
    names = [compare_tables.FIXED, compare_tables.EQUAL, "aggregation.mgda"]
    found = found_on(compare_jobs.solve_helmholtz(), names, unable=["aggregation.krum"])
    page, table = tmp_path / "page.md", tmp_path / "table.csv"
    page.write_text("before\n<!-- pinn: made by compare.py -->\nold\n<!-- pinn: end -->\nafter\n")
    compare_tables.write_markdown(page, {"pinn": found})
    compare_tables.write_csv(table, found)

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    places = [text.index(f"| {name}") for name in (" 1 fixed weights", " 2 equal weights", " 3 ∇ mgda", "   ∇ krum")]
    assert places == sorted(places)
    assert "* worse than tuned fixed weights: equal weights (sum), ∇ mgda\n" in text
    with table.open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [*names, "aggregation.krum"]


def test_rows_are_kept_for_their_settings_only(tmp_path):
    compare.Kept(tmp_path, "job", {"seeds": 3}).add("uw", {"rate": 0.1})
    assert compare.Kept(tmp_path, "job", {"seeds": 3}).rows == {"uw": {"rate": 0.1}}
    assert compare.Kept(tmp_path, "job", {"seeds": 4}).rows == {}


# What "How to choose" says, of the two jobs' lists of what is better or worse than tuned fixed weights, or equal ones.
SAID = {
    "better than tuned fixed weights on both": lambda d, p: d.better_than_fixed & p.better_than_fixed,
    "better than they on one": lambda d, p: (
        (d.better_than_fixed - p.worse_than_fixed) ^ (p.better_than_fixed - d.worse_than_fixed)
    ),
    "no worse than they": lambda d, p: (
        (d.better_than_equal & p.better_than_equal)
        - (d.worse_than_fixed | p.worse_than_fixed | d.better_than_fixed | p.better_than_fixed)
    ),
    "better than equal weights on both": lambda d, p: (
        d.better_than_equal & p.better_than_equal & (d.worse_than_fixed | p.worse_than_fixed)
    ),
    "better than equal weights on the digits alone": lambda d, p: d.better_than_equal - p.better_than_equal,
    "better than equal weights on Helmholtz alone": lambda d, p: p.better_than_equal - d.better_than_equal,
    "worse than equal weights on Helmholtz": lambda d, p: p.worse_than_equal,
}


def borne(job):
    """The lists of the page, of methods without their families; chains and baselines have no names of that kind."""
    section = PAGE.read_text().split(f"<!-- {job}: made by compare.py -->")[1]
    found = {}
    for verdict, baseline, names in re.findall(
        r"^\* (better|worse) than (tuned fixed|equal) weights: (.*)$", section, re.M
    )[:4]:
        baseline = baseline.split()[-1]
        found[f"{verdict}_than_{baseline}"] = {
            name for name in re.sub("∇ ", "", names).split(", ") if name.isidentifier()
        }
    return SimpleNamespace(**found)


@pytest.mark.parametrize("said", SAID)
def test_what_is_said_of_the_comparison_is_what_it_bears(said):
    text = (PAGE.parent / "start" / "choose.md").read_text()
    (bullet,) = re.findall(rf"^\* {said}\b.*?(?=^\* |^$)", text, re.M | re.S)
    names = set(re.findall(r"`(\w+)`", bullet))
    assert names == SAID[said](borne("digits"), borne("pinn")) - {"mean", "sum", "constant", "random"}
