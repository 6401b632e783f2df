# SPDX-License-Identifier: Apache-2.0
"""Takes out of texts what names a machine, a network or a person: by value what is known, or by form."""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

_NAMING_DMI = (
    "product_serial",
    "product_uuid",
    "board_serial",
    "board_asset_tag",
    "chassis_serial",
    "chassis_asset_tag",
)
_SERIAL_FILES = ("devices/system/cpu/cpu*/topology/ppin", "block/*/device/serial", "block/*/device/wwid")
# What firmware vendors write where they have no number.
_NO_SERIAL = re.compile(
    r"(?i)default string|to be filled.*|not (?:specified|available|present|applicable)|none|unknown|n/?a|"
    r"system serial number|(?:asset|chassis|base board|product).*|[0 .-]*|0x0+|0?123456789"
)
_SHORTEST, _SHORTEST_NUMBER = 3, 5
_WORD_START, _WORD_END = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])"

Replacement = bytes | Callable[[re.Match[bytes]], bytes]

_UUID = re.compile(rb"(?<![0-9A-Fa-f])[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")
# A file system's or partition's number may be shorter.
_SHORT_UUID = re.compile(rb"(?i)\b((?:PART)?UUID=)[0-9A-F-]{4,}")
_MAC = re.compile(
    rb"(?<![0-9A-Fa-f:-])[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4,18}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:-])"
)
_MAC_OF_DOTS = re.compile(rb"(?<![0-9A-Fa-f.])(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}(?![0-9A-Fa-f.])")
_IPV4 = re.compile(rb"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b(?!\.)")
_IPV6 = re.compile(rb"(?<![\w:.])(?=[0-9A-Fa-f.]*:)[0-9A-Fa-f:.]*[0-9A-Fa-f:](?![\w:])")
_HOME = re.compile(rb"(/home/)[^/\s:;,'\"<>\\]+")
_SERIAL = re.compile(rb"(?i)\b(serial[ _-]?(?:number|no\.?)|S/N)([\"']?\s*[:=]\s*)([\"']?)[^\s,;\"'\\]+")
_SECRET = re.compile(rb"(?i)\b([\w.-]*(?:passw|secret|token|credential)[\w.-]*=)[^\s\"'\\]+")
# As long as a chip's ID, which reports and errors about certificates show.
_CHIP = re.compile(rb"(?<![0-9A-Fa-f])[0-9A-Fa-f]{128}(?![0-9A-Fa-f])")


class Scrubber:
    """Takes host, user and network names, addresses, serial numbers and UUIDs out of texts.

    *known* are further words that name this machine (default :func:`serial_numbers` and :func:`addresses`).
    """

    def __init__(
        self,
        host: str | None = None,
        user: str | None = None,
        home: str | None = None,
        known: Iterable[str] | None = None,
    ) -> None:
        host = platform.node() if host is None else host
        home = str(Path.home()) if home is None else home
        users = _users() if user is None else [user]
        known = [*serial_numbers(), *addresses()] if known is None else known
        self._rules: list[tuple[re.Pattern[bytes], Replacement]] = []
        if len(home) >= _SHORTEST and home != "/root":
            self._word(home, b"~")
        self._rules += [(_UUID, b"<uuid>"), (_SHORT_UUID, rb"\1<uuid>"), (_SECRET, rb"\1<secret>")]
        for word in sorted({word for word in known if len(word) >= _SHORTEST}, key=len, reverse=True):
            self._word(word, b"<number>", any_case=True)
        self._host(host)
        for name in users:
            if len(name) >= _SHORTEST and name != "root":
                self._word(name, b"<user>")
        self._rules += [
            (_HOME, rb"\1<user>"),
            (_SERIAL, rb"\1\2\3<number>"),
            (_CHIP, b"<64 bytes>"),
            (_MAC, b"<mac>"),
            (_MAC_OF_DOTS, _hide_dots),
            (_IPV6, _hide_ipv6),
            (_IPV4, _hide_ipv4),
        ]

    def _word(self, word: str, new: bytes, *, any_case: bool = False, behind: str = "") -> None:
        pattern = _WORD_START + re.escape(word) + behind + _WORD_END
        self._rules.append((re.compile(pattern.encode(), re.IGNORECASE if any_case else 0), new))

    def _host(self, host: str) -> None:
        """Take out the host's name with any domain behind it, and others of its own domain."""
        short, _, domain = host.partition(".")
        if len(short) >= _SHORTEST and short.lower() != "localhost":
            self._word(short, b"<host>", any_case=True, behind=r"(?:\.[A-Za-z0-9][A-Za-z0-9-]*)*")
        for name in {domain, *_domains()} if host else ():
            if "." in name:
                pattern = rf"(?<![A-Za-z0-9_.-])(?:[A-Za-z0-9_-]+\.)*{re.escape(name)}" + _WORD_END
                self._rules.append((re.compile(pattern.encode(), re.IGNORECASE), b"<host>"))

    def text(self, data: bytes) -> bytes:
        """Return *data* without what names machine, network and people."""
        for pattern, new in self._rules:
            data = pattern.sub(new, data)
        return data

    def string(self, text: str) -> str:
        """Return *text* without what names machine, network and people."""
        return self.text(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


def serial_numbers(sys: Path = Path("/sys"), machine_id: Path = Path("/etc/machine-id")) -> list[str]:
    """Return the numbers that name this machine and its parts, as far as this user may read them."""
    files = [machine_id, *(sys / "class/dmi/id" / name for name in _NAMING_DMI)]
    for pattern in _SERIAL_FILES:
        files += sys.glob(pattern)
    names: set[str] = set()
    for file in files:
        with contextlib.suppress(OSError):
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            if len(text) >= _SHORTEST_NUMBER and not _NO_SERIAL.fullmatch(text):
                names |= {text, text.removeprefix("0x")}
    return sorted(names)


def addresses() -> list[str]:
    """Return the addresses of this host's interfaces that are no loopback ones."""
    results: set[str] = set()
    for name, entries in psutil.net_if_addrs().items():
        if name != "lo":
            results |= {entry.address.partition("%")[0] for entry in entries if entry.address}
    return sorted(word for word in results if set(word) - set("0:.f"))


def _domains() -> list[str]:
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    words = (line.split() for line in lines)
    return [name.strip(".") for line in words if line[:1] in (["search"], ["domain"]) for name in line[1:]]


def _users() -> list[str]:
    members = {os.environ.get(name, "") for name in ("SUDO_USER", "LOGNAME", "USER")}
    with contextlib.suppress(KeyError, OSError):
        members.add(getpass.getuser())
    return sorted(members)


def _hide_ipv4(match: re.Match[bytes]) -> bytes:
    # Versions such as 6.18.2.1 look the same; only what can be an address goes.
    parts = [int(part) for part in match[0].split(b".")]
    return b"<ip>" if all(part < 256 for part in parts) and parts[0] >= 10 else match[0]


def _hide_ipv6(match: re.Match[bytes]) -> bytes:
    try:
        address = ipaddress.IPv6Address(match[0].decode())
    except ValueError:
        return match[0]
    return match[0] if address.is_loopback or address.is_unspecified else b"<ip>"


def _hide_dots(match: re.Match[bytes]) -> bytes:
    # Digits alone may be a version or a figure.
    return b"<mac>" if re.search(rb"[A-Fa-f]", match[0]) else match[0]
