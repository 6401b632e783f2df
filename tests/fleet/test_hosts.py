# SPDX-License-Identifier: Apache-2.0
"""Who may join, what hosts offer, and how tests are spread over them or run on each class of them."""

from __future__ import annotations

import os
import socket
import ssl
from collections import Counter
from pathlib import Path

import pytest

from tests.fleet.conftest import Fleet

LABELLED = """
@pytest.mark.requires("tool:only-a")
def test_a():
    assert os.environ["FLEET_HOST"] == "a"

@pytest.mark.requires("tool:only-b")
def test_b():
    assert os.environ["FLEET_HOST"] == "b"

@pytest.mark.requires("tool:only-a", "tool:only-b")
def test_both():
    pass

@pytest.mark.requires("tool:nowhere")
def test_nowhere():
    pass

@pytest.mark.dangerous
def test_dangerous():
    pass

@pytest.mark.parametrize("n", range(20))
def test_any(n):
    pass
"""


@pytest.fixture
def two(fleet: Fleet) -> Fleet:
    """A fleet of two hosts, each with a tool of its own; b is an emulated platform."""
    fleet.serve()
    for name in ("a", "b"):
        tools = fleet.folder / name
        tools.mkdir()
        (tools / f"only-{name}").write_text("#!/bin/sh\n")
        (tools / f"only-{name}").chmod(0o755)
        platform = {"KVMPY_PLATFORM": "lab, software AMD-SP"} if name == "b" else {}
        fleet.join(name, PATH=f"{tools}:{os.environ['PATH']}", FLEET_HOST=name, **platform)
    fleet.joined(2)
    fleet.tests(LABELLED)
    return fleet


def test_a_test_goes_where_it_can_run(two: Fleet) -> None:
    """What no host can run is skipped with what none has together, and does not wait."""
    ended = two.end(two.begin("--seed", "3"))
    assert ended.status == 0, ended.text
    assert Counter(ended.verdicts().values()) == {"pass": 23, "skip": 2}
    assert ended.test("test_both")["reason"] == (
        "no host of this fleet has tool:only-a together with tool:only-b"
    )
    assert ended.test("test_nowhere")["reason"] == "no host of this fleet has tool:nowhere"
    assert {ended.test(f"test_{name}")["host"] for name in "ab"} == {"a", "b"}
    # An emulated platform is one in each of its verdicts, and in the whole report.
    assert ended.test("test_b")["platform"] == "lab, software AMD-SP"
    assert ended.test("test_a")["platform"] == "host"
    assert ended.report["platform"] in ("host; lab, software AMD-SP", "lab, software AMD-SP; host")
    assert "# test_b (lab, software AMD-SP, on b)" in (two.folder / "out.ktap").read_text()
    # An emulated one is not endangered.
    assert ended.test("test_dangerous")["host"] == "b"
    assert two.starts() == Counter(
        {name: 1 for name, verdict in ended.verdicts().items() if verdict == "pass"}
    )
    labels = {host["name"]: host["labels"] for host in ended.report["hosts"]}
    assert labels == {"a": ["tool:only-a"], "b": ["dangerous", "tool:only-b"]}


def test_a_matrix_runs_each_test_on_each_class(two: Fleet) -> None:
    two.join("a2", PATH=f"{two.folder / 'a'}:{os.environ['PATH']}", FLEET_HOST="a")
    two.joined(3)
    ended = two.end(two.begin("--matrix", "--html", "out.html"))
    assert ended.status == 0, ended.text
    titles = list(ended.report["reports"])
    assert len(titles) == 2
    (emulated,) = [title for title in titles if "(lab, software AMD-SP)" in title]
    (real,) = set(titles) - {emulated}
    for title, own, other in ((real, "a", "b"), (emulated, "b", "a")):
        verdicts = ended.verdicts(title)
        assert len(verdicts) == 25
        assert verdicts[f"test_{own}"] == "pass"
        assert verdicts[f"test_{other}"] == "skip"
        assert f"only-{other}" in ended.test(f"test_{other}", title)["reason"]
    assert ended.verdicts(real)["test_dangerous"] == "skip"
    assert {host["name"] for host in ended.report["reports"][real]["hosts"]} == {"a", "a2"}
    starts = two.starts()
    assert set(starts.values()) == {1}
    assert sum(starts.values()) == 21 + 22
    assert "# Subtest: " in (two.folder / "out.ktap").read_text()
    assert "software AMD-SP" in (two.folder / "out.html").read_text()


def test_a_column_keeps_what_it_had_when_its_hosts_are_gone(two: Fleet) -> None:
    two.tests(
        "def test_first():\n    pass\n\n"
        "def test_kills():\n"
        "    if os.environ['FLEET_HOST'] == 'b':\n"
        "        os.kill(psutil.Process().parent().ppid(), signal.SIGKILL)\n"
        "        signal.pause()\n\n"
        "@pytest.mark.parametrize('n', range(40))\n"
        "def test_later(n):\n    pass\n"
    )
    process = two.begin("--matrix", "--wait", "5")
    # Whoever killed the whole host's join: nobody brings it back.
    ended = two.end(process)
    reports = ended.report["reports"]
    (dead,) = [title for title in reports if "software" in title]
    (alive,) = set(reports) - {dead}
    assert len(reports[alive]["tests"]) == 42
    assert {test["verdict"] for test in reports[alive]["tests"]} == {"pass"}
    assert ended.test("test_kills", dead)["verdict"] == "lost"
    done = len(reports[dead]["tests"])
    assert len(reports[dead]["not_run"]) == 42 - done > 0
    assert list(reports[dead]["not_run_because"]) == [f"no host left with {dead}"]
    assert ended.status == 1


