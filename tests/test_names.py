"""Names: what is given per task must have those of the losses, on every path and under every wrapper."""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, base, diagnostics, scalarization

pytestmark = pytest.mark.unoptimized

LOSSES = {"ce": np.float32(2.0), "aux_z": np.float32(3.0)}
NAMES, WRONG_NAMES = map(re.escape, ("['aux_z', 'ce']", "['ce', 'z_loss']"))
WRONG = {"ce": 0.5, "z_loss": 0.25}
RIGHT = {"ce": 0.5, "aux_z": 0.25}
JACOBIAN = np.float32([[1.0, 0.0], [1.0, 2.0]])

KEYWORDS = {
    "constant weights": (scalarization.constant, "weights"),
    "uw initial_log_var": (scalarization.uw, "initial_log_var"),
    "uw classification": (scalarization.uw, "classification"),
    "revised_uw initial_sigma": (scalarization.revised_uw, "initial_sigma"),
    "imtl_l initial_log_scale": (scalarization.imtl_l, "initial_log_scale"),
    "scale_invariant weights": (scalarization.scale_invariant, "weights"),
    "stch weights": (partial(scalarization.stch, 0.1), "weights"),
    "stch reference": (partial(scalarization.stch, 0.1), "reference"),
    "famo min_losses": (scalarization.famo, "min_losses"),
    "group_dro reference": (scalarization.group_dro, "reference"),
    "cosmos weights": (partial(scalarization.cosmos, 1.0), "weights"),
    "pbi weights": (partial(scalarization.pbi, 1.0), "weights"),
    "pbi reference": (partial(scalarization.pbi, 1.0, weights=RIGHT), "reference"),
    "minmax initial_logits": (scalarization.minmax, "initial_logits"),
    "self_adaptive initial_multipliers": (scalarization.self_adaptive, "initial_multipliers"),
    "residual_attention initial_multipliers": (scalarization.residual_attention, "initial_multipliers"),
    "vrba initial_multipliers": (scalarization.vrba, "initial_multipliers"),
    "lagrangian bounds": (scalarization.lagrangian, "bounds"),
    "aggregation constant weights": (aggregation.constant, "weights"),
    "upgrad pref_vector": (aggregation.upgrad, "pref_vector"),
    "dual_proj pref_vector": (aggregation.dual_proj, "pref_vector"),
    "config pref_vector": (aggregation.config, "pref_vector"),
    "aligned_mtl pref_vector": (aggregation.aligned_mtl, "pref_vector"),
    "epo preference": (aggregation.epo, "preference"),
    "sdmgrad pref_vector": (aggregation.sdmgrad, "pref_vector"),
    "graddrop leak": (aggregation.graddrop, "leak"),
    "gradient_shares shares": (aggregation.gradient_shares, "shares"),
    "gradnorm initial_losses": (aggregation.gradnorm, "initial_losses"),
    "pcd tau": (partial(aggregation.pcd, main="ce"), "tau"),
    "cr_mogm initial_weights": (partial(aggregation.cr_mogm, aggregation.mgda()), "initial_weights"),
}
each_keyword = pytest.mark.parametrize("keyword", KEYWORDS)
# That a method checks its keyword is seen from wrong names; what else is wrong is the same for all.
one_of_each_kind = pytest.mark.by_default(
    "stch reference", "upgrad pref_vector", "graddrop leak", "cr_mogm*", "uw init*"
)


def make(keyword, value):
    factory, argument = KEYWORDS[keyword]
    if argument == "classification":
        value = jax.tree.map(lambda x: x > 0.3, value)
    return factory(**{argument: value}), argument


def wrapped(method):
    """The method under every wrapper that takes it."""
    methods = {"bare": method}
    if method.learned:
        methods = {"learn": mtl.learn(method, optax.sgd(0.1))}
    (inner,) = methods.values()
    methods["skip"] = mtl.skip_nonfinite(inner)
    if isinstance(inner, mtl.Scalarizer):
        methods["amortize"] = mtl.amortize(inner)
        methods["chain"] = mtl.chain(inner, aggregation.mean())
    else:
        methods["chain"] = mtl.chain(scalarization.mean(), inner)
        if inner.weighting is not None:
            methods["amortize of skip"] = mtl.amortize(methods["skip"])
            methods["cr_mogm"] = aggregation.cr_mogm(inner)
    return methods


