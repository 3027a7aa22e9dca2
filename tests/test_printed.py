"""What a method says of itself: printed, by ``help``, and by the papers from which it is."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, base, references, scalarization, states
from tests.catalogue import AGGREGATORS, SCALARIZERS

pytestmark = pytest.mark.unoptimized

PRINTED = {
    "scalarization.uw()": lambda: scalarization.uw(),
    "scalarization.uw(initial_log_var=0.5)": lambda: scalarization.uw(0.5, max_weight=1e12),
    "scalarization.mean()": scalarization.mean,
    "aggregation.mean()": aggregation.mean,
    "aggregation.upgrad(reg_eps=0.0, axis_name='model')": lambda: aggregation.upgrad(None, 0.0, axis_name="model"),
    "scalarization.constant({'cls': 1.0, 'box': [2, 3]})": lambda: scalarization.constant({"cls": 1.0, "box": [2, 3]}),
    "scalarization.constant(list[5000])": lambda: scalarization.constant([0.5] * 5000),
    "scalarization.constant([0.5, 2. ])": lambda: scalarization.constant(jnp.array([0.5, 2.0])),
    "scalarization.constant(float32[2,50])": lambda: scalarization.constant(np.ones((2, 50), np.float32)),
    "scalarization.cosmos(0.1, [1.0, 2.0])": lambda: scalarization.cosmos(0.1, weights=[1.0, 2.0]),
    "scalarization.random(7)": lambda: scalarization.random(key=7),
    "scalarization.random(key<fry>[])": lambda: scalarization.random(key=jax.random.key(7)),
    "skip_nonfinite(aggregation.excess_mtl(robust_step_size=0.01))": lambda: mtl.skip_nonfinite(
        aggregation.excess_mtl(robust_step_size=0.01)
    ),
    "learn(scalarization.uw(), GradientTransformationExtraArgs(...))": lambda: mtl.learn(
        scalarization.uw(), optax.adam(0.1)
    ),
    "nested(scalarization.dwa(steps_per_epoch=3), {'a': scalarization.sum()})": lambda: mtl.nested(
        scalarization.dwa(steps_per_epoch=3), {"a": scalarization.sum()}
    ),
    "switched((scalarization.mean(), scalarization.sum()), 1)": lambda: mtl.switch(
        [scalarization.mean(), scalarization.sum()]
    )(1),
    "freeze(scalarization.geometric_mean(), SeenState(...), losses=[1., 4.])": lambda: mtl.freeze(
        scalarization.geometric_mean(), scalarization.geometric_mean().init(2), jnp.array([1.0, 4.0])
    ),
}


@pytest.mark.parametrize("expected", PRINTED)
def test_a_method_is_printed_as_the_call_that_made_it(expected):
    assert repr(PRINTED[expected]()) == expected


def test_every_method_says_its_name_and_nothing_of_its_functions():
    for case in SCALARIZERS + AGGREGATORS:
        text = repr(case.make())
        assert re.match(r"(\w+\.)?\w+\(", text) and len(text) < 300, text
        assert "<function" not in text and "0x" not in text, text


def test_traced_hyperparameters():
    printed = []

    def build(x):
        printed.append(repr(mtl.skip_nonfinite(scalarization.uw_so(x))))
        return x

    jax.vmap(build)(jnp.ones(3))
    assert printed == ["skip_nonfinite(scalarization.uw_so(temperature=Traced<float32[]>))"]


def test_what_cannot_be_read_is_not():
    weights = jnp.ones(2)
    method = scalarization.constant(weights)
    weights.delete()
    assert repr(method) == "scalarization.constant(float32[2])"


def test_what_a_factory_returns_of_another_keeps_its_name_there():
    @base.memoized
    def mine(scale=1.0, *others, **named):
        return scalarization.uw_so(scale)

    assert repr(mine(2.0, 3, other=None)) == "mine(scale=2.0, 3, other=None)"
    assert repr(scalarization.uw_so(2.0)) == "scalarization.uw_so(temperature=2.0)"
    state = mine(2.0).init(2)
    assert mine(2.0).apply(state, jnp.ones(2))[0] == scalarization.uw_so(2.0).apply(state, jnp.ones(2))[0]


def test_a_method_of_ones_own():
    def largest():
        def apply(state, values, mask):
            return jnp.max(values, where=mask, initial=-jnp.inf), states.count_seen(state, mask)

        return base.scalarizer(states.init_seen, apply)

    method = largest()
    assert repr(method) == "largest(...)"
    assert repr(mtl.skip_nonfinite(method)) == "skip_nonfinite(largest(...))"
    assert repr(mtl.Scalarizer(*method)._replace(init=lambda shape: None)) == "Scalarizer(...)"
    assert mtl.cite(method) == ""


HELP = {
    "init": ("(shape)", "(shape)"),
    "apply": ("(state, values, *, mask=None)", "(state, jacobian, *, values=None, mask=None)"),
    "end_epoch": ("(state)", "(state)"),
    "observe": ("(state, values, *, mask=None)", "(state, values, *, mask=None)"),
}


@pytest.mark.parametrize("name", HELP)
def test_help_has_a_text_and_the_signature(name):
    """Of each kind: with hooks and without, and in a wrapper, on the arguments that it has."""
    pairs = (scalarization.uw, aggregation.upgrad), (scalarization.dwa, aggregation.excess_mtl)
    for family, factories in enumerate(zip(*pairs, strict=True)):
        for method in [factory() for factory in factories] + [mtl.skip_nonfinite(factories[1]())]:
            function = getattr(method, name)
            assert function.__name__ == name and str(inspect.signature(function)) == HELP[name][family]
            doc = inspect.getdoc(function)
            assert "Returns:" in doc
            for argument in inspect.signature(function).parameters:
                assert f"\n  {argument}: " in doc, (function, argument)


def test_help_of_weightings():
    for weighting in aggregation.upgrad().weighting, aggregation.upgrad().gramian_weighting:
        assert "One weight per task" in weighting.apply.__doc__ and "pair" in weighting.init.__doc__
        assert str(inspect.signature(weighting.apply)) == "(state, statistic, *, values=None, mask=None)"


def test_signatures_can_be_read():
    """A union of arrays is printed in full, in two lines: what is public has a name in its place."""
    modules = mtl, scalarization, aggregation, mtl.diagnostics
    functions = [getattr(module, name) for module in modules for name in module.__all__]
    for function in filter(inspect.isfunction, functions):
        signature = str(inspect.signature(function))
        assert "numpy" not in signature and "ForwardRef" not in signature, (function.__name__, signature)


def links_in(docstring):
    return set(re.findall(r"<(https?://[^>]+)>", docstring.partition("References:")[2]))


WITHOUT_PAPER = "scalarization.constant", "scalarization.mean", "scalarization.sum", "scalarization.first_loss"
WITHOUT_PAPER += "aggregation.constant", "aggregation.mean", "aggregation.sum"


@pytest.mark.parametrize("info", mtl.methods(), ids=lambda info: info.full_name)
def test_a_method_cites_the_papers_of_its_docstring(info):
    entries = references.entries_of(info.name)
    urls = [re.search(r"\n  url = \{(.*)\}\n\}$", entry)[1] for entry in entries]
    assert len(set(urls)) == len(urls) and set(urls) == links_in(inspect.getdoc(info.factory))
    assert bool(entries) == (info.full_name not in WITHOUT_PAPER)


def test_references_are_whole():
    text = references.resources.files("mtlbalance").joinpath("references.bib").read_text("utf-8")
    entries = references._entries()
    keys = [re.match(r"@\w+\{(\w+),", bibtex)[1] for _, bibtex in entries]
    assert len(set(keys)) == len(keys) == text.count("@") == len(entries)
    assert {name for names, _ in entries for name in names} <= {info.name for info in mtl.methods()}
    for _, bibtex in entries:
        assert bibtex.count("{") == bibtex.count("}")
        fields = re.findall(r"^  (\w+) = \{.*\},?$", bibtex, re.MULTILINE)
        assert len(fields) == bibtex.count("\n") - 1  # each line is a field
        assert {"title", "author", "year", "url"} <= set(fields) and {"journal", "booktitle"} & set(fields)


def test_a_wrapped_method_cites_what_it_wraps_once():
    method = mtl.skip_nonfinite(mtl.chain(mtl.learn(scalarization.imtl_l(), optax.sgd(0.1)), aggregation.mgda()))
    keys = re.findall(r"^@\w+\{(\w+),", mtl.cite(method), re.MULTILINE)
    assert keys == ["liu2021towards", "desideri2012multiple", "sener2018multi"]
    both = mtl.nested(aggregation.imtl_g(), {"a": scalarization.uw_o(), "b": scalarization.uw_so()})
    keys = re.findall(r"^@\w+\{(\w+),", mtl.cite(both), re.MULTILINE)
    assert keys == ["liu2021towards", "kirchdorfer2024analytical"]
    assert mtl.cite(mtl.switch((scalarization.mean(), scalarization.uw_o()))(0)) == references.entries_of("uw_o")[0]
    assert mtl.cite(scalarization.mean()) == ""
    with pytest.raises(TypeError, match=r"^method: expected a Scalarizer or an Aggregator, found function uw: "):
        mtl.cite(scalarization.uw)


def test_a_method_keeps_nothing_of_its_arguments_but_what_is_shown():
    """A state that is frozen may be large, and a dict may change after the call."""
    groups = {"a": scalarization.uw_o()}
    nested = mtl.nested(scalarization.mean(), groups)
    groups["b"] = scalarization.dwa(steps_per_epoch=2)
    assert "dwa" not in repr(nested) and "Liu, Shikun" not in mtl.cite(nested)

    amortized = mtl.amortize(aggregation.excess_mtl())
    state = amortized.init((2, {"w": jnp.ones((50, 1000))}))
    before = sum(x.nbytes for x in jax.live_arrays())
    frozen = mtl.freeze(amortized, state)
    del state
    assert sum(x.nbytes for x in jax.live_arrays()) < before - 300_000
    assert repr(frozen).startswith("freeze(amortize(")


def test_a_factory_around_ours_cites_what_it_returns():
    @base.memoized
    def mine(x=(1.0, 2.0)):
        del x
        return mtl.skip_nonfinite(scalarization.uw_o())

    assert mtl.cite(mine()) == mtl.cite(scalarization.uw_o()) != ""
    assert "mine" in repr(mine((jnp.ones(2), jnp.ones(2))))