def test_only_hosts_with_a_label_are_used(two: Fleet) -> None:
    ended = two.end(two.begin("--on", "tool:only-b"))
    assert {test["host"] for test in ended.report["tests"]} <= {"b", ""}
    assert ended.verdicts()["test_a"] == "skip"
    assert ended.verdicts()["test_b"] == "pass"
    none = two.end(two.begin("--on", "snp", "--journal", str(two.folder / "second.jsonl")))
    assert none.status == 3
    assert "it has not snp (--on)" in none.text


def test_a_second_run_is_refused_while_there_is_one(two: Fleet) -> None:
    two.tests(
        "def test_waits():\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'waits').touch()\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'go').open().close()\n"
    )
    os.mkfifo(two.folder / "go")
    first = two.begin()
    two.wait_for(two.folder / "waits")
    assert "a run uses it" in two.end(two.start("status")).text
    second = two.end(two.start("run", "./test_own.py", "--journal", str(two.folder / "second.jsonl")))
    assert second.status == 3
    assert "another run has this fleet" in second.text
    (two.folder / "go").open("w").close()
    assert two.end(first).status == 0
    assert "no run uses it" in two.end(two.start("status")).text


def test_hosts_are_listed_with_what_they_are(two: Fleet) -> None:
    text = two.hosts()
    assert "a  (tls://" in text
    assert "platform lab, software AMD-SP (emulated)" in text


def test_a_host_ends_with_its_fleet(fleet: Fleet) -> None:
    server = fleet.serve()
    host = fleet.join("one")
    fleet.joined(1)
    server.terminate()
    assert fleet.end(server).status == 0
    assert fleet.end(host).status == 0
    assert fleet.left() == []


# ---- who may join


def test_another_fleets_certificate_is_refused(fleet: Fleet) -> None:
    from kvmpy.fleet import wire

    wire.need()
    fleet.serve()
    other = fleet.folder / "other.pem"
    wire.make(other)
    address = (fleet.served / "address").read_text().strip()
    host = fleet.end(fleet.start("join", address, "--certificate", str(other)))
    assert host.status == 3
    assert "certificate does not fit" in host.text
    for words in (["hosts"], ["run", "./test_own.py"]):
        fleet.tests("def test_a():\n    pass\n")
        asked = fleet.end(fleet.start(*words, "--at", address, "--certificate", str(other)))
        assert asked.status == 3
        assert "certificate does not fit" in asked.text
    assert "0 hosts" in fleet.end(fleet.start("status")).text


def test_a_plain_connection_gets_nothing(fleet: Fleet) -> None:
    fleet.serve()
    address = (fleet.served / "address").read_text().strip()
    host, _, port = address.removeprefix("tls://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"\x00" * 64)
        plain.settimeout(20)
        try:
            answer = plain.recv(1000)
        except ConnectionResetError:
            answer = b""
    # At most a TLS alert.
    assert answer[:1] in (b"", b"\x15")
    assert len(answer) < 16
    # TLS without a certificate of the fleet is no better.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        try:
            with context.wrap_socket(raw) as foreign:
                foreign.sendall(b"\x00" * 64)
                answer = foreign.recv(1000)
        except OSError:
            answer = b""
    assert answer == b""
    refused = fleet.end(fleet.start("join", f"tcp://{host}:{port}"))
    assert refused.status == 3
    assert "TLS only" in refused.text


def test_who_listens_nowhere_is_not_joined(fleet: Fleet) -> None:
    from kvmpy.fleet import wire

    wire.need()
    pem = fleet.folder / "fleet.pem"
    wire.make(pem)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        ended = fleet.end(fleet.start("join", address, "--certificate", str(pem)))
    assert ended.status == 3
    assert "cannot join" in ended.text
    assert "nobody listens there" in ended.text


def test_the_key_is_for_this_user_alone(fleet: Fleet) -> None:
    fleet.serve()
    assert (fleet.served / "fleet.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Not a directory|No such file|copy fleet.pem"),
        ("nonsense", "is no certificate with its key"),
        ("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "is no certificate with its key"),
    ],
)
def test_a_certificate_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    from kvmpy.fleet import wire
    from kvmpy.fleet.errors import FleetError

    wire.need()
    path = tmp_path / "fleet.pem"
    if content:
        path.write_text(content)
    with pytest.raises(FleetError, match=message):
        wire.security(path)


@pytest.mark.parametrize("text", ["rack1", "rack1:", "rack1:0", "rack1:99999", ":1", "tcp://rack1:1"])
def test_an_address_that_is_none(text: str) -> None:
    from kvmpy.fleet import wire
    from kvmpy.fleet.errors import FleetError

    with pytest.raises(FleetError, match=r"is no address|TLS only"):
        wire.full_address(text)
