"""The registry: every public method of both families, for whoever goes through all of them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from mtlbalance import aggregation, scalarization
from mtlbalance.contract import Aggregator, Scalarizer

_FAMILIES = {"scalarization": scalarization, "aggregation": aggregation}


class MethodInfo(NamedTuple):
    """A public method.

    Attributes:
      name: of its factory, as ``"upgrad"``. Both families have ``mean``, ``sum``, ``constant`` and ``random``.
      family: ``"scalarization"`` or ``"aggregation"``.
      factory: the function of its hyperparameters.
      required: the names of the factory's arguments that have no default.
      needs: what the method, with its defaults, needs of its user: ``"learn"``, if its weights are trained by
        :func:`mtlbalance.learn`; ``"observe"`` and ``"end_epoch"``, if without these calls in the loop it does nothing.
    """

    name: str
    family: str
    factory: Callable[..., Any]
    required: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """The name with the family, as ``"aggregation.mean"``, which no other method has."""
        return f"{self.family}.{self.name}"


@functools.cache
def methods() -> tuple[MethodInfo, ...]:
    """Every public method of both families, as their ``__all__`` and the factories' signatures have it.

    Methods of your own are not among them; wrappers are none, but for
    :func:`~mtlbalance.aggregation.cr_mogm`, which is a published method.

    Returns:
      A tuple of :class:`MethodInfo`, the scalarizers first, each family in alphabetical order.

    Example:
      >>> import mtlbalance as mtl
      >>> (famo,) = [info for info in mtl.methods() if info.name == "famo"]
      >>> print(famo.full_name, famo.required, famo.needs)
      scalarization.famo () ('observe',)
      >>> [info.name for info in mtl.methods() if "learn" in info.needs]
      ['imtl_l', 'minmax', 'revised_uw', 'self_adaptive', 'uw']
    """
    return tuple(
        _info(name, family, factory)
        for family, module in _FAMILIES.items()
        for name, factory in sorted(vars(module).items())
        if name in module.__all__ and inspect.isfunction(factory)  # the others are classes
    )


def _info(name, family, factory):
    parameters = inspect.signature(factory).parameters.values()
    required = {parameter.name: parameter for parameter in parameters if parameter.default is parameter.empty}
    # Whatever is given where there is no default: what a method needs of its loop does not depend on it.
    method = factory(**{name: _anything(parameter) for name, parameter in required.items()})
    needs = ("learn",) if method.learned else ()
    return MethodInfo(name, family, factory, tuple(required), needs + method.needs)


def _anything(parameter):
    of_family = {Scalarizer: scalarization.sum, Aggregator: aggregation.sum}
    return of_family[parameter.annotation]() if parameter.annotation in of_family else 1
