# SPDX-License-Identifier: Apache-2.0
"""The software AMD-SP's commands, below KVM and the ccp driver, on 4 MiB of memory of its own.

debugfs, folder softsev: ``command`` runs one, ``memory`` is what it may work on, ``memory_pfn`` where that
is, and ``rmpupdate`` changes the RMP's entries of its pages.  Structures: include/linux/psp-sev.h in Linux.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmpy import PAGE_SIZE, SIZE_2M, SevRet

FOLDER = Path("/sys/kernel/debug/softsev")
# The second of two pages of 2 MiB; the first has what a command needs beside, page by page.
LARGE = SIZE_2M // PAGE_SIZE
# The highest ASID of each kind: KVM gives out the lowest ones first.
SEV_ASID, ES_ASID = 64, 32
OUTSIDE = 1 << 38
"""A physical address where the lab has no memory."""

_COPY = (
    "handle:4 reserved:4 hdr_address:8 hdr_len:4 reserved2:4 guest_address:8 guest_len:4 reserved3:4"
    " trans_address:8 trans_len:4"
)
_UPDATE = "handle:4 reserved:4 address:8 len:4"
_DEBUG = "handle:4 reserved:4 src:8 dst:8 len:4"
_SNP_DEBUG = "gctx:8 src:8 dst:8"
# Number, and the buffer's fields with their sizes in bytes.
COMMANDS: dict[str, tuple[int, str]] = {
    "INIT": (0x01, "flags:4 reserved:4 tmr_address:8 tmr_len:4"),
    "SHUTDOWN": (0x02, ""),
    "FACTORY_RESET": (0x03, ""),
    "PLATFORM_STATUS": (0x04, "api_major:1 api_minor:1 state:1 flags:4 build:1 guests:4"),
    "PEK_GEN": (0x05, ""),
    "PEK_CSR": (0x06, "address:8 len:4"),
    "PEK_CERT_IMPORT": (0x07, "pek_address:8 pek_len:4 reserved:4 oca_address:8 oca_len:4"),
    "PDH_CERT_EXPORT": (0x08, "pdh_address:8 pdh_len:4 reserved:4 chain_address:8 chain_len:4"),
    "PDH_GEN": (0x09, ""),
    "DF_FLUSH": (0x0A, ""),
    "GET_ID": (0x0C, "address:8 len:4"),
    "INIT_EX": (0x0D, "len:4 flags:4 tmr_address:8 tmr_len:4 reserved:4 nv_address:8 nv_len:4"),
    "DECOMMISSION": (0x20, "handle:4"),
    "ACTIVATE": (0x21, "handle:4 asid:4"),
    "DEACTIVATE": (0x22, "handle:4"),
    "GUEST_STATUS": (0x23, "handle:4 policy:4 asid:4 state:1"),
    "LAUNCH_START": (
        0x30,
        "handle:4 policy:4 dh_address:8 dh_len:4 reserved:4 session_address:8 session_len:4",
    ),
    "LAUNCH_UPDATE_DATA": (0x31, _UPDATE),
    "LAUNCH_UPDATE_VMSA": (0x32, _UPDATE),
    "LAUNCH_MEASURE": (0x33, _UPDATE),
    "LAUNCH_SECRET": (0x34, _COPY),
    "LAUNCH_FINISH": (0x35, "handle:4"),
    "ATTESTATION": (0x36, "handle:4 reserved:4 address:8 nonce:16 len:4"),
    "SEND_START": (
        0x40,
        (
            "handle:4 policy:4 pdh_address:8 pdh_len:4 reserved:4 plat_address:8 plat_len:4 reserved2:4"
            " amd_address:8 amd_len:4 reserved3:4 session_address:8 session_len:4"
        ),
    ),
    "SEND_UPDATE_DATA": (0x41, _COPY),
    "SEND_UPDATE_VMSA": (0x42, _COPY),
    "SEND_FINISH": (0x43, "handle:4"),
    "SEND_CANCEL": (0x44, "handle:4"),
    "RECEIVE_START": (
        0x50,
        "handle:4 policy:4 pdh_address:8 pdh_len:4 reserved:4 session_address:8 session_len:4",
    ),
    "RECEIVE_UPDATE_DATA": (0x51, _COPY),
    "RECEIVE_UPDATE_VMSA": (0x52, _COPY),
    "RECEIVE_FINISH": (0x53, "handle:4"),
    "DBG_DECRYPT": (0x60, _DEBUG),
    "DBG_ENCRYPT": (0x61, _DEBUG),
    "SNP_INIT_EX": (0x85, "bits:4 reserved:4 list_address:8 reserved2:48"),
    "SNP_SHUTDOWN_EX": (0x86, "len:4 bits:4"),
    "SNP_PLATFORM_STATUS": (0x83, "address:8"),
    "SNP_DF_FLUSH": (0x84, ""),
    "SNP_DECOMMISSION": (0x90, "gctx:8"),
    "SNP_ACTIVATE": (0x91, "gctx:8 asid:4"),
    "SNP_GUEST_STATUS": (0x92, "gctx:8 address:8"),
    "SNP_GCTX_CREATE": (0x93, "gctx:8"),
    "SNP_GUEST_REQUEST": (0x94, "gctx:8 request:8 response:8"),
    "SNP_LAUNCH_START": (0xA0, "gctx:8 policy:8 ma_gctx:8 bits:4 tsc:4 gosvw:16"),
    "SNP_LAUNCH_UPDATE": (0xA1, "gctx:8 bits:4 reserved:4 address:8 perms:4 reserved2:4"),
    "SNP_LAUNCH_FINISH": (0xA2, "gctx:8 id_block:8 id_auth:8 bits:8 host_data:32"),
    "SNP_DBG_DECRYPT": (0xB0, _SNP_DEBUG),
    "SNP_DBG_ENCRYPT": (0xB1, _SNP_DEBUG),
    "SNP_PAGE_RECLAIM": (0xC7, "address:8"),
    "SNP_PAGE_UNSMASH": (0xC8, "address:8"),
    "SNP_CONFIG": (0xC9, "tcb:8 bits:4 reserved:52"),
    "SNP_COMMIT": (0xCB, "len:4"),
    "SNP_VLEK_LOAD": (0xCD, "len:4 version:1 reserved:3 address:8"),
    "SNP_FEATURE_INFO": (0xCE, "len:4 ecx:4 address:8"),
}

_IMMUTABLE = frozenset({"firmware", "context", "pre-guest"})


class BenchError(AssertionError):
    """The bench could not be set up: a command that had to succeed did not."""


def fields_of(command: str) -> dict[str, int]:
    """Return the names of a command's fields, in their order, with their sizes."""
    parts = (part.partition(":") for part in COMMANDS[command][1].split())
    return {name: int(size) for name, _, size in parts}


