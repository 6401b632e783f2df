# SPDX-License-Identifier: Apache-2.0
"""A model of the reverse map table (RMP): who owns a page of system memory, who may change that, who may
write.

AMD APM volume 2, 15.36 (SEV-SNP), volume 3 (RMPUPDATE, PSMASH, PVALIDATE, RMPADJUST), and chapter 5 of the
SEV Secure Nested Paging Firmware ABI (page states). It needs no host: tests follow with it what they do to
a guest, and compare the RMP that the lab's software AMD-SP shows.

Pages are named by system page frame numbers (*pfn*); an entry of 2 MiB covers 512 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

PAGES_2M = 512
PAGE_SIZE = 4096
ALL_PERMISSIONS = 0xF
_NONE = (0, 0, 0, 0)
_VMPL0_ONLY = (ALL_PERMISSIONS, 0, 0, 0)


class PageState(Enum):
    """The states that the Firmware ABI names; an entry is always in exactly one."""

    HYPERVISOR = "hypervisor"
    FIRMWARE = "firmware"
    CONTEXT = "context"
    METADATA = "metadata"
    RECLAIM = "reclaim"
    PRE_GUEST = "pre-guest"
    PRE_SWAP = "pre-swap"
    GUEST_INVALID = "guest-invalid"
    GUEST_VALID = "guest-valid"


class Result(IntEnum):
    """What the instructions leave in EAX; *NO_UPDATE* stands for PVALIDATE's carry flag."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4
    FAIL_SIZEMISMATCH = 6
    FAIL_BADADDR = 7
    NO_UPDATE = 255


class Access(Enum):
    """How an access ends."""

    ALLOWED = "allowed"
    RMP_FAULT = "a page fault with the RMP bit, or a nested one"
    NOT_VALIDATED = "#VC with error code 0x404 in the guest"
    VMPL_FAULT = "a nested page fault with the VMPL bit"


@dataclass(frozen=True)
class Entry:
    """One RMP entry: *gpa* in bytes, *large* for 2 MiB, permissions of VMPL 0 to 3 (r 1, w 2, ux 4, sx 8)."""

    assigned: bool = False
    gpa: int = 0
    asid: int = 0
    large: bool = False
    immutable: bool = False
    validated: bool = False
    vmsa: bool = False
    permissions: tuple[int, int, int, int] = _NONE

    @property
    def state(self) -> PageState:
        """The Firmware ABI's name of the state."""
        if not self.assigned:
            return PageState.HYPERVISOR
        if self.asid:
            if self.immutable:
                return PageState.PRE_SWAP if self.validated else PageState.PRE_GUEST
            return PageState.GUEST_VALID if self.validated else PageState.GUEST_INVALID
        if not self.immutable:
            return PageState.RECLAIM
        if self.vmsa:
            return PageState.CONTEXT
        return PageState.METADATA if self.gpa else PageState.FIRMWARE


HYPERVISOR_OWNED = Entry()


