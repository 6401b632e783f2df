# SPDX-License-Identifier: Apache-2.0
"""Markers, options and fixtures of the plugin."""

from __future__ import annotations

import pytest

from kvmpy.coco import ladder
from kvmpy.coco.kvm import Kvm
from kvmpy.core.errors import MissingError
from kvmpy.testing import host
from kvmpy.testing.gate import insisted, reason_for, required_names
from kvmpy.testing.itemreports import postmortem_of
from kvmpy.testing.verdicts import Missing
from tests.testing.support import NO_KVM, Suite

NEEDS = """
import pytest

@pytest.mark.requires("kvm")
def test_kvm():
    pass

@pytest.mark.requires("tool:no-such-tool")
def test_tool():
    pass

@pytest.mark.requires("tool:sh")
def test_present():
    pass

@pytest.mark.requires("KVM_CAP_USER_MEMORY")
def test_cap():
    pass

def test_fixture(kvm):
    pass

def test_plain_skip():
    pytest.skip("a reason of its own")
"""


def test_a_skip_says_what_is_missing_and_how_to_get_it(suite: Suite) -> None:
    suite.add("test_a.py", NEEDS)
    outcome = suite.run()
    assert outcome.status == 0
    assert outcome.report["summary"] == {"pass": 1, "fail": 0, "skip": 5, "xfail": 0, "lost": 0}
    for name in ("test_kvm", "test_cap", "test_fixture"):
        entry = outcome.test(name)
        assert entry["missing"] == [f"{NO_KVM} does not exist"]
        assert "modprobe" in entry["how"][0]
        assert entry["reason"].endswith("[KVMPY_REQUIRE=kvm makes this a failure]")
    tool = outcome.test("test_tool")
    assert tool["missing"] == ["the command no-such-tool"]
    assert "apt-get install" in tool["how"][0]


@pytest.mark.parametrize(
    ("insist", "failing"),
    [
        ("kvm", {"test_kvm", "test_cap", "test_fixture"}),
        ("tool:no-such-tool", {"test_tool"}),
        ("KVM,tool:no-such-tool", {"test_kvm", "test_cap", "test_fixture", "test_tool"}),
        ("all", {"test_kvm", "test_cap", "test_fixture", "test_tool", "test_plain_skip"}),
        ("snp", set()),
    ],
)
def test_require_turns_skips_into_failures(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, insist: str, failing: set[str]
) -> None:
    monkeypatch.setenv("KVMPY_REQUIRE", insist)
    suite.add("test_a.py", NEEDS)
    outcome = suite.run()
    assert {name for name, verdict in outcome.verdicts().items() if verdict == "fail"} == failing
    assert outcome.status == (1 if failing else 0)


def test_a_requirement_that_means_nothing_fails(suite: Suite) -> None:
    suite.add("test_a.py", "import pytest\n@pytest.mark.requires('toll:gcc')\ndef test_a(): pass\n")
    outcome = suite.run()
    assert outcome.verdicts() == {"test_a": "fail"}
    assert "unknown requirement 'toll:gcc'" in outcome.reason("test_a")


KINDS = [
    ("'kvm'", "pass"),
    ("'KVM_CAP_USER_MEMORY'", "pass"),
    ("'KVM_CAP_NR_MEMSLOTS>=2'", "pass"),
    ("'KVM_CAP_NR_MEMSLOTS>=0x7fffffff'", "skip"),
    ("'KVM_CAP_VM_TYPES&1'", "pass"),
    ("'KVM_CAP_S390_PSW'", "skip"),
    ("'KVM_CAP_NO_SUCH'", "fail"),
    ("'ioctl:KVM_RUN'", "pass"),
    ("'ioctl:KVM_WALK'", "fail"),
    ("'vm-type:KVM_X86_DEFAULT_VM'", "pass"),
    ("'vm-type:KVM_X86_TDX_VM'", "skip"),
    ("'sev-attr:KVM_X86_SNP_POLICY_BITS'", "skip"),
    ("'sev-attr:KVM_X86_NO_SUCH'", "fail"),
    ("'protection:none'", "pass"),
    ("'protection:nonesuch'", "fail"),
    ("'cpuid:cx8'", "pass"),
    ("'cpuid:mwait'", "skip"),
    ("'cpuid:nosuchfeature'", "fail"),
    ("'msr:0x10'", "pass"),
    ("'msr:0x12345678'", "skip"),
    ("'param:kvm.halt_poll_ns'", "pass"),
    ("'param:kvm.halt_poll_ns=-1'", "skip"),
    ("'param:kvm.no_such'", "skip"),
    ("'cpu:lm'", "pass"),
    ("'cpu:nosuchflag'", "skip"),
    ("'path:/dev/null'", "pass"),
    ("'path:/nonexistent'", "skip"),
    ("'toll:gcc'", "fail"),
    ("lambda kvm: None", "pass"),
    ("lambda kvm: 'a moon in the right phase'", "skip"),
    ("lambda kvm: Missing('a moon', 'wait')", "skip"),
]


