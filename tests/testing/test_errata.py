# SPDX-License-Identifier: Apache-2.0
"""Errata files: what they may say, where an entry applies, and that it is strict both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.testing import host
from kvmpy.testing.errata import (
    BUILTIN,
    ErrataError,
    Erratum,
    HostFacts,
    find,
    glob_match,
    kernel_in_range,
    load,
)
from tests.testing.support import Suite

HERE = HostFacts("6.18.44-fc", "kvm_pvm", "AMD EPYC 9454", "host", {"kvm_amd.npt": "Y", "kvm_amd.avic": "N"})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (">=6.18,<6.19", True),
        ("==6.18", True),
        ("==6", True),
        ("==6.18.43", False),
        ("<6.18", False),
        ("<=6.18", True),
        (">6.18", False),
        (">6.18.43", True),
        (">=7", False),
    ],
)
def test_kernel_ranges(wanted: str, expected: bool) -> None:
    assert kernel_in_range("6.18.44-fc-v657", wanted) is expected


def test_a_shorter_release_counts_as_dot_zero() -> None:
    assert kernel_in_range("7.0", "==7.0.0")


@pytest.mark.parametrize("wanted", ["6.18", "~6.18", ">=x", ""])
def test_a_kernel_condition_that_is_none(wanted: str) -> None:
    with pytest.raises(ErrataError):
        kernel_in_range("6.18", wanted)


def test_brackets_of_a_test_id_stand_for_themselves() -> None:
    assert glob_match("a.py::t[none]", "a.py::t[none]")
    assert not glob_match("a.py::t[none]", "a.py::tn")
    assert glob_match("a.py::t*", "a.py::t[none]")
    assert not glob_match("a.py::t", "a.py::t[none]")


@pytest.mark.parametrize(
    ("when", "under", "expected"),
    [
        ({"module": "kvm_pvm"}, None, True),
        ({"module": "kvm_amd"}, None, False),
        ({"cpu": "AMD*", "kernel": ">=6"}, None, True),
        ({"cpu": "AMD*", "kernel": ">=7"}, None, False),
        ({"protection": "cbit"}, "cbit", True),
        ({"protection": "cbit"}, None, False),
        ({"protection": "none|c?it"}, "cbit", True),
        ({"protection": "none|sev"}, "sev-es", False),
        ({"protection": "none|sev"}, None, False),
        ({"platform": "lab*"}, None, False),
        ({"param:kvm_amd.npt": "Y", "module": "kvm_pvm"}, None, True),
        ({"param:kvm_amd.npt": "N"}, None, False),
        ({"param:kvm_amd.nonesuch": "*"}, None, False),
    ],
)
def test_every_condition_must_hold(when: dict[str, str], under: str | None, expected: bool) -> None:
    erratum = Erratum("a.py::*", "r", "o", when)
    assert (find([erratum], "a.py::t", HERE, under) is erratum) is expected


@pytest.mark.parametrize(
    ("module", "expected"), [("kvm_amd", True), ("kvm_intel", True), ("kvm_pvm", False), ("*amd*", True)]
)
def test_any_of_several_vendor_modules(module: str, expected: bool) -> None:
    both = HostFacts("7.2.13", "kvm_amd kvm_intel", "AMD EPYC Processor", "lab")
    assert Erratum("a.py::*", "r", "o", {"module": module}).applies(both, None) is expected


def test_module_parameters_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions see the parameters of kvm and of the vendor modules, and of no other."""
    loaded = {"kvm": {"tdp_mmu": "Y"}, "kvm_amd": {"npt": "N"}, "ccp": {"psp_timeout": "100"}}
    monkeypatch.setattr(host, "vendor_modules", lambda: ("kvm_amd",))
    monkeypatch.setattr(host, "ModuleParameters", lambda module: loaded[module])
    assert host.facts().parameters == {"kvm.tdp_mmu": "Y", "kvm_amd.npt": "N"}


def test_kvmpys_own_file_is_valid() -> None:
    assert all(entry.covers(entry.test) for entry in load([BUILTIN]))


def test_an_erratum_of_linux_ends_with_the_version_that_mends_it() -> None:
    """Not with the one that it was seen on: only a module that is not Linux's own is one version's."""
    for entry in load([BUILTIN]):
        if "==" in entry.when.get("kernel", ""):
            assert entry.when.get("module") == "kvm_pvm", entry.source


GOOD = 'test = "a.py::t"\nreason = "r"\norigin = "o"\nwhen = { module = "*" }\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[erratum]]\n" + GOOD.replace('origin = "o"', ""), "'origin' is needed"),
        ("[[erratum]]\n" + GOOD.replace('"r"', '" "'), "'reason' is needed"),
        ("[[erratum]]\n" + GOOD.replace('{ module = "*" }', "{}"), "'when' is needed"),
        ("[[erratum]]\n" + GOOD.replace("module", "moon"), "unknown conditions moon"),
        ("[[erratum]]\n" + GOOD.replace("module", '"param:npt"'), "unknown conditions param:npt"),
        ("[[erratum]]\n" + GOOD.replace("module", "kernel"), "kernel condition"),
        ("[[erratum]]\n" + GOOD.replace('"*"', "1"), "conditions are text"),
        ("[[erratum]]\n" + GOOD + 'since = "x"\n', "unknown keys since"),
        ("[[errata]]\n" + GOOD, "only [[erratum]]"),
        ("[[erratum]\n", "Expected"),
    ],
)
def test_a_file_that_says_too_little_or_too_much(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "errata.toml"
    path.write_text(text)
    with pytest.raises(ErrataError) as caught:
        load([path])
    assert complaint in str(caught.value)
    assert "errata.toml" in str(caught.value)


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError("the known thing")

def test_known():
    assert 0, "the known thing"

def test_setup(broken):
    pass

def test_other():
    assert 0, "something else"

def test_passes():
    pass

def test_skips():
    pytest.skip("not here")

def test_unlisted():
    assert 0, "the known thing"
"""


def test_strict_both_ways(suite: Suite) -> None:
    suite.add("test_a.py", TESTS)
    entries = [
        f'[[erratum]]\ntest = "test_a.py::test_{name}"\nreason = "broken here"\norigin = "a thread"\n'
        'when = { platform = "host" }\nmessage = "the known thing"\n'
        for name in ("known", "setup", "other", "passes", "skips")
    ]
    errata = suite.add("errata.toml", "\n".join(entries))
    outcome = suite.run(f"--kvmpy-errata={errata}")
    assert outcome.verdicts() == {
        "test_known": "xfail",
        "test_setup": "xfail",
        "test_other": "fail",
        "test_passes": "fail",
        "test_skips": "skip",
        "test_unlisted": "fail",
    }
    assert outcome.reason("test_known") == "errata: broken here (a thread)"
    assert outcome.reason("test_passes").startswith("errata entry is stale: errata.toml entry 4")
    assert "expects another failure here" in outcome.text
    assert outcome.status == 1


def test_a_bad_file_ends_the_session_at_its_start(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    errata = suite.add("errata.toml", "[[erratum]]\n")
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), f"--kvmpy-errata={errata}", timeout=60)
    assert int(result.ret) == int(pytest.ExitCode.USAGE_ERROR)
    assert any("'test' is needed" in line for line in result.errlines)
