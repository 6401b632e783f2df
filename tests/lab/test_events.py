# SPDX-License-Identifier: Apache-2.0
"""Events from inside the lab: what is none, or is not as it should be, ends no run and fills no disk."""

from __future__ import annotations

import base64
import copy
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from kvmpy.lab import events, programs, records
from kvmpy.lab.events import BadEventError, Start, parse
from tests.lab.test_session import Lab, lab

__all__ = ["lab"]

NODE = "selftests/area/test_a.py::test_{}".format
TEST = {
    "nodeid": NODE("a"),
    "location": ["selftests/area/test_a.py", 1, "test_a"],
    "keywords": {"test_a": 1},
    "outcome": "failed",
    "longrepr": {
        "reprcrash": {"path": "a.py", "lineno": 3, "message": "boom"},
        "reprtraceback": {
            "reprentries": [
                {
                    "type": "ReprEntry",
                    "data": {
                        "lines": [">   boom()"],
                        "reprfuncargs": {"args": []},
                        "reprlocals": None,
                        "reprfileloc": {"path": "a.py", "lineno": 3, "message": "boom"},
                        "style": "long",
                    },
                }
            ],
            "extraline": None,
            "style": "long",
        },
        "sections": [],
        "chain": None,
    },
    "when": "call",
    "sections": [["stdout", "text"]],
    "duration": 0.1,
    "start": 0.0,
    "stop": 0.1,
    "user_properties": [],
    "kvmpy": {"promise": "it boots", "protection": "none", "missing": [["a", "b"]], "rss": 4096},
    "$report_type": "TestReport",
}


def line(kind: str, **values: object) -> bytes:
    return json.dumps({"event": kind, **values}).encode()


def piece(text: bytes, name: str = "a.rec", last: bool = True) -> events.Record:
    data = base64.b64encode(zlib.compress(text)).decode()
    event = parse(line("record", name=name, first=True, last=last, data=data))
    assert isinstance(event, events.Record)
    return event


@pytest.mark.parametrize(
    "text", [b'{"event": "sta', b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"event": 5}']
)
def test_what_is_no_event_is_left_out(text: bytes) -> None:
    assert parse(text) is None


def test_a_start_without_a_place_has_the_place_that_its_name_tells() -> None:
    event = parse(line("start", nodeid="a/test_b.py::test_c[x]", limit=5))
    assert isinstance(event, Start)
    assert event.place == ("a/test_b.py", None, "test_c[x]")
    assert event.limit == 5


@pytest.mark.parametrize(
    "text",
    [
        line("start"),
        line("start", nodeid=""),
        line("start", nodeid="a", location=["a"]),
        line("start", nodeid="a", limit="long"),
        line("start", nodeid="a", limit=-1),
        line("ready", number="1"),
        line("collected", number=1, ids=[1]),
        line("finish", nodeid=None),
        line("report", nodeid="a"),
        line("host", summary={"kernel": 5}),
        line("program", key="../../x", recipe={}),
        line("record", name="../x.rec", first=True, last=True, data=""),
        line("record", name=".x.rec", first=True, last=True, data=""),
        line("record", name="x.rec", first=True, last="no", data=""),
        line("exit", status="5"),
        line("uncompiled", files="a.py"),
    ],
)
def test_an_event_that_is_not_as_it_should_be_is_named(text: bytes) -> None:
    with pytest.raises(BadEventError, match=str(json.loads(text)["event"])):
        parse(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nodeid", 5),
        ("outcome", "fine"),
        ("when", "???"),
        ("location", None),
        ("longrepr", ["a"]),
        ("longrepr", {"reprcrash": {}}),
        ("sections", [["one"]]),
        ("duration", "long"),
        ("kvmpy", {"missing": [["one"]]}),
        ("kvmpy", 5),
        ("$report_type", "CollectReport"),
        ("$report_type", "Report"),
    ],
)
def test_a_report_that_cannot_be_shown(pytestconfig: pytest.Config, field: str, value: object) -> None:
    assert events.deserialize(copy.deepcopy(TEST), "TestReport").longreprtext
    with pytest.raises(BadEventError):
        events.deserialize({**copy.deepcopy(TEST), field: value}, "TestReport")