@pytest.mark.requires("kvm")
def test_kinds_of_requirements(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add(
        "test_a.py",
        "import pytest\nfrom kvmpy.testing import Missing\n"
        + "".join(
            f"@pytest.mark.requires({requirement})\ndef test_{number}(): pass\n"
            for number, (requirement, _) in enumerate(KINDS)
        ),
    )
    outcome = suite.run()
    verdicts = outcome.verdicts()
    assert [(text, verdicts[f"test_{number}"]) for number, (text, _) in enumerate(KINDS)] == KINDS
    for name, verdict in verdicts.items():
        assert bool(outcome.test(name)["missing"]) is (verdict == "skip")


def test_dangerous_runs_only_when_asked_for(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n@pytest.mark.dangerous\ndef test_a(): pass\n"
        "@pytest.mark.dangerous\n@pytest.mark.parametrize('n', [1])\ndef test_b(n): pass\n",
    )
    assert suite.run().verdicts() == {"test_a": "skip", "test_b[1]": "skip"}
    assert "--run-dangerous" in suite.run().reason("test_a")
    assert suite.run("--run-dangerous").verdicts() == {"test_a": "pass", "test_b[1]": "pass"}
    monkeypatch.setenv("KVMPY_REQUIRE", "all")
    assert suite.run().verdicts() == {"test_a": "skip", "test_b[1]": "skip"}
    monkeypatch.setenv("KVMPY_PLATFORM", "lab")
    assert suite.run().verdicts() == {"test_a": "pass", "test_b[1]": "pass"}


def test_dangerous_runs_when_named(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\npytestmark = pytest.mark.dangerous\ndef test_a(): pass\ndef test_b(): pass\n",
    )
    args = [arg for arg in suite.arguments() if arg != str(suite.folder)]
    result = suite.pytester.runpytest_subprocess(*args, "test_a.py::test_a", timeout=60)
    result.assert_outcomes(passed=1)
    result = suite.pytester.runpytest_subprocess(*args, "test_a.py", timeout=60)
    result.assert_outcomes(skipped=2)


KEEP = """
import pytest

def keep(name, value):
    with open(name, "a") as stream:
        stream.write(f"{value}\\n")

"""


def test_the_seed_is_printed_and_repeats_every_choice(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        f"{KEEP}def test_a(rng): keep('a', rng.random())\ndef test_b(rng): keep('b', rng.random())\n",
    )
    first = suite.run()
    seed = first.report["seed"]
    assert f"seed {seed}" in first.text
    assert suite.run(f"--kvmpy-seed={seed}").report["seed"] == seed
    suite.run(f"--kvmpy-seed={seed ^ 1}")
    a, b = ((suite.folder / name).read_text().split() for name in "ab")
    assert a[0] == a[1] != a[2]
    assert a[0] != b[0]


def test_xdist_workers_share_the_seed(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        f"{KEEP}@pytest.mark.parametrize('n', range(8))\ndef test_a(n, seed): keep(f'seed{{n}}', seed)\n",
    )
    first = suite.run("-n2")
    suite.run("-n0", f"--kvmpy-seed={first.report['seed']}")
    for number in range(8):
        values = (suite.folder / f"seed{number}").read_text().split()
        assert len(values) == 2
        assert values[0] == values[1]


def test_without_kvm_the_header_says_which_and_why(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    outcome = suite.run()
    lines = [line for line in outcome.text.splitlines() if line.startswith("KVM cannot be used")]
    assert len(lines) == 1
    assert NO_KVM in lines[0]
    assert "modprobe" in lines[0]
    assert outcome.report["host"]["kvm"] is False
    assert outcome.status == 0


def test_without_permission_the_group_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMPY_DEV_KVM", raising=False)

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.open", refuse)
    missing = host.kvm_missing()
    assert missing is not None
    assert missing.what == "no permission to open /dev/kvm"
    assert "usermod -aG" in missing.how
    assert missing.keys == ("kvm",)


def test_protections_make_one_item_each(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n"
        "@pytest.mark.protections('all')\ndef test_all(protection): pass\n"
        "@pytest.mark.protections('none')\ndef test_one(protection): pass\n"
        "def test_plain(protection): pass\ndef test_without(): pass\n",
    )
    outcome = suite.run()
    verdict_of = {test["id"].partition("::")[2]: test["protection"] for test in outcome.report["tests"]}
    assert verdict_of["test_all[cbit]"] == "cbit"
    assert verdict_of["test_all[none]"] == "none"
    assert verdict_of["test_one[none]"] == "none"
    assert verdict_of["test_plain"] == "none"
    assert verdict_of["test_without"] is None
    # What has no protection is no filter's business.
    assert set(suite.run("--protection=cbit").verdicts()) == {"test_all[cbit]", "test_without"}
    assert set(suite.run("--protection=none").verdicts()) == set(verdict_of) - {
        name for name in verdict_of if name.startswith("test_all[") and name != "test_all[none]"
    }
    everything = ",".join(ladder.protections())
    assert outcome.verdicts().keys() == suite.run(f"--protection={everything}").verdicts().keys()


@pytest.mark.parametrize(
    ("marker", "signature", "complaint"),
    [
        ("protections('nonesuch')", "protection", "unknown protection nonesuch"),
        ("protections('all')", "", "needs the fixture make_vm"),
        ("protections()", "protection", "or name them"),
        ("protections('all', shines=True)", "protection", "unknown trait shines"),
        ("requires('trait:shines')", "protection", "unknown trait shines"),
    ],
)
def test_a_protections_marker_that_is_wrong(
    suite: Suite, marker: str, signature: str, complaint: str
) -> None:
    suite.add("test_a.py", f"import pytest\n@pytest.mark.{marker}\ndef test_a({signature}): pass\n")
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), timeout=60)
    assert int(result.ret) != 0
    assert any(complaint in line for line in [*result.outlines, *result.errlines])


