# SPDX-License-Identifier: Apache-2.0
"""Labels: what a test says that it needs, and what a host answers."""

from __future__ import annotations

import shutil

import pytest

from kvmpy.testing import labels

SOURCE = """
import pytest

def asks(kvm):
    return True

@pytest.mark.requires("KVM_CAP_IRQCHIP", "root", "trait:kvm_emulates", "root")
@pytest.mark.requires.with_args(asks)
@pytest.mark.protections("cbit")
def test_vm(make_vm):
    pass

@pytest.mark.dangerous(unless="sev-launch-finish")
def test_fixed():
    pass

@pytest.mark.dangerous
def test_dangerous(kvm):
    pass

def test_plain():
    pass
"""


def test_a_test_says_what_it_needs(pytester: pytest.Pytester) -> None:
    """Traits are the protection's, and functions have no name: neither is a label."""
    pytester.makepyfile(SOURCE)
    items: list[pytest.Item] = []

    class Catcher:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            items.extend(session.items)

    pytester.inline_run("--collect-only", plugins=[Catcher()])
    assert {item.name.partition("[")[0]: labels.of_item(item) for item in items} == {
        "test_vm": ["KVM_CAP_IRQCHIP", "root", "protection:cbit"],
        "test_fixed": ["dangerous:sev-launch-finish"],
        "test_dangerous": ["kvm", "dangerous"],
        "test_plain": [],
    }


@pytest.mark.parametrize("arguments", [[], ["--run-dangerous"]])
def test_a_host_answers(pytester: pytest.Pytester, arguments: list[str]) -> None:
    config = pytester.parseconfigure(*arguments)
    asked = ["tool:sh", "tool:no-such-tool", "dangerous", "dangerous:no-such-fix", "nonsense:1"]
    told = labels.answers(config, asked)
    assert list(told) == asked
    assert shutil.which("sh")
    assert told["tool:sh"] == ""
    assert told["tool:no-such-tool"].startswith("the command no-such-tool")
    # The test itself says that this means nothing.
    assert told["nonsense:1"] == ""
    assert bool(told["dangerous"]) is not bool(arguments)
    assert told["dangerous:no-such-fix"] == told["dangerous"]
    config._ensure_unconfigure()


def test_a_protection_is_called_by_its_name() -> None:
    assert [labels.plain(label) for label in ("protection:snp", "root")] == ["snp", "root"]
