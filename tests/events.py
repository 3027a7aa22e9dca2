"""Counting what JAX does: traces and compilations, as ``jax.monitoring`` reports them."""

import contextlib

import jax.monitoring

_HEARD: list[str] | None = None


def _listen(event, duration, **kwargs):
    del duration, kwargs
    if _HEARD is not None:
        _HEARD.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def recorded():
    """The names of the events inside the ``with`` block, as a list that fills."""
    global _HEARD
    _HEARD = []
    try:
        yield _HEARD
    finally:
        _HEARD = None


def traces(events):
    return sum(event.endswith("jaxpr_trace_duration") for event in events)


def compilations(events):
    return sum(event.endswith("backend_compile_duration") for event in events)