def test_protections_are_taken_by_their_traits(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n"
        "@pytest.mark.protections('all', has_encryption_bit=True, emulated=True)\n"
        "def test_bit(protection): pass\n"
        "@pytest.mark.protections('cbit', 'none', has_private_memory=False)\n"
        "def test_plain(protection): pass\n",
    )
    assert set(suite.run().verdicts()) == {"test_bit[cbit]", "test_plain[none]"}


def test_a_trait_that_the_protection_lacks_is_a_skip(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n"
        "@pytest.mark.requires('trait:has_encryption_bit')\n"
        "@pytest.mark.protections('cbit', 'none')\n"
        "def test_bit(protection): pass\n"
        "@pytest.mark.requires('trait:has_encryption_bit')\n"
        "def test_without(): pass\n",
    )
    outcome = suite.run()
    assert "has_encryption_bit" not in outcome.reason("test_bit[cbit]")
    assert "the trait has_encryption_bit, which none has not" in outcome.reason("test_bit[none]")
    assert "the trait has_encryption_bit" in outcome.reason("test_without")


def test_protection_auto_is_the_strongest_and_the_report_says_why_no_stronger(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMPY_DEV_KVM")
    try:
        with Kvm() as kvm:
            states = kvm.protections()
    except MissingError as error:
        pytest.skip(f"needs KVM: {error}")
    strongest = next(name for name, state in states.items() if state.available)
    suite.add("test_a.py", "import pytest\n@pytest.mark.protections('all')\ndef test_all(protection): pass\n")
    outcome = suite.run("--protection=auto")
    assert outcome.verdicts() == {f"test_all[{strongest}]": "pass"}
    assert f"protection auto: {strongest}" in outcome.text
    for name in list(states)[: list(states).index(strongest)]:
        assert f"  not {name}: needs {states[name].missing[0].missing}" in outcome.text


def test_protection_auto_without_kvm_is_a_skip_that_says_so(suite: Suite) -> None:
    suite.add("test_a.py", "import pytest\n@pytest.mark.protections('all')\ndef test_all(protection): pass\n")
    outcome = suite.run("--protection=auto")
    assert outcome.verdicts() == {"test_all[none]": "skip"}
    assert "kvm" in outcome.reason("test_all[none]")


def test_an_unknown_protection_option_is_a_usage_error(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), "--protection=moon", timeout=60)
    assert int(result.ret) == int(pytest.ExitCode.USAGE_ERROR)
    assert any("--protection moon: choose from" in line for line in result.errlines)


