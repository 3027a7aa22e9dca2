"""The names and shapes of all states are those of ``states.json``: users' checkpoints depend on them."""

import pytest

from tests import states

WHAT_IT_BREAKS = (
    "{names}: the state is another than in tests/states.json. Checkpoints that users have saved go by the names, "
    "shapes and order of its fields: they cannot be restored any more. If that is meant, say so in CHANGELOG.md, with "
    "what they have to do, and write the file anew by `python -m tests.states`."
)


def check(found, pinned):
    """Raises if a state that is pinned is another now, or one is not pinned yet."""
    changed = [name for name in pinned if name in found and list(found[name].items()) != list(pinned[name].items())]
    assert not changed, "\n".join(
        [
            WHAT_IT_BREAKS.format(names=", ".join(changed)),
            *(f"{name}: {pinned[name]} is now {found[name]}" for name in changed),
        ]
    )
    unknown = [*(found.keys() - pinned.keys()), *(pinned.keys() - found.keys())]
    assert not unknown, f"{sorted(unknown)}: rows of the catalogue come and go; run `python -m tests.states`"


def test_states_are_as_they_were():
    check(states.found(), states.pinned())


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: {"mean": fields["average"]} | {name: x for name, x in fields.items() if name != "average"},
        lambda fields: dict(reversed(fields.items())),
        lambda fields: fields | {"average": "float32[3,3]"},
        lambda fields: fields | {"average": "bfloat16[3]"},
        lambda fields: fields | {"oldest": "float32[3]"},
        lambda fields: {"average": fields["average"]},
    ],
    ids=["name", "order", "shape", "dtype", "new", "gone"],
)
def test_whoever_changes_a_field_is_told_what_that_breaks(change):
    pinned = states.pinned()
    found = pinned | {"scalarization-dwa": change(pinned["scalarization-dwa"])}
    with pytest.raises(
        AssertionError, match=r"scalarization-dwa: .*Checkpoints that users have saved.*python -m tests"
    ):
        check(found, pinned)


def test_a_new_row_is_named():
    pinned = states.pinned()
    with pytest.raises(AssertionError, match=r"\['scalarization-mine'\]: rows of the catalogue come and go; run"):
        check(pinned | {"scalarization-mine": {"seen": "int32[3]"}}, pinned)
