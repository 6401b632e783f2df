# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for proofs: each runs with its bug off, when it must pass, and on, when it must fail."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from kvmpy.lab import bugs

OFF, ON = "off", "on"
OPTION = "--kvmpy-prove"
# What the report of a proof says of the failure with the bug on.
SHOWN = "shown"
_MESSAGE_LINES = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option with the numbers to prove."""
    parser.addoption(OPTION, metavar="N[,N]", default="", help="Prove only these bugs.")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "bug(number): the bug of the catalogue that a proof is of.")


def number_of(item: pytest.Item) -> int:
    """Return the number of the bug that *item* proves; UsageError where it names none."""
    marker = item.get_closest_marker("bug")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid} has no mark that says which bug it proves")
    return int(marker.args[0])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the proofs of other bugs."""
    wanted = {int(word) for word in config.getoption(OPTION).split(",") if word}
    dropped = [item for item in items if wanted and number_of(item) not in wanted]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make two items of each proof."""
    metafunc.fixturenames.insert(0, "bug_state")
    metafunc.parametrize("bug_state", [OFF, ON], indirect=True)


@pytest.fixture
def bug_state(request: pytest.FixtureRequest) -> str:
    """Whether the bug is off or on."""
    return str(request.param)


def is_on(item: pytest.Item) -> bool:
    """Whether *item* runs with its bug on."""
    return isinstance(item, pytest.Function) and item.callspec.params.get("bug_state") == ON


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Switch the bug before anything is set up."""
    bugs.switch(str(number_of(item)) if is_on(item) else bugs.NONE)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Switch it off when all is taken down."""
    bugs.switch(bugs.NONE)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Turn the outcome round where the bug is on, and keep what the proof said."""
    if not is_on(pyfuncitem):
        return (yield)
    try:
        yield
    except (pytest.skip.Exception, KeyboardInterrupt):
        raise
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - what a proof fails with is up to it
        text = "\n".join(str(error).strip().splitlines()[:_MESSAGE_LINES]) or type(error).__name__
        pyfuncitem.user_properties.append((SHOWN, text))
        return True
    pytest.fail(f"bug {number_of(pyfuncitem)} is on, and the proof passes: it does not show", pytrace=False)