def test_a_missing_error_that_leaves_a_test_is_a_skip(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "from kvmpy.core.errors import MissingError\n"
        "def test_a(): raise MissingError('a moon', 'wait for it')\n",
    )
    outcome = suite.run()
    assert outcome.verdicts() == {"test_a": "skip"}
    assert outcome.test("test_a")["missing"] == ["a moon"]
    assert outcome.test("test_a")["how"] == ["wait for it"]


def test_a_missing_error_can_be_insisted_on_by_its_name(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.add(
        "test_a.py",
        "from kvmpy.core.errors import MissingError\n"
        "def test_a(): raise MissingError('protection snp: no SEV', 'buy one')\n"
        "def test_b(): raise MissingError('this needs KVM_CAP_MOON here', '')\n",
    )
    monkeypatch.setenv("KVMPY_REQUIRE", "snp")
    outcome = suite.run()
    assert outcome.verdicts() == {"test_a": "fail", "test_b": "skip"}
    assert "KVMPY_REQUIRE: snp may not be missing" in outcome.text
    monkeypatch.setenv("KVMPY_REQUIRE", "KVM_CAP_MOON")
    assert suite.run().verdicts() == {"test_a": "skip", "test_b": "fail"}


def test_a_long_deadline_widens_the_timeout(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n"
        "def limit(request):\n    marker = request.node.get_closest_marker('timeout')\n"
        "    return marker and marker.args[0]\n"
        "@pytest.mark.deadline(200)\n"
        "def test_long(request, deadline): assert (deadline, limit(request)) == (200.0, 460.0)\n"
        "@pytest.mark.deadline(3)\n"
        "def test_short(request, deadline): assert (deadline, limit(request)) == (3.0, None)\n"
        "@pytest.mark.deadline(200)\n@pytest.mark.timeout(90)\n"
        "def test_own(request, deadline): assert limit(request) == 90\n"
        "def test_default(deadline): assert deadline == 7.0\n",
    )
    assert set(suite.run("--deadline=7").verdicts().values()) == {"pass"}


def test_a_long_load_widens_the_timeout(suite: Suite) -> None:
    """--load-seconds reaches the tests that use the fixture, and widens their time-out, nobody else's."""
    suite.add(
        "test_a.py",
        "def limit(request):\n"
        "    marker = request.node.get_closest_marker('timeout')\n"
        "    return marker.args[0] if marker else None\n"
        "def test_load(request, load_seconds): assert (load_seconds, limit(request)) == (300.0, 660.0)\n"
        "def test_other(request): assert limit(request) is None\n",
    )
    assert set(suite.run("--load-seconds=300").verdicts().values()) == {"pass"}
    suite.add("test_a.py", "def test_load(load_seconds): assert load_seconds == 0.15\n")
    assert set(suite.run().verdicts().values()) == {"pass"}
    assert "-1 is not a positive number of seconds" in suite.run("--load-seconds=-1").text


GUEST_TEST = """
import pytest

GUEST = '''
#include <kvmpy/guest.h>
void guest_main(void)
{
    GUEST_SYNC(1);
    GUEST_DONE();
}
'''

@pytest.mark.protections("none")
def test_host_side(make_vm):
    vm = make_vm(GUEST)
    vm.launch()
    assert vm.vcpus[0].next().args[0] == 2
"""


@pytest.mark.requires("kvm", "tool:gcc")
def test_a_failure_on_the_hosts_side_shows_the_guests_state(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add("test_a.py", GUEST_TEST)
    outcome = suite.run()
    assert outcome.verdicts() == {"test_host_side[none]": "fail"}
    state = outcome.test("test_host_side[none]")["postmortem"]
    assert "the test failed on the host's side" in state
    assert "rip" in state.lower()
    assert state.splitlines()[0] in outcome.text


def test_the_promise_is_the_docstring(suite: Suite) -> None:
    suite.add("test_a.py", 'def test_a():\n    """It holds.\n\n    More.\n    """\n')
    assert suite.run().test("test_a")["promise"] == "It holds."


def test_a_post_mortem_is_a_section_and_in_the_report(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "class Bad(RuntimeError):\n    postmortem = 'RIP 0x400000 is here'\n"
        "def test_a():\n    try:\n        raise Bad('guest')\n    except Bad as error:\n"
        "        raise ValueError('outer') from error\n",
    )
    outcome = suite.run()
    assert outcome.test("test_a")["postmortem"] == "RIP 0x400000 is here"
    assert "post-mortem" in outcome.text
    assert "RIP 0x400000 is here" in outcome.ktap


def test_postmortem_of_a_ring_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert postmortem_of(first) == ""


def test_a_session_without_kvm_tests_stays_silent(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    result = suite.pytester.runpytest_subprocess("-c", "/dev/null", "test_a.py", timeout=60)
    assert int(result.ret) == 0
    assert not any("kvmpy:" in line or "verdicts" in line for line in result.outlines)


def test_required_names_are_case_insensitive_and_trimmed() -> None:
    names = required_names(" SNP , kvm_cap_x,")
    assert names == {"snp", "kvm_cap_x"}
    assert insisted([Missing("x", "", ("KVM_CAP_X",))], names) == "KVM_CAP_X"
    assert insisted([Missing("x", "", ("kvm",))], names) is None
    assert insisted([Missing("x", "")], frozenset({"all"})) == "all"


def test_a_reason_names_every_missing_thing() -> None:
    text = reason_for([Missing("a", "get a", ("x",)), Missing("b", "", ("y",))])
    assert text == "needs a: get a; needs b [KVMPY_REQUIRE=x makes this a failure]"


def test_an_error_of_kvmpy_points_at_the_test(suite: Suite) -> None:
    source = "from kvmpy.guest import GuestProgram\n\ndef test_image():\n    GuestProgram.from_elf(b'no')\n"
    suite.add("test_a.py", source)
    outcome = suite.run()
    details = outcome.test("test_image")["details"]
    assert "test_a.py:4: GuestImageError" in details
    assert "symbols.py" not in details


def test_an_error_inside_kvmpy_keeps_its_frames(suite: Suite) -> None:
    source = "from kvmpy.core.address import Gpa\n\ndef test_gpa():\n    Gpa(-1)\n"
    suite.add("test_a.py", source)
    assert "address.py" in suite.run().test("test_gpa")["details"]


def test_only_what_a_file_names_runs(suite: Suite) -> None:
    """Tests, or whole files, by the names that reports have."""
    suite.add("test_a.py", "def test_one(): pass\ndef test_two(): pass\n")
    suite.add("test_b.py", "def test_one(): pass\ndef test_two(): pass\n")
    chosen = suite.pytester.path / "chosen.txt"
    names = [test["id"] for test in suite.run().report["tests"]]
    chosen.write_text(f"# a comment\n{names[1]}\n\n{names[2].partition('::')[0]}\n")
    assert [test["id"] for test in suite.run(f"--kvmpy-select={chosen}").report["tests"]] == names[1:]
    chosen.write_text("# nothing\n")
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), f"--kvmpy-select={chosen}", timeout=60)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(f"{chosen} names no tests" in line for line in result.errlines)
