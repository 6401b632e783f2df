# SPDX-License-Identifier: Apache-2.0
"""Whatever dies, each loss is one verdict with the right name, and nothing runs twice or is missing."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections import Counter

import psutil
import pytest

from tests.fleet.conftest import Fleet

WAYS = {
    "worker": "os.kill(os.getppid(), signal.SIGKILL)\n    signal.pause()",
    "itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getppid(), signal.SIGSTOP)\n    signal.pause()",
    "family": "os.kill(psutil.Process().parent().ppid(), signal.SIGKILL)\n    signal.pause()",
    "exits": "os._exit(0)",
}


def _tests(ways: dict[str, str]) -> str:
    """Return tests: each ends as *ways* says, or well."""
    texts = []
    for name, way in ways.items():
        body = WAYS.get(way, "pass")
        limit = "@pytest.mark.timeout(1)\n" if way == "stopped" else ""
        texts.append(f"{limit}def {name}():\n    {body}\n")
    return "\n".join(texts)


def test_each_loss_has_its_name(fleet: Fleet, rng: random.Random) -> None:
    """Among eighty tests are some that kill their host, their process, or stop it."""
    ways = {f"test_{number:02}": "fine" for number in range(80)}
    for name, way in zip(rng.sample(list(ways), 8), [*list(WAYS)[:3], "exits"] * 2, strict=True):
        ways[name] = way
    fleet.tests(_tests(ways))
    ended = fleet.run("--local", "3", "--margin", "2")
    assert ended.status == 1, ended.text
    expected = {name: "pass" if way == "fine" else "lost" for name, way in ways.items()}
    assert ended.verdicts() == expected, ended.text
    assert fleet.starts() == Counter(dict.fromkeys(ways, 1))
    reasons = {ways[name]: ended.test(name)["reason"] for name in ended.lost()}
    assert "worker is gone" in reasons["worker"]
    assert "killed by signal 9" in reasons["itself"]
    assert "hung: no sign of life" in reasons["stopped"]
    assert "ended itself with status 0" in reasons["exits"]


def test_a_test_begins_when_its_start_is_on_the_disk(fleet: Fleet) -> None:
    fleet.tests(
        "import json\n"
        "@pytest.mark.parametrize('n', range(20))\n"
        "def test_known(n):\n"
        f"    lines = Path({str(fleet.journal)!r}).read_text().splitlines()\n"
        "    known = [json.loads(line) for line in lines if line]\n"
        "    begun = [event['nodeid'] for event in known if event['event'] == 'start']\n"
        "    assert any(name.endswith(f'test_known[{n}]') for name in begun)\n"
    )
    ended = fleet.run("--local", "2")
    assert ended.status == 0, ended.text
    assert Counter(ended.verdicts().values()) == {"pass": 20}


SERVER_DIES = """
@pytest.mark.parametrize("n", range(40))
def test_fine(n):
    pass

def test_kills_the_scheduler():
    run = psutil.Process().parent().parent().parent()
    server = next(each for each in run.children() if "serve" in each.cmdline())
    server.kill()
    signal.pause()

@pytest.mark.parametrize("n", range(40))
def test_later(n):
    pass
