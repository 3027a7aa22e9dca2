"""The registry has every public method, with what it asks for."""

import inspect
import subprocess
import sys

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

FAMILIES = {"scalarization": scalarization, "aggregation": aggregation}


def test_it_has_what_the_families_list():
    found = {(info.family, info.name): info.factory for info in mtl.methods()}
    listed = {(family, name) for family, module in FAMILIES.items() for name in module.__all__ if name.islower()}
    assert found.keys() == listed and len(found) == len(mtl.methods()) > 60
    assert all(factory is getattr(FAMILIES[family], name) for (family, name), factory in found.items())


def test_what_is_required_is_what_has_no_default():
    for info in mtl.methods():
        parameters = inspect.signature(info.factory).parameters
        assert info.required == tuple(name for name, each in parameters.items() if each.default is each.empty)


def test_needs_are_those_of_the_method_with_its_defaults():
    needs = {info.name: info.needs for info in mtl.methods() if info.needs}
    hooks = {"coba": ("observe",), "dtp": ("observe",), "famo": ("observe",), "dwa": ("end_epoch",)}
    assert needs == hooks | dict.fromkeys(["imtl_l", "minmax", "revised_uw", "self_adaptive", "uw"], ("learn",))


def test_it_is_made_without_a_device():
    """So that ``jax.distributed.initialize`` may come later."""
    script = "import mtlbalance as mtl; mtl.methods(); from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", script], check=True)