def calls(method):
    """Every way in which a method learns the names of its losses: functions of the losses, to be traced."""
    if isinstance(method, mtl.Scalarizer):
        state = method.init(2)
        yield "init", method.init
        yield "apply", lambda losses: method.apply(state, losses)
        if not method.learned:
            yield "observe", lambda losses: method.observe(state, losses)
            yield "effective_weights", lambda losses: diagnostics.effective_weights(method, state, losses)
    else:
        state = method.init((2, 2))
        statistics = {"weighting": JACOBIAN, "gramian_weighting": JACOBIAN @ JACOBIAN.T}
        yield "apply", lambda losses: method.apply(state, JACOBIAN, values=losses)
        transform = mtl.aggregate(method, 2, hooks=True)
        yield "aggregate", lambda losses: transform.update(JACOBIAN, state, None, values=losses)
        for name, statistic in statistics.items():
            if getattr(method, name) is not None:
                weigh = getattr(method, name).apply
                yield name, lambda losses, weigh=weigh, x=statistic: weigh(state, x, values=losses)
        if method.rowwise is not None:
            visit = method.rowwise.visit
            yield "rowwise", lambda losses: visit(state, np.int32(0), JACOBIAN[0], values=losses)
    if not method.learned:
        losses_fn = lambda params, losses: jax.tree.map(lambda x: x * jnp.sum(params**2), losses)
        yield (
            "value_and_grad",
            lambda losses: mtl.value_and_grad(losses_fn, method, hooks=True)(np.ones(2, np.float32), state, losses),
        )


@each_keyword
def test_wrong_names_are_refused_on_every_path(keyword):
    method, argument = make(keyword, WRONG)
    refused(method, LOSSES, rf"{argument}: expected the losses' names {NAMES}, found {WRONG_NAMES}")


# Two tasks have one share, which needs no name; and main="ce" comes before it.
each_but_tau = pytest.mark.parametrize("keyword", [keyword for keyword in KEYWORDS if keyword != "pcd tau"])


@one_of_each_kind
@each_but_tau
def test_numbers_without_names_are_refused_for_named_losses(keyword):
    method, argument = make(keyword, np.float32([0.5, 0.25]))
    by_name = re.escape("{'aux_z': ..., 'ce': ...}")
    refused(method, LOSSES, rf"{argument}: expected a number for each of the losses' names, {by_name}, found numbers")


@one_of_each_kind
@each_but_tau
def test_names_are_refused_where_the_losses_have_none(keyword):
    method, argument = make(keyword, RIGHT)
    message = f"(weights|{argument}): expected an array: the losses have no names, found"
    refused(method, np.float32([3.0, 2.0]), message, "init")


def refused(method, losses, message, *left_out):
    if method.observe.__qualname__.endswith("<lambda>"):  # it does nothing, for whatever losses
        left_out += ("observe",)
    for wrapper, outer in wrapped(method).items():
        for path, call in calls(outer):
            if path not in left_out:
                with pytest.raises(ValueError, match=message):
                    jax.eval_shape(call, losses)
                    pytest.fail(f"{wrapper}, {path}")


@each_keyword
@one_of_each_kind
def test_the_losses_names_are_taken(keyword):
    """And one number for all is, where it may be."""
    method, argument = make(keyword, RIGHT)
    for_each = argument in ("weights", "pref_vector", "preference", "initial_weights")
    for given in (RIGHT,) if for_each else (RIGHT, 0.5):
        method, _ = make(keyword, given)
        for _, outer in wrapped(method).items():
            for _, call in calls(outer):
                jax.eval_shape(call, LOSSES)


def test_every_keyword_with_a_number_per_task_is_here():
    here = {(factory_of(keyword), argument) for keyword, (_, argument) in KEYWORDS.items()}
    found = set()
    for path in Path(mtl.__file__).parent.glob("*/*.py"):
        for argument in re.findall(r'per_task\(\s*"(\w+)"', path.read_text()):
            found.add((path.stem, argument))
        if re.search(r"preference\(\s*pref_vector|partial\(preference, pref_vector", path.read_text()):
            found.add((path.stem, "pref_vector"))
    # The first takes groups too, see tests/test_weights.py; the second is no method's, see tests/autodiff.
    elsewhere = {("prioritize", "prior"), ("auto_lambda", "initial_weights")}
    assert found == (here | elsewhere) - {("lagrangian", "bounds")}  # that stands for `per_task_with_default`


def factory_of(keyword):
    factory = KEYWORDS[keyword][0]
    return getattr(factory, "func", factory).__name__