def mutate(value: Any, choose: random.Random) -> Any:
    """Return *value* with one thing in it changed."""
    if isinstance(value, (dict, list)) and value and choose.random() < 0.9:
        key = choose.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if choose.random() < 0.2:
            del value[key]
        else:
            value[key] = mutate(value[key], choose)
        return value
    return choose.choice([None, -1, 1e300, "", "x" * 5000, [], {}, [[]], {"": None}, True, "\x00/..", value])


def test_mutated_reports_are_reports_or_refused(pytestconfig: pytest.Config) -> None:
    """Whatever is taken can be printed; seeds that failed once are among those that run."""
    taken = 0
    for seed in range(2000):
        data = mutate(copy.deepcopy(TEST), random.Random(seed))
        if not isinstance(data, dict):
            continue
        try:
            report = events.deserialize(data, "TestReport")
        except BadEventError:
            continue
        assert isinstance(report.longreprtext, str), seed
        taken += 1
    assert 0 < taken < 2000


def test_a_piece_that_unpacks_into_too_much(tmp_path: Path) -> None:
    records.receive(tmp_path, piece(bytes(1 << 18)), 0)
    with pytest.raises(BadEventError, match="more than 262144 bytes"):
        records.receive(tmp_path, piece(bytes(1 << 24)), 0)
    assert (tmp_path / "a.rec").stat().st_size == 1 << 18


def test_a_record_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_SIZE", 1 << 20)
    first = piece(bytes(1 << 18), last=False)
    more = events.Record(first.name, False, False, first.data)
    for event in (first, more, more, more):
        records.receive(tmp_path, event, 0)
    with pytest.raises(BadEventError, match=r"a\.rec is longer than 1 MiB"):
        records.receive(tmp_path, more, 0)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 1 << 20


@pytest.mark.parametrize("data", ["?", "AAAA", base64.b64encode(zlib.compress(b"x")[:-2]).decode()])
def test_a_piece_that_is_damaged(tmp_path: Path, data: str) -> None:
    with pytest.raises(BadEventError, match=r"a piece of a\.rec"):
        records.receive(tmp_path, events.Record("a.rec", True, True, data), 0)


@pytest.mark.parametrize(
    "flag", ["-fplugin=x", "-wrapper", "-include/etc/shadow", "@/etc/shadow", "-B/tmp", "-I/"]
)
def test_the_host_takes_no_option_of_gcc_that_reaches_further(tmp_path: Path, flag: str) -> None:
    recipe = {"name": "x", "files": [], "cflags": [flag]}
    assert not programs.harmless(recipe)
    assert programs.harmless({**recipe, "cflags": ["-DX=1", "-O2", "-Wno-format", "-mavx", "-g"]})


def test_nonsense_costs_the_test_that_runs_and_the_rest_runs_on(lab: Lab) -> None:
    """A start without a location is one; each of the others ends its machine, and no more."""
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    nonsense = {
        "b": line("start", location=5),
        "c": line("finish", nodeid=NODE("a")),
        "d": line("report", data={**TEST, "nodeid": NODE("d"), "longrepr": {"reprcrash": {}}}),
        "e": line("record", name="e.rec", first=True, last=True, data=bomb),
        "f": line("done", number=1),
        "g": line("ready", number=1),
        "h": line("collected", number=7, ids=[]),
    }
    lab.tests(*(f"test_{letter}" for letter in "abcdefgh"))
    first = [
        ["say", line("start", nodeid=NODE("a"), limit=1).decode()],
        *(
            ["say", line("report", data={**TEST, "nodeid": NODE("a"), "when": when}).decode()]
            for when in PHASES
        ),
        ["say", line("finish", nodeid=NODE("a")).decode()],
    ]
    boots = [
        [*(first if letter == "b" else []), ["start", f"test_{letter}"], ["say", text.decode()], ["hang"]]
        for letter, text in nonsense.items()
    ]
    ended = lab.run(boots, "--record", "all", "--record-dir", "records", grace=60.0)
    assert ended.status == 1, ended.text
    assert ended.verdicts() == {"test_a": "fail", **{f"test_{letter}": "lost" for letter in nonsense}}
    for letter in nonsense:
        assert "the session inside is not to be trusted" in ended.test(f"test_{letter}")["reason"], letter
    assert list((lab.folder / "records").iterdir()) == []


PHASES = ("setup", "call", "teardown")