class Rmp:
    """The table of a machine with *pages* pages; every page begins as the hypervisor's."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a machine has at least one page, not {pages}")
        self.pages = pages
        self._entries: dict[int, Entry] = {}

    # ---- looking

    def _checked(self, pfn: int) -> int:
        if not 0 <= pfn < self.pages:
            raise ValueError(f"pfn {pfn:#x} is beyond the {self.pages:#x} pages of the table")
        return pfn

    def lookup(self, pfn: int) -> Entry:
        """Return the entry that covers *pfn*; that of a large one names the whole 2 MiB."""
        head = self._checked(pfn) & -PAGES_2M
        covering = self._entries.get(head)
        if covering is not None and covering.large:
            return covering
        return self._entries.get(pfn, HYPERVISOR_OWNED)

    def owned_gpa(self, pfn: int) -> int | None:
        """Return the guest-physical address that *pfn* is assigned to, None when it is not a guest's."""
        entry = self.lookup(pfn)
        if not entry.assigned or not entry.asid:
            return None
        return entry.gpa + (pfn % PAGES_2M * PAGE_SIZE if entry.large else 0)

    def assigned(self) -> Iterator[tuple[int, Entry]]:
        """Yield the entries that are not the hypervisor's, by pfn."""
        yield from sorted((pfn, entry) for pfn, entry in self._entries.items() if entry.assigned)

    def _inside(self, pfn: int) -> Iterator[int]:
        """Yield the 4 KiB entries that are assigned within the 2 MiB at *pfn*."""
        if len(self._entries) < PAGES_2M:
            yield from (own for own in self._entries if pfn <= own < pfn + PAGES_2M)
        else:
            yield from (own for own in range(pfn, pfn + PAGES_2M) if own in self._entries)

    # ---- the host's instructions

    def rmpupdate(
        self,
        pfn: int,
        *,
        assigned: bool,
        gpa: int = 0,
        asid: int = 0,
        large: bool = False,
        immutable: bool = False,
    ) -> Result:
        """Give a page to a guest (*asid*) or to the firmware (*asid* 0), or take it back.

        It never validates, and never touches a page that is immutable: only the firmware frees those.
        """
        self._checked(pfn)
        span = PAGES_2M if large else 1
        if pfn % span or gpa % (span * PAGE_SIZE) or pfn + span > self.pages:
            return Result.FAIL_INPUT
        if not assigned and (asid or immutable or gpa):
            return Result.FAIL_INPUT
        current = self.lookup(pfn)
        if current.large and not large:
            return Result.FAIL_OVERLAP
        inside = [own for own in self._inside(pfn) if large]
        if current.immutable or any(self._entries[own].immutable for own in inside):
            return Result.FAIL_PERMISSION
        if large and not current.large and inside:
            return Result.FAIL_OVERLAP
        if not assigned:
            self._entries.pop(pfn, None)
            return Result.SUCCESS
        same = (current.assigned, current.gpa, current.asid, current.large) == (True, gpa, asid, large)
        kept = current if same else Entry(True, gpa, asid, large, permissions=_VMPL0_ONLY if asid else _NONE)
        self._entries[pfn] = replace(kept, immutable=immutable)
        return Result.SUCCESS

    def psmash(self, pfn: int) -> Result:
        """Split a 2 MiB entry into 512 that keep owner, validation and permissions."""
        self._checked(pfn)
        if pfn % PAGES_2M:
            return Result.FAIL_INPUT
        entry = self.lookup(pfn)
        if not entry.assigned or not entry.large or entry.immutable:
            return Result.FAIL_BADADDR
        for page in range(PAGES_2M):
            self._entries[pfn + page] = replace(entry, large=False, gpa=entry.gpa + page * PAGE_SIZE)
        return Result.SUCCESS

    # ---- the firmware's changes

    def launch_update(self, pfn: int, *, vmsa: bool = False) -> Result:
        """Turn a page that the host has assigned (pre-guest) into a valid one, as SNP_LAUNCH_UPDATE does.

        *vmsa* for the page type VMSA.
        """
        entry = self.lookup(pfn)
        if entry.state is not PageState.PRE_GUEST:
            return Result.FAIL_PERMISSION
        self._entries[pfn & -PAGES_2M if entry.large else pfn] = replace(
            entry, immutable=False, validated=True, vmsa=vmsa
        )
        return Result.SUCCESS

    def reclaim(self, pfn: int) -> Result:
        """Return an immutable page to the state reclaim, from which RMPUPDATE frees it (SNP_PAGE_RECLAIM)."""
        entry = self.lookup(pfn)
        if entry.state not in (
            PageState.FIRMWARE,
            PageState.METADATA,
            PageState.PRE_GUEST,
            PageState.PRE_SWAP,
        ):
            return Result.FAIL_PERMISSION
        self._entries[pfn & -PAGES_2M if entry.large else pfn] = Entry(True, large=entry.large)
        return Result.SUCCESS

    # ---- the guest's instructions; *pfn* is where nested paging sends the guest's address

    def pvalidate(self, pfn: int, gpa: int, asid: int, *, large: bool, validate: bool) -> Result | Access:
        """Change the validated bit; RMP_FAULT is the exit on which a host assigns or splits the page."""
        if gpa % (PAGE_SIZE * (PAGES_2M if large else 1)):
            return Result.FAIL_INPUT
        entry = self.lookup(pfn)
        if not self._is_guests(pfn, gpa, asid):
            return Access.RMP_FAULT
        if large and not entry.large:
            return Result.FAIL_SIZEMISMATCH
        if entry.large and not large:
            return Access.RMP_FAULT  # SIZEM: the host answers with PSMASH
        if entry.validated == validate:
            return Result.NO_UPDATE
        changed = replace(entry, validated=validate)
        self._entries[pfn] = changed if validate else replace(changed, permissions=_VMPL0_ONLY)
        return Result.SUCCESS

    def rmpadjust(
        self, pfn: int, gpa: int, asid: int, *, caller: int, target: int, permissions: int, vmsa: bool = False
    ) -> Result | Access:
        """Set what a less privileged VMPL may do with a validated page, and whether it holds a VMSA."""
        if not 0 <= caller <= 3 or not 0 <= target <= 3 or not 0 <= permissions <= ALL_PERMISSIONS:
            return Result.FAIL_INPUT
        entry = self.lookup(pfn)
        if not self._is_guests(pfn, gpa, asid):
            return Access.RMP_FAULT
        if not entry.validated:
            return Access.NOT_VALIDATED
        if target <= caller or permissions & ~entry.permissions[caller] or (vmsa and caller):
            return Result.FAIL_PERMISSION
        changed = tuple(
            permissions if level == target else old for level, old in enumerate(entry.permissions)
        )
        key = pfn & -PAGES_2M if entry.large else pfn
        self._entries[key] = replace(
            entry,
            vmsa=vmsa if caller == 0 else entry.vmsa,
            permissions=(changed[0], changed[1], changed[2], changed[3]),
        )
        return Result.SUCCESS

    def _is_guests(self, pfn: int, gpa: int, asid: int) -> bool:
        entry = self.lookup(pfn)
        return (
            entry.assigned
            and not entry.immutable
            and bool(asid)
            and entry.asid == asid
            and self.owned_gpa(pfn) == gpa & -PAGE_SIZE
        )

    # ---- accesses

    def host_access(self, pfn: int, *, write: bool, mapping_pages: int = 1) -> Access:
        """Tell how the host's own access ends: only writes are checked, over the 2 MiB of a large mapping.

        *mapping_pages* is the size of the mapping used: 1, 512, or 1 GiB, which counts as one of 2 MiB.
        """
        self._checked(pfn)
        if not write:
            return Access.ALLOWED
        if mapping_pages == 1:
            return Access.RMP_FAULT if self.lookup(pfn).assigned else Access.ALLOWED
        head = pfn & -PAGES_2M
        covered = self.lookup(head).assigned or any(True for _ in self._inside(head))
        return Access.RMP_FAULT if covered else Access.ALLOWED

    def guest_access(
        self, pfn: int, gpa: int, asid: int, *, private: bool, write: bool, vmpl: int = 0
    ) -> Access:
        """Tell how a guest's access ends; *private* is its effective C-bit."""
        entry = self.lookup(pfn)
        if not private:
            return Access.RMP_FAULT if write and entry.assigned else Access.ALLOWED
        if not self._is_guests(pfn, gpa, asid):
            return Access.RMP_FAULT
        if not entry.validated:
            return Access.NOT_VALIDATED
        wanted = 2 if write else 1
        return Access.ALLOWED if entry.permissions[vmpl] & wanted else Access.VMPL_FAULT
