# SPDX-License-Identifier: Apache-2.0
"""``kvmpy run`` and the command group."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy import version
from kvmpy.cli.main import COMMANDS, main
from kvmpy.testing.host import kvm_missing
from kvmpy.testing.option_table import OF_PYTEST
from tests.testing.support import NO_KVM, parse_ktap, unknown_options

DOCS = Path(__file__).resolve().parents[2] / "docs"


def kvmpy_command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.fixture(autouse=True)
def _no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    monkeypatch.setenv("KVMPY_LAB", "never")
    monkeypatch.delenv("KVMPY_REQUIRE", raising=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "test_own.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.requires('kvm')\ndef test_kvm(): pass\n"
    )
    return tmp_path


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"kvmpy {version.exact()}\n"


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kvmpy.cli.main import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "print([name for name in sys.modules if name.startswith('kvmpy.')])\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    text, modules = output.stdout.rstrip().rsplit("\n", 1)
    assert modules == "['kvmpy.cli', 'kvmpy.signals', 'kvmpy.cli.main']"
    for name, line in COMMANDS.items():
        assert name in text
        assert line.split()[-1] in text


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["rnu"]).exit_code == 2


def test_own_files_with_reports(own: Path) -> None:
    result = kvmpy_command(
        own, "run", "test_own.py", "--json", "r/o.json", "--ktap", "o.ktap", "--junit", "o.xml"
    )
    assert result.returncode == 1
    report = json.loads((own / "r" / "o.json").read_text())
    assert report["summary"] == {"pass": 1, "fail": 1, "skip": 1, "xfail": 0, "lost": 0}
    assert "not ok 2 test_bad" in (own / "o.ktap").read_text()
    assert "<testsuite" in (own / "o.xml").read_text()
    assert "skipped, by what is missing:" in result.stdout
    assert not (own / ".pytest_cache").exists()


def test_selection_and_arguments_for_pytest(own: Path) -> None:
    result = kvmpy_command(
        own, "run", "-k", "good or bad", "test_own.py", "--", "--deselect", "test_own.py::test_bad"
    )
    assert result.returncode == 0
    assert "1 passed" in result.stdout


def test_in_several_processes(own: Path) -> None:
    result = kvmpy_command(own, "run", "-n", "2", "--json", "o.json", "test_own.py")
    assert result.returncode == 1
    assert json.loads((own / "o.json").read_text())["summary"]["pass"] == 1


def test_strict_private_reaches_the_session(own: Path) -> None:
    (own / "test_own.py").write_text(
        "from kvmpy.testing.options import SETTINGS\n"
        "def test_strict(request): assert request.config.stash[SETTINGS].strict_private\n"
    )
    assert kvmpy_command(own, "run", "test_own.py", "--strict-private").returncode == 0
    assert kvmpy_command(own, "run", "test_own.py").returncode == 1


STRICT = """
import pytest
from kvmpy import GuestProgram, PrivateMemoryError

PROGRAM = GuestProgram.from_c('''
#include <kvmpy/guest.h>
u64 secret = 7;
void guest_main(void) { }
''')

@pytest.mark.protections("cbit")
def test_secret(make_vm):
    with pytest.raises(PrivateMemoryError, match="strict_private"):
        make_vm.start(PROGRAM).symbol("secret").u64
"""


def test_strict_private_keeps_the_host_out(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private pages of the emulated bit, which the host reads without the option."""
    monkeypatch.delenv("KVMPY_DEV_KVM")
    if kvm_missing() is not None:
        pytest.skip("needs KVM")
    (own / "test_own.py").write_text(STRICT)
    assert kvmpy_command(own, "run", "test_own.py", "--strict-private").returncode == 0
    plain = kvmpy_command(own, "run", "test_own.py")
    assert plain.returncode == 1
    assert "DID NOT RAISE" in plain.stdout


def test_a_timeline_in_place_of_a_folder(own: Path) -> None:
    (own / "test_own.py").write_text("def test_a(): pass\n")
    result = kvmpy_command(own, "run", "test_own.py", "--timeline", str(own))
    assert result.returncode == 4
    assert "is a folder; a file is expected" in result.stderr