class Bench:
    """Runs commands; keeps what it made of guests and pages, for :meth:`reset`."""

    def __init__(self) -> None:
        self._memory = os.open(FOLDER / "memory", os.O_RDWR | os.O_CLOEXEC)
        self.base = int((FOLDER / "memory_pfn").read_text(encoding="ascii"), 16) * PAGE_SIZE
        self.guests: list[int] = []
        self._pages: dict[int, str] = {}
        self._large: set[int] = set()

    def close(self) -> None:
        """Give back what was made, and close the memory."""
        self.reset()
        os.close(self._memory)

    # Commands.

    def run(self, command: str, **values: int) -> tuple[SevRet, dict[str, int]]:
        """Run *command*; return its status, and the fields of its buffer as they are then."""
        number, _ = COMMANDS[command]
        sizes = fields_of(command)
        assert values.keys() <= sizes.keys(), values.keys() - sizes.keys()
        raw = struct.pack("<I", number)
        raw += b"".join(values.get(name, 0).to_bytes(size, "little") for name, size in sizes.items())
        fd = os.open(FOLDER / "command", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, raw)
            answer = os.pread(fd, len(raw), 0)
        finally:
            os.close(fd)
        offset, after = 4, {}
        for name, size in sizes.items():
            after[name] = int.from_bytes(answer[offset : offset + size], "little")
            offset += size
        return SevRet(struct.unpack_from("<I", answer)[0]), after

    def must(self, command: str, **values: int) -> dict[str, int]:
        """Run a command that has to succeed, and return its fields."""
        status, after = self.run(command, **values)
        if status:
            raise BenchError(f"{command} of the set-up fails with {status.name}: {values}")
        return after

    # Memory.

    def address(self, page: int, offset: int = 0) -> int:
        """Return the physical address of a page of the bench."""
        return self.base + page * PAGE_SIZE + offset

    def write(self, page: int, data: bytes) -> None:
        """Write to a page, whoever owns it."""
        os.pwrite(self._memory, data, page * PAGE_SIZE)

    def read(self, page: int, size: int = PAGE_SIZE) -> bytes:
        """Read a page, whoever owns it."""
        return os.pread(self._memory, size, page * PAGE_SIZE)

    def _rmpupdate(self, page: int, text: str) -> None:
        fd = os.open(FOLDER / "rmpupdate", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, f"{page} {text}\n".encode())
        finally:
            os.close(fd)

    def page(
        self, page: int, state: str, *, asid: int = 0, gpa: int | None = None, large: bool = False
    ) -> None:
        """Bring a page into a state: hypervisor, reclaim, firmware, pre-guest, guest-invalid, context.

        *gpa* is the guest's address of the page, its place in the bench unless given.
        """
        self.release(page)
        if state == "hypervisor":
            return
        owned = state in ("pre-guest", "guest-invalid")
        where = page * PAGE_SIZE if gpa is None else gpa
        immutable = int(state in _IMMUTABLE)
        self._rmpupdate(page, f"{where if owned else 0:x} {asid if owned else 0} 1 {int(large)} {immutable}")
        self._pages[page] = state
        if large:
            self._large.add(page)
        if state == "context":
            self.must("SNP_GCTX_CREATE", gctx=self.address(page))

    def release(self, page: int) -> None:
        """Give a page back to the hypervisor."""
        state = self._pages.pop(page, None)
        if state is None:
            return
        if state == "context":
            self.must("SNP_DECOMMISSION", gctx=self.address(page))
        large = page in self._large
        self.must("SNP_PAGE_RECLAIM", address=self.address(page) | int(large))
        self._rmpupdate(page, f"0 0 0 {int(large)} 0")
        self._large.discard(page)

    def changed(self, page: int, state: str) -> None:
        """Note that a command has changed the state of a page."""
        self._pages[page] = state

    def joined(self) -> None:
        """Note that a command has made one page of the first 2 MiB."""
        self._pages = {0: "pre-guest"}
        self._large = {0}

    # The platform.

    def drop_guests(self) -> None:
        """Decommission all guests of the legacy commands that were made here."""
        for handle in self.guests:
            self.run("DEACTIVATE", handle=handle)
            self.must("DECOMMISSION", handle=handle)
        self.guests.clear()

    def drop_pages(self) -> None:
        """Give all pages back to the hypervisor."""
        for page in list(self._pages):
            self.release(page)

    def reset(self) -> None:
        """Take back guests, pages and what SNP_CONFIG may have set."""
        self.drop_guests()
        self.drop_pages()
        self.must("SNP_CONFIG")
        self.must("DF_FLUSH")

    def init(self, *, es: bool = True) -> None:
        """Initialise SEV as the driver does; its first 2 MiB are the TMR meanwhile."""
        if es:
            self.page(0, "firmware", large=True)
        self.must("INIT", flags=int(es), tmr_address=self.base if es else 0, tmr_len=SIZE_2M if es else 0)
        if es:
            self.release(0)
        self.must("DF_FLUSH")

    @contextmanager
    def uninitialised(self) -> Iterator[None]:
        """Shut SEV down; initialise it again afterwards, and SNP where it is no more.  The RMP stays."""
        self.drop_guests()
        self.must("SHUTDOWN")
        try:
            yield
        finally:
            self.guests.clear()
            self.must("SHUTDOWN")
            status, _ = self.run("SNP_INIT_EX")
            assert status in (SevRet.SEV_RET_SUCCESS, SevRet.SEV_RET_INVALID_PLATFORM_STATE), status.name
            self.drop_pages()
            self.init()

    @contextmanager
    def without_es(self) -> Iterator[None]:
        """Initialise SEV without SEV-ES meanwhile."""
        with self.uninitialised():
            self.init(es=False)
            yield

    @contextmanager
    def without_snp(self) -> Iterator[None]:
        """Shut SEV and SNP down, for which contexts are decommissioned; initialise both again afterwards."""
        for page in [page for page, state in self._pages.items() if state == "context"]:
            self.must("SNP_DECOMMISSION", gctx=self.address(page))
            self._pages[page] = "firmware"
        with self.uninitialised():
            self.must("DF_FLUSH")
            self.must("SNP_SHUTDOWN_EX", len=8)
            yield
