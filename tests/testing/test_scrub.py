# SPDX-License-Identifier: Apache-2.0
"""What is taken out of texts that are given away, and what is left in."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from kvmpy.testing import scrub
from kvmpy.testing.scrub import Scrubber

CHIP = bytes(range(64)).hex()


def scrubber(**names: str) -> Scrubber:
    return Scrubber(**{"host": "epyc7.lab.example", "user": "jdoe", "home": "/home/jdoe", **names}, known=())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "jdoe@epyc7: /home/jdoe/x on epyc7.lab.example, 10.1.2.3 (aa:BB:cc:00:11:22), jdoes epyc72",
            "<user>@<host>: ~/x on <host>, <ip> (<mac>), jdoes epyc72",
        ),
        ("EPYC7, Epyc7.Lab.Example and epyc7.other.example", "<host>, <host> and <host>"),
        ("build3.LAB.example, lab.example, mylab.example", "<host>, <host>, mylab.example"),
        ("AA-BB-CC-00-11-22 and 00-1b-21-3a-4f-5e", "<mac> and <mac>"),
        ("aabb.cc00.1122", "<mac>"),
        ("80:00:02:08:fe:80:00:00:00:00:00:00:00:02:c9:03:00:0a:0b:0c", "<mac>"),
        ("inet6 2001:db8::7/64, fe80::a00:27ff:fe4e:66a1%eth0", "inet6 <ip>/64, <ip>%eth0"),
        ("[2001:db8:0:1:2:3:4:5]:22, ::ffff:10.1.2.3", "[<ip>]:22, <ip>"),
        ("/home/other/.cache and /home/x:/home/y", "/home/<user>/.cache and /home/<user>:/home/<user>"),
        ("root=UUID=3f7a9c1e-0b2d-4c5e-8f90-1a2b3c4d5e6f ro", "root=UUID=<uuid> ro"),
        ("root=PARTUUID=1a2b3c4d-02, UUID=0A1B-2C3D", "root=PARTUUID=<uuid>, UUID=<uuid>"),
        ("3F7A9C1E-0B2D-4C5E-8F90-1A2B3C4D5E6F", "<uuid>"),
        ("usb 1-1: SerialNumber: 4C530001 ok", "usb 1-1: SerialNumber: <number> ok"),
        ('"serial_number": "WD-1234"', '"serial_number": "<number>"'),
        ("ip=dhcp console_password=hunter2 quiet", "ip=dhcp console_password=<secret> quiet"),
        (f"the report of {CHIP}", "the report of <64 bytes>"),
    ],
)
def test_what_names_somebody_is_taken_out(text: str, expected: str) -> None:
    assert scrubber().text(text.encode()).decode() == expected


@pytest.mark.parametrize(
    "text",
    [
        "6.18.2.1-rc1",
        "version 1.2.3",
        "0xffff:00",
        "300.1.1.1",
        "irq/test_a.py::test_b[snp]",
        "a ::1 and ::",
        "pci 0000:c1:00.1",
        "12:34:56",
        "2026-11-30 00:07:02",
        "std::dead::beef",
        "1234.5678.9012",
        "measurement " + "5a" * 48,
        "Serial: 8250/16550 driver, 32 ports",
        '{"token": 1}',
    ],
)
def test_what_names_nobody_stays(text: str) -> None:
    assert scrubber().string(text) == text


def test_nobody_special_is_not_taken_out() -> None:
    scrub = Scrubber(host="localhost", user="root", home="/root", known=())
    assert scrub.text(b"run as root on localhost") == b"run as root on localhost"


def test_json_stays_json() -> None:
    text = '{"a": "token=abc", "b": "/home/x", "c": "/home/y\\nz", "d": "UUID=0A1B-2C3D"}'
    expected = '{"a": "token=<secret>", "b": "/home/<user>", "c": "/home/<user>\\nz", "d": "UUID=<uuid>"}'
    assert scrubber().string(text) == expected


def test_this_machines_own_numbers_go_in_any_case() -> None:
    known = Scrubber(host="", user="", home="", known=["CZ1234AB", "5.9.10.11"])
    assert known.string("board cz1234ab at 5.9.10.11, XCZ1234AB") == "board <number> at <number>, XCZ1234AB"


def test_serial_numbers_are_those_of_dmi_cpu_and_disks(tmp_path: Path) -> None:
    for name, text in (
        ("class/dmi/id/product_serial", "CZ1234AB\n"),
        ("class/dmi/id/board_serial", "To Be Filled By O.E.M.\n"),
        ("class/dmi/id/chassis_asset_tag", "Default string\n"),
        ("class/dmi/id/board_name", "H12SSL-i\n"),
        ("devices/system/cpu/cpu0/topology/ppin", "0x2b1f3c4d5e6f708\n"),
        ("block/sda/device/serial", "  WD-99887766\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    result = scrub.serial_numbers(tmp_path, tmp_path / "machine-id")
    assert set(result) == {
        "CZ1234AB",
        "0x2b1f3c4d5e6f708",
        "2b1f3c4d5e6f708",
        "WD-99887766",
        "0123456789abcdef0123456789abcdef",
    }


def test_by_default_this_host_and_the_user_behind_sudo_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "jdoe")
    monkeypatch.setattr(scrub, "addresses", lambda: ["2001:db8::99"])
    monkeypatch.setattr(platform, "node", lambda: "epyc7")
    assert Scrubber().string("jdoe, 2001:DB8::99 on EPYC7") == "<user>, <number> on <host>"
    assert os.environ["SUDO_USER"] == "jdoe"
