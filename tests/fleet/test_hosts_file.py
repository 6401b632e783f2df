# SPDX-License-Identifier: Apache-2.0
"""The hosts file, and hosts that are reached by commands: ssh, power, lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.fleet.errors import FleetError
from kvmpy.fleet.fleetfile import Entry, load
from kvmpy.guest import packs
from tests.fleet.conftest import ROOT, Fleet


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("one = 1", "host 'one': a host is a table"),
        ("[one", "is no TOML"),
        ('[one]\npowr = "x"', "unknown key 'powr'; did you mean power?"),
        ('[one]\npower = "fence"', r"'power' has no \{action\}"),
        ('[one]\npower = "\'{action}"', "'power' is no command: No closing quotation"),
        ("[one]\ndeaths = -1", "'deaths' is a number from 0 to 1000"),
        ("[one]\ndeaths = true", "'deaths' is a number"),
        ('[one]\nlocal = "yes"', "'local' is true or false"),
        ("[one]\nssh = 1", "'ssh' is text"),
        ('[one]\nlocal = true\nssh = "a"', "not both"),
        ('[one]\nlab = "x"', "'lab' is a list of options"),
    ],
)
def test_what_a_hosts_file_says_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts.toml"
    path.write_text(text)
    with pytest.raises(FleetError, match=message):
        load(path)


def test_a_hosts_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts.toml"
    path.write_text(
        '[a]\nssh = "root@a"\npower = "fence -o {action} \'x y\'"\ndangerous = true\n[b]\nlab = []\n'
    )
    first, second = load(path)
    assert first == Entry("a", ssh="root@a", power="fence -o {action} 'x y'", dangerous=True)
    assert first.power_command("off") == ["fence", "-o", "off", "x y"]
    assert second.lab == ()
    with pytest.raises(FleetError, match="b has no power command"):
        second.power_command("on")
    with pytest.raises(FleetError, match="cannot be read: No such file"):
        load(tmp_path / "none.toml")


def test_power_passes_the_action_and_the_status_on(fleet: Fleet) -> None:
    (fleet.folder / "hosts.toml").write_text("[one]\npower = \"sh -c 'echo did {action}; exit 4'\"\n")
    ended = fleet.end(fleet.start("power", "one", "off", "--hosts", "hosts.toml"))
    assert (ended.status, ended.text) == (4, "did off\n")
    ended = fleet.end(fleet.start("power", "two", "off", "--hosts", "hosts.toml"))
    assert (ended.status, ended.text) == (3, "kvmpy fleet: hosts.toml has no host two; there are one\n")


SSH = """#!/bin/sh
# Another machine: a home of its own, and nothing of this environment's paths.
test "$1" = root@far || exit 255
export HOME={home} XDG_CACHE_HOME={home}/cache
cd "$HOME"
exec sh -c "$2"
"""


def _far(fleet: Fleet) -> Path:
    home = fleet.folder / "far"
    (home / "cache").mkdir(parents=True)
    ssh = fleet.folder / "ssh"
    ssh.write_text(SSH.format(home=home))
    ssh.chmod(0o755)
    return home


def test_a_host_is_reached_by_ssh(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets certificate and pack, joins, runs the suite that it has itself, and leaves nothing running."""
    home = _far(fleet)
    monkeypatch.setenv("KVMPY_SSH", str(fleet.folder / "ssh"))
    packs.Writer().write(fleet.folder / "own.pack", "a compiler")
    (fleet.folder / "bad.pack").write_bytes(b"no pack")
    (fleet.folder / "hosts.toml").write_text(
        f'[far]\nssh = "root@far"\npython = "{sys.executable}"\npack = "own.pack"\n'
        f'[bad]\nssh = "root@far"\npython = "{sys.executable}"\npack = "bad.pack"\n'
        '[none]\nssh = "root@none"\n'
    )
    process = fleet.start(
        "run", "--hosts", "hosts.toml", "--json", "out.json", "cpuid/test_ioctls.py", "-k", "emulated"
    )
    ended = fleet.end(process)
    assert "none does not join" in ended.text, ended.text
    assert "bad does not join" in ended.text
    assert "guest.pack is no pack of guest programs" in ended.text
    assert fleet.left() == []
    far, bad, none = ended.report["hosts"]
    assert (far["name"], bad["name"], none["name"]) == ("far", "bad", "none")
    assert far["class"]
    assert none["retired"] == "it does not join"
    # A host without KVM has told that, and nothing went there.
    ran = [test for test in ended.report["tests"] if test["verdict"] in ("pass", "xfail")]
    assert ("kvm" in far["labels"]) == bool(ran)
    assert {test["host"] for test in ran} <= {"far"}
    folder = home / "cache" / "kvmpy" / "fleet-host" / "far"
    assert (folder / "guest.pack").read_bytes() == (fleet.folder / "own.pack").read_bytes()
    certificate = folder / "fleet.pem"
    assert certificate.stat().st_mode & 0o077 == 0


def test_a_host_that_somebody_has_is_not_used(fleet: Fleet) -> None:
    fleet.tests("def test_a():\n    pass\n")
    (fleet.folder / "hosts.toml").write_text(
        "[one]\nlocal = true\nlock = \"sh -c 'echo booked by somebody; exit 1'\"\n"
    )
    ended = fleet.run("--hosts", "hosts.toml")
    assert ended.status == 3
    assert "one is not to be had: booked by somebody" in ended.text


def test_a_lock_is_given_back(fleet: Fleet) -> None:
    fleet.tests("def test_a():\n    pass\n")
    log = fleet.folder / "log"
    (fleet.folder / "hosts.toml").write_text(
        f"[one]\nlocal = true\nlock = \"sh -c 'echo lock >> {log}'\"\n"
        f"unlock = \"sh -c 'echo unlock >> {log}'\"\n"
    )
    assert fleet.run("--hosts", "hosts.toml").status == 0
    assert log.read_text() == "lock\nunlock\n"


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "dask.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "fleet", "hosts"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'kvmpy[fleet]'" in done.stderr