def documented_commands() -> list[str]:
    """Every command of kvmpy that the documentation shows, as one line each."""
    results = []
    for file in (DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))):
        outside = file.read_text(encoding="utf-8").split("```")
        blocks = re.sub(r"\\\n\s*", "", "\n".join(outside[1::2]))
        lines = [re.split(r"\s{2,}| # ", line.strip())[0] for line in blocks.splitlines()]  # without a remark
        lines += [span for text in outside[::2] for span in re.findall(r"`([^`]+)`", text)]
        # Not what a command prints, such as `kvmpy lab: booting`.
        shown = re.compile(r"\W*(?:sudo )?kvmpy [a-z]+(?![a-z:])")
        results += [" ".join(line.split()) for line in lines if shown.match(line)]
    return results


def test_every_option_that_the_documentation_shows_exists() -> None:
    """A command line in README or docs names a command of kvmpy, and options that it has."""
    commands = documented_commands()
    assert len(commands) > 50
    checked = 0
    for line in commands:
        assert unknown_options(line) == [], line
        checked += line.count(" --")
    assert checked > 30
    text = "".join(
        file.read_text(encoding="utf-8") for file in (DOCS.parent / "README.md", *DOCS.glob("*.md"))
    )
    of_pytest = set(re.findall(r"--kvmpy-[a-z-]+", text))
    assert of_pytest
    assert of_pytest <= set(OF_PYTEST.values())


def test_list_runs_nothing(own: Path) -> None:
    result = kvmpy_command(own, "run", "--list", "test_own.py")
    assert result.returncode == 0
    assert result.stdout.splitlines()[:3] == [
        "test_own.py::test_good",
        "test_own.py::test_bad",
        "test_own.py::test_kvm",
    ]


def test_nothing_selected_says_so(own: Path) -> None:
    result = kvmpy_command(own, "run", "-k", "zzz", "test_own.py")
    assert result.returncode == 5
    assert "no test matches" in result.stderr


def test_a_path_that_is_nowhere(own: Path) -> None:
    result = kvmpy_command(own, "run", "test_missing.py")
    assert result.returncode == 2
    assert "test_missing.py is neither in the suite" in result.stderr


def test_the_seed_option_reaches_the_session(own: Path) -> None:
    result = kvmpy_command(own, "run", "-k", "good", "--seed", "77", "test_own.py")
    assert "seed 77" in result.stdout


SWALLOWED = """
import os, signal, sys, threading, weakref
from kvmpy.signals import Interrupter, again, handled
sys.unraisablehook = again

class Thing: pass
thing = Thing()
def callback(_): {taken}
reference = weakref.ref(thing, callback)
with handled(Interrupter(), signal.SIGTERM):
    try:
        del thing
        threading.Event().wait(60)
    except KeyboardInterrupt as interrupt:
        print(type(interrupt).__name__)
"""


@pytest.mark.parametrize(
    ("taken", "comes"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "Interrupted"),
    ],
    ids=["interrupt", "signal"],
)
def test_what_a_callback_swallowed_comes_again(taken: str, comes: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SWALLOWED.format(taken=taken)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert (result.stdout, result.stderr) == (f"{comes}\n", "")


def test_a_report_on_standard_output(own: Path) -> None:
    """Standard output has the report alone; everything else goes to standard error."""
    result = kvmpy_command(own, "run", "test_own.py", "--json", "-")
    assert result.returncode == 1
    assert json.loads(result.stdout)["summary"]["fail"] == 1
    assert "1 failed" in result.stderr
    both = kvmpy_command(own, "run", "test_own.py", "--json", "-", "--ktap", "-")
    assert (both.returncode, "only one report" in both.stderr) == (2, True)
    assert not list(own.glob("-*"))


@pytest.mark.parametrize(
    ("name", "status"), [("good", 0), ("bad", 1), ("kvm", 4), ("nothing", 1)], ids=lambda value: str(value)
)
def test_statuses_of_a_kselftest(own: Path, name: str, status: int) -> None:
    """0, 1, or 4 where all is skipped; 2, pytest's for an interruption, is an expected failure there."""
    result = kvmpy_command(own, "run", "test_own.py", "-k", f"test_{name}", "--kselftest")
    assert result.returncode == status
    if name != "nothing":
        document = parse_ktap(result.stdout)
        assert document.plan == 1
        assert result.stdout.splitlines()[0] == "KTAP version 1"
        assert "  # Subtest: test_own.py" in result.stdout.splitlines()