def test_a_program_compiled_for_some_names_is_not_used_for_others():
    method = mtl.amortize(scalarization.constant({"ce": 1.0, "z_loss": 1e-4}))
    scalar, state = method.apply(method.init(2), {"ce": 2.0, "z_loss": 3.0})
    assert scalar == pytest.approx(2.0003)
    with pytest.raises(ValueError, match="weights: expected the losses' names"):
        method.apply(state, {"ce": 2.0, "aux_z": 3.0})


def test_weights_go_by_name_and_not_by_position():
    losses = {"seg": 2.0, "depth": 3.0}
    for weights in {"seg": 10, "depth": 1}, {"depth": 1, "seg": 10}:
        method = scalarization.constant(weights)
        assert method.apply(method.init(losses), losses)[0] == 23
    with pytest.raises(ValueError, match=r"weights: expected a number for each .*{'depth': ..., 'seg': ...}"):
        scalarization.constant([10, 1]).init(losses)
    method = scalarization.constant([10, 1])
    assert method.apply(method.init(2), (2.0, 3.0))[0] == 23  # in their own order
    assert method.apply(method.init(2), {"both": np.float32([2.0, 3.0])})[0] == 23


class Pair(NamedTuple):
    seg: float
    depth: float


def test_names_of_other_containers():
    """Names in another order than a dict's are refused, not mixed up."""
    losses = Pair(np.float32(2.0), np.float32(3.0))
    method = scalarization.constant(Pair(10, 1))
    assert method.apply(method.init(losses), losses)[0] == 23
    with pytest.raises(ValueError, match=r"names \['seg', 'depth'\], in this order, found \['depth', 'seg'\]"):
        scalarization.constant({"seg": 10, "depth": 1}).init(losses)
    nested = {"pose": {"rot": np.float32(1.0), "shift": np.ones(2, np.float32)}, "depth": np.float32(4.0)}
    method = scalarization.constant({"pose": {"rot": 1, "shift": [2, 3]}, "depth": 5})
    assert method.apply(method.init(nested), nested)[0] == 1 + 2 + 3 + 20
    with pytest.raises(ValueError, match=r"names \['depth', 'pose.rot', 'pose.shift.0', 'pose.shift.1'\]"):
        scalarization.constant({"pose": {"rot": 1, "turn": [2, 3]}, "depth": 5}).init(nested)
    counted = {name: mtl.Counted(loss * 2, np.int32(2)) for name, loss in LOSSES.items()}
    with pytest.raises(ValueError, match=f"names {NAMES}"):
        scalarization.constant(WRONG).init(counted)


def test_lr_annealings_reference_goes_by_name():
    losses, rows = {"res": np.float32(1.0), "bc": np.float32(2.0)}, np.float32([[1.0, 1.0], [8.0, 0.0]])
    by_name = aggregation.lr_annealing(reference="res", alpha=0.5)
    state = by_name.apply(by_name.init((2, 2)), rows, values=losses)[1]
    chex.assert_trees_all_close(state.weights, np.float32([4.5, 1.0]))  # bc, res
    for method in wrapped(by_name).values():
        for _, call in calls(method):
            jax.eval_shape(call, losses)
    for_others = {"res": losses["res"], "ic": losses["bc"]}  # now the other row is the reference's
    chex.assert_trees_all_close(by_name.apply(state, rows, values=for_others)[1].weights[1], 1.0)
    names = re.escape("reference: expected one of the losses' names ['bc', 'res'], found")
    refused(aggregation.lr_annealing(), losses, f"{names} the index 0", "rowwise")  # a visit needs no reference
    refused(aggregation.lr_annealing("ic"), losses, f"{names} 'ic'", "rowwise")
    refused(by_name, np.ones(2, np.float32), "reference: expected an index, found 'res'", "rowwise")
    with pytest.raises(
        ValueError, match="reference: expected values= with the losses' names, or an index, found 'res'"
    ):
        by_name.apply(by_name.init((2, 2)), rows)


