# SPDX-License-Identifier: Apache-2.0
"""One test body, one item for each protection.

A test that makes VMs through the fixture ``make_vm``, also by way of other fixtures, runs under every
protection.  ``@pytest.mark.protections("snp", "cbit")`` names those it runs under; ``protections("all",
private_is_fd_backed=True)`` takes those with these traits: for tests of the trait itself.  A test of
something else that cannot do without one asks for ``requires("trait:NAME")``, and is skipped with that reason
under the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

MARKER = "protections"
FIXTURE = "protection"
MAKER = "make_vm"
ALL = "all"
TRAIT = "trait:"
AUTO = "auto"


def names_of(marker: pytest.Mark, ladder: Sequence[str]) -> list[str]:
    """Return the protections that a marker asks for, strongest first; UsageError for an unknown name or
    trait.
    """
    if not marker.args:
        raise pytest.UsageError('write protections("all") or name them: protections("snp", "cbit")')
    wanted = [str(arg) for arg in marker.args]
    if wanted == [ALL]:
        return with_traits(ladder, marker.kwargs)
    unknown = [name for name in wanted if name not in ladder]
    if unknown:
        raise pytest.UsageError(
            f"unknown protection {', '.join(unknown)}; there are {', '.join(ladder)}, and {ALL}"
        )
    return with_traits([name for name in ladder if name in wanted], marker.kwargs)


def with_traits(names: Sequence[str], traits: Mapping[str, object]) -> list[str]:
    """Return those of *names* whose traits have the given values; UsageError for an unknown trait."""
    from kvmpy.coco import ladder
    from kvmpy.guest.protection import Traits

    known = sorted(name for name in vars(Traits) if not name.startswith("_"))
    unknown = [trait for trait in traits if trait not in known]
    if unknown:
        raise pytest.UsageError(f"unknown trait {', '.join(unknown)}; there are {', '.join(known)}")
    return [
        name
        for name in names
        if all(getattr(ladder.get(name).traits, trait) == value for trait, value in traits.items())
    ]


def check_traits(item: pytest.Item, wanted: Sequence[Any]) -> list[Any]:
    """Skip *item* when its protection lacks a trait that it requires; return the other requirements.

    ValueError for an unknown trait.
    """
    traits = [need[len(TRAIT) :] for need in wanted if isinstance(need, str) and need.startswith(TRAIT)]
    name = of_item(item)
    for trait in traits:
        try:
            there = name is not None and with_traits([name], {trait: True})
        except pytest.UsageError as error:
            raise ValueError(str(error)) from None
        if not there:
            reason = f"needs a protection with the trait {trait}, which {name} has not"
            raise pytest.skip.Exception(reason, _use_item_location=True)
    return [need for need in wanted if not (isinstance(need, str) and need.startswith(TRAIT))]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Make one item for each protection that the test runs under."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        if MAKER not in metafunc.fixturenames or _is_its_own(metafunc.definition):
            return
        marker = pytest.mark.protections(ALL).mark
    elif FIXTURE not in metafunc.fixturenames:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the protections marker needs the fixture {MAKER} or {FIXTURE}"
        )
    from kvmpy.coco import ladder

    metafunc.parametrize(FIXTURE, names_of(marker, ladder.protections()), indirect=True, scope="function")


def _is_its_own(node: pytest.Item) -> bool:
    """Whether a test parametrizes an argument of this name for a purpose of its own."""
    return any(
        FIXTURE in str(mark.args[0]).split(",") for mark in node.iter_markers("parametrize") if mark.args
    )


def of_item(item: pytest.Item) -> str | None:
    """Return the protection that *item* runs under; None for a test that makes no VM through the fixtures."""
    callspec = getattr(item, "callspec", None)
    chosen = callspec.params.get(FIXTURE) if callspec is not None else None
    if chosen is not None:
        return None if _is_its_own(item) else str(chosen)
    return "none" if FIXTURE in getattr(item, "fixturenames", ()) else None


def parse_option(text: str, ladder: Sequence[str]) -> list[str]:
    """Return the protections named by ``--protection A,B``, ``auto`` among them; UsageError for an unknown
    one.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in (AUTO, *ladder)]
    if unknown or not wanted:
        raise pytest.UsageError(f"--protection {text}: choose from {AUTO}, {', '.join(ladder)}")
    return wanted


def resolve_auto(wanted: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return *wanted* with the strongest protection of this host for ``auto``, and what a report says about
    that choice.

    Without a usable KVM ``auto`` stands for the weakest: its tests say what is missing.
    """
    if AUTO not in wanted:
        return list(wanted), ()
    from kvmpy.coco import ladder
    from kvmpy.core.kvm import Kvm

    try:
        with Kvm() as kvm:
            choice = ladder.choose(kvm)
    except (OSError, RuntimeError) as error:
        chosen, about = ladder.protections()[-1], [f"protection auto: {error}"]
    else:
        chosen, about = choice.name, choice.lines()
    return list(dict.fromkeys(chosen if name == AUTO else name for name in wanted)), tuple(about)


def deselect_others(config: pytest.Config, items: list[pytest.Item], wanted: Sequence[str]) -> None:
    """Drop the items that run under a protection which is not *wanted*; those without one stay."""
    others = [item for item in items if of_item(item) not in (None, *wanted)]
    if others:
        config.hook.pytest_deselected(items=others)
        dropped = set(others)
        items[:] = [item for item in items if item not in dropped]
