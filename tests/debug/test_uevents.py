# SPDX-License-Identifier: Apache-2.0
"""What KVM's uevents say, taken apart without a kernel."""

from __future__ import annotations

import os

import pytest

from kvmpy.debug.watch.uevents import KvmUevent, UeventKind, why_unreachable

CREATED = {
    "ACTION": "change",
    "DEVPATH": "/devices/virtual/misc/kvm",
    "SUBSYSTEM": "misc",
    "CREATED": "13",
    "COUNT": "2",
    "EVENT": "create",
    "PID": "12193",
    "STATS_PATH": "/kvm/12193-8",
    "SEQNUM": "839",
}


def test_created() -> None:
    """All variables become typed values."""
    expected = KvmUevent(UeventKind.CREATE, 12193, 13, 2, "/kvm/12193-8", 839)
    assert KvmUevent.parse(CREATED) == expected
    assert expected.vm_fd == 8


def test_destroyed_without_debugfs() -> None:
    """STATS_PATH is absent where KVM has no debugfs."""
    fields = {**CREATED, "EVENT": "destroy"}
    del fields["STATS_PATH"]
    event = KvmUevent.parse(fields)
    assert event is not None
    assert (event.kind, event.stats_path, event.vm_fd) == (UeventKind.DESTROY, None, None)


@pytest.mark.parametrize(
    "other",
    [
        {"DEVPATH": "/devices/virtual/misc/fuse"},
        {"ACTION": "add"},
        {"DEVPATH": "/module/kvm", "ACTION": "add"},
    ],
)
def test_other_devices(other: dict[str, str]) -> None:
    """Events of other devices, and others of KVM's, are no VM's."""
    assert KvmUevent.parse({**CREATED, **other}) is None


def test_device_without_event() -> None:
    """A change of /dev/kvm that names no event (udevadm trigger) is no VM's."""
    fields = {key: value for key, value in CREATED.items() if key != "EVENT"}
    assert KvmUevent.parse(fields) is None


@pytest.mark.parametrize(
    ("kinds", "reachable"),
    [
        pytest.param([], True, id="none"),
        pytest.param(["net", "mnt", "pid"], True, id="net-only"),
        pytest.param(["user", "mnt"], True, id="user-only"),
        pytest.param(["net", "user"], False, id="both"),
        pytest.param(None, False, id="unknown"),
    ],
)
def test_kinds_of_namespaces(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str] | None, reachable: bool
) -> None:
    """In a kernel without network or user namespaces there is only the initial one: none has to be read."""

    def listdir(path: str) -> list[str]:
        if kinds is None:
            raise FileNotFoundError(path)
        return kinds

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "open", refuse)
    why = why_unreachable()
    assert (why is None) == reachable