def test_pcds_main_task_and_shares_go_by_name():
    losses, rows = {"main": np.float32(1.0), "aux": np.float32(2.0)}, np.float32([[6.0, 1.0, 1.0], [-4.0, 1.0, 1.0]])
    named = aggregation.pcd({"aux": 0.3, "main": 0.9}, main="main")
    positional = aggregation.pcd(np.float32([0.3]), main=1)
    first = aggregation.pcd(0.3)
    expected = first.apply(first.init((2, 3)), rows[::-1])[0]
    chex.assert_trees_all_close(named.apply(named.init((2, 3)), rows, values=losses)[0], expected, rtol=1e-5)
    chex.assert_trees_all_close(positional.apply(positional.init((2, 3)), rows)[0], expected, rtol=1e-5)
    for mask in np.array([True, False]), np.array([False, True]):
        alone = named.apply(named.init((2, 3)), rows, values=losses, mask=mask)[0]
        chex.assert_trees_all_close(alone, np.sum(np.where(mask[:, None], rows, 0), axis=0), rtol=1e-5)
    refused(aggregation.pcd(), losses, r"main: expected one of the losses' names \['aux', 'main'\], found the index 0")
    with pytest.raises(ValueError, match="main: expected a name, or an int of at least 0 below the number of tasks 2"):
        aggregation.pcd(main=2).init((2, 3))


def test_names_need_someone_to_say_which_row_is_whose():
    method = aggregation.cr_mogm(aggregation.mgda(), initial_weights=RIGHT)
    with pytest.raises(ValueError, match=r"initial_weights: expected values= with the losses' names, or an array"):
        mtl.skip_nonfinite(method).apply(mtl.skip_nonfinite(method).init((2, 2)), JACOBIAN)
    state, mask = aggregation.mgda().init((2, 2)), {"ce": True, "aux_z": False}
    for values, due in (
        (None, "values= with the losses' names, or one array"),
        (np.ones(2, np.float32), "one array: the losses have"),
    ):
        with pytest.raises(ValueError, match=f"mask: expected {due}"):
            aggregation.mgda().apply(state, JACOBIAN, values=values, mask=mask)
    losses_fn = lambda params: jnp.sum(params) * np.float32([1.0, 2.0])
    with pytest.raises(ValueError, match="mask: expected one array: the losses have no names"):
        mtl.value_and_grad(losses_fn, aggregation.mgda())(np.ones(2, np.float32), state, mask=mask)


def test_counted_losses_are_no_tuples_to_calculate_with():
    """Which would make more losses of them, without an error."""
    loss = mtl.Counted(np.float32(6.0), np.float32(4.0))
    operations = [lambda: loss + loss, lambda: 2 * loss, lambda: loss * 0.5, lambda: jnp.float32(2.0) * loss]
    operations += [lambda: loss - loss, lambda: loss / 2, lambda: np.float32(2.0) * loss, lambda: sum([loss, loss])]
    for operation in operations:
        with pytest.raises(TypeError, match=r"Counted: expected arithmetic on its parts, as in mtl.Counted\(0.1"):
            operation()


def test_losses_of_its_own_that_a_wrapper_gives_a_method_have_their_own_names():
    """A user's wrapper, which takes other tasks together; with as many losses they are the outer ones."""

    class Inside(NamedTuple):
        seen: jax.Array
        inner: Any

    def first_and_rest(inner, names=("first", "rest")):
        def apply(state, values, mask):
            parts = values[0], jnp.sum(values[1:])
            scalar, new = inner.apply(state.inner, dict(zip(names, parts, strict=True)) if names else jnp.stack(parts))
            return scalar, state._replace(inner=new)

        init = lambda shape, dtype: Inside(jnp.zeros(shape, jnp.int32), inner.init(2))
        return base.scalarizer(init, apply)

    losses = {"a": np.float32(1.0), "b": np.float32(2.0), "c": np.float32(3.0)}
    by_name = first_and_rest(scalarization.constant({"first": 10.0, "rest": 1.0}))
    by_position = first_and_rest(scalarization.constant([10.0, 1.0]), names=None)
    for method in by_name, by_position, mtl.skip_nonfinite(by_name):
        for given in losses, np.float32([1.0, 2.0, 3.0]):
            assert method.apply(method.init(3), given)[0] == 15
    wrong = first_and_rest(scalarization.constant({"first": 10.0, "last": 1.0}))
    with pytest.raises(ValueError, match=r"weights: expected the losses' names \['first', 'rest'\]"):
        wrong.apply(wrong.init(3), losses)


def test_a_masks_names_are_the_losses():
    method = aggregation.upgrad(pref_vector=WRONG)
    with pytest.raises(ValueError, match=f"pref_vector: expected the losses' names {NAMES}"):
        method.apply(method.init((2, 2)), JACOBIAN, mask={"ce": True, "aux_z": True})