"""


def test_a_scheduler_that_is_killed_costs_what_ran(fleet: Fleet) -> None:
    fleet.tests(SERVER_DIES)
    first = fleet.run("--local", "2")
    assert first.status == 3, first.text
    assert "scheduler is gone" in first.text
    lost = first.lost()
    assert "test_kills_the_scheduler" in lost
    assert len(lost) <= 2
    done = set(first.verdicts())
    assert len(done) < 81
    second = fleet.run("--resume")
    assert second.status == 1, second.text
    assert second.lost() == lost
    assert len(second.verdicts()) == 81
    assert fleet.starts() == Counter(dict.fromkeys(second.verdicts(), 1))
    assert "came to its end" in fleet.run("--resume").text


def test_a_run_that_is_killed_is_gone_on_from(fleet: Fleet) -> None:
    """Its hosts end with it; the tests that ran are lost, by what the journal says alone."""
    fleet.tests(
        "@pytest.mark.parametrize('n', range(30))\n"
        "def test_fine(n):\n    pass\n\n"
        "def test_waits():\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'waits').touch()\n"
        "    signal.pause()\n"
    )
    process = fleet.begin("--local", "1", "--seed", "7")
    fleet.wait_for(fleet.folder / "waits")
    process.kill()
    fleet.end(process)
    assert fleet.left() == []
    ended = fleet.run("--resume")
    assert ended.lost() == ["test_waits"], ended.text
    assert "the run ended while it ran on" in ended.test("test_waits")["reason"]
    assert Counter(ended.verdicts().values()) == {"pass": 30, "lost": 1}
    assert fleet.starts() == Counter(dict.fromkeys(ended.verdicts(), 1))
    assert ended.report["seed"] == 7
    assert ended.status == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(fleet: Fleet, number: signal.Signals) -> None:
    fleet.tests(
        "def test_waits():\n    (Path(os.environ['FLEET_FOLDER']) / 'waits').touch()\n    signal.pause()\n"
    )
    process = fleet.begin("--local", "1")
    fleet.wait_for(fleet.folder / "waits")
    process.send_signal(number)
    ended = fleet.end(process)
    assert ended.status == 2, ended.text
    assert fleet.left() == []
    assert ended.verdicts() == {"test_waits": "lost"}
    assert "told to end" in ended.test("test_waits")["reason"]


def test_a_full_disk_ends_the_run_before_a_test_that_it_does_not_know(fleet: Fleet) -> None:
    fleet.tests(
        "def test_first():\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'first').touch()\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'full').open().close()\n\n"
        "@pytest.mark.parametrize('n', range(50))\n"
        "def test_later(n):\n"
        "    with (Path(os.environ['FLEET_FOLDER']) / 'later').open('a') as stream:\n"
        "        stream.write(f'test_later[{n}]\\n')\n"
    )
    os.mkfifo(fleet.folder / "full")
    process = fleet.begin("--local", "1")
    fleet.wait_for(fleet.folder / "first")
    room = fleet.journal.stat().st_size + 20_000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
    (fleet.folder / "full").open("w").close()
    ended = fleet.end(process)
    assert ended.status == 3, ended.text
    assert "File too large" in ended.text
    assert fleet.left() == []
    begun = [event for event in _whole(fleet) if event["event"] == "start"]
    ran = (fleet.folder / "later").read_text().split()
    assert 0 < len(ran) < 50
    assert set(ran) <= {str(event["nodeid"]).rpartition("::")[2] for event in begun}
    second = fleet.run("--resume")
    assert len(second.verdicts()) == 51
    again = (fleet.folder / "later").read_text().split()
    assert len(again) == len(set(again))


def _whole(fleet: Fleet) -> list[dict[str, object]]:
    """Return the events of a journal that may end in half a line."""
    events = []
    for line in fleet.journal.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def test_a_host_that_died_too_often_leaves_the_rest(fleet: Fleet) -> None:
    """The rest is not run, and says which host is missing; another run can go on with it."""
    ways = dict.fromkeys(("test_a", "test_b", "test_c"), "worker")
    fleet.tests(_tests({**ways, **{f"test_z{n}": "fine" for n in range(40)}}))
    (fleet.folder / "hosts.toml").write_text("[one]\nlocal = true\ndeaths = 1\n")
    ended = fleet.run("--hosts", "hosts.toml")
    assert ended.status == 1, ended.text
    assert ended.lost() == ["test_a", "test_b"]
    assert "it died 2 times" in ended.text
    assert "not run: 41 tests: no host left" in ended.text
    assert len(ended.report["not_run"]) == 41
    (host,) = ended.report["hosts"]
    assert (host["deaths"], host["name"]) == (2, "one")
    assert [name.rpartition("::")[2] for name in host["lost"]] == ["test_a", "test_b"]


def test_a_host_that_hangs_is_switched(fleet: Fleet) -> None:
    fleet.tests(_tests({"test_a": "stopped", "test_b": "fine"}))
    script = fleet.folder / "power"
    script.write_text(f"#!/bin/sh\necho $1 >> {fleet.folder / 'switched'}\n")
    script.chmod(0o755)
    console = "sh -c 'echo Kernel panic: not really; exec sleep 100'"
    (fleet.folder / "hosts.toml").write_text(
        f'[one]\nlocal = true\npower = "{script} {{action}}"\nconsole = "{console}"\n'
    )
    ended = fleet.run("--hosts", "hosts.toml", "--margin", "2")
    assert ended.verdicts() == {"test_a": "lost", "test_b": "pass"}, ended.text
    assert (fleet.folder / "switched").read_text() == "reboot\n"
    assert "Kernel panic: not really" in ended.test("test_a")["details"]


def test_a_power_command_that_is_none_costs_its_host_alone(fleet: Fleet) -> None:
    """The other host runs the rest."""
    fleet.tests(_tests({"test_a": "stopped", **{f"test_z{n}": "fine" for n in range(20)}}))
    (fleet.folder / "hosts.toml").write_text(
        '[one]\nlocal = true\npower = "/no/such/fence {action}"\n'
        '[two]\nlocal = true\npower = "/no/such/fence {action}"\n'
    )
    ended = fleet.run("--hosts", "hosts.toml", "--margin", "2")
    assert ended.status == 1, ended.text
    assert "/no/such/fence cannot be started: No such file or directory" in ended.text
    assert Counter(ended.verdicts().values()) == {"pass": 20, "lost": 1}


def test_what_a_host_by_itself_leaves_running_ends(fleet: Fleet) -> None:
    """Processes that a test leaves behind, and those of a join that is killed."""
    fleet.tests(
        "import subprocess\n"
        "def test_leaves():\n"
        "    subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "    (Path(os.environ['FLEET_FOLDER']) / 'left').touch()\n"
        "    signal.pause()\n"
    )
    fleet.serve()
    host = fleet.join("one")
    fleet.joined(1)
    process = fleet.begin()
    fleet.wait_for(fleet.folder / "left")
    os.kill(host.pid, signal.SIGKILL)
    host.wait()
    names = {each.pid for each in fleet.processes() if "sleep" in each.cmdline()}
    psutil.wait_procs([psutil.Process(pid) for pid in names], timeout=15)
    assert not [each for each in fleet.processes() if "sleep" in each.cmdline()]
    process.send_signal(signal.SIGTERM)
    fleet.end(process)
