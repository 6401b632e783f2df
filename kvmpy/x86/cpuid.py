# SPDX-License-Identifier: Apache-2.0
"""CPUID tables: a typed view of ``kvm_cpuid2``, features by name, address widths, the encryption bit, all as
text.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from kvmpy.x86.cpuid_features import ALIASES, BITS, FEATURES, Word
from kvmpy.x86.hyperv import SIGNATURE, HvLeaf

if TYPE_CHECKING:
    from kvmpy.uapi.structs import kvm_cpuid2

SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
REGISTERS = ("eax", "ebx", "ecx", "edx")

# Leaves whose answer depends on ECX.
_INDEXED = frozenset(
    {0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x23, 0x24}
    | {0x8000_001D, 0x8000_0020, 0x8000_0026}
)

_TITLES = {
    0x0: "highest leaf, vendor",
    0x1: "version, features",
    0x2: "caches and TLBs",
    0x4: "caches",
    0x5: "MONITOR/MWAIT",
    0x6: "power",
    0x7: "features",
    0xA: "performance counters",
    0xB: "topology",
    0xD: "XSAVE",
    0x12: "SGX",
    0x14: "processor trace",
    0x15: "TSC frequency",
    0x16: "frequencies",
    0x1D: "tiles",
    0x1E: "TMUL",
    0x1F: "topology",
    0x24: "AVX10",
    0x4000_0000: "hypervisor vendor",
    0x4000_0001: "KVM features, or the interface's signature",
    0x4000_0002: "hypervisor version",
    0x4000_0003: "Hyper-V features",
    0x4000_0004: "Hyper-V recommendations",
    0x4000_0005: "Hyper-V limits",
    0x4000_000A: "Hyper-V nested features",
    0x4000_0080: "Hyper-V debugger",
    0x4000_0082: "Hyper-V debugger features",
    0x8000_0000: "highest extended leaf",
    0x8000_0001: "features",
    0x8000_0002: "brand",
    0x8000_0003: "brand",
    0x8000_0004: "brand",
    0x8000_0005: "L1 caches",
    0x8000_0006: "L2 and L3 caches",
    0x8000_0007: "RAS, power",
    0x8000_0008: "address widths, features",
    0x8000_000A: "SVM",
    0x8000_001D: "caches",
    0x8000_001E: "topology",
    0x8000_001F: "encrypted memory",
    0x8000_0021: "features",
    0x8000_0022: "performance counters",
    0x8000_0026: "topology",
}


class FeatureNameError(KeyError):
    """No CPUID feature has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class CpuidEntry:
    """One leaf (and subleaf, where ``flags`` has SIGNIFICANT_INDEX) with its four registers."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    @property
    def indexed(self) -> bool:
        """Whether the entry answers for its index alone."""
        return bool(self.flags & SIGNIFICANT_INDEX)

    @property
    def registers(self) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        return self.eax, self.ebx, self.ecx, self.edx

    @property
    def features(self) -> list[str]:
        """The names of the feature bits that are set."""
        results: list[str] = []
        if self.function == HvLeaf.HYPERV_CPUID_INTERFACE and self.eax == SIGNATURE:
            return results  # in place of KVM's features
        for register in REGISTERS:
            value = getattr(self, register)
            names = BITS.get((self.function, self.index if self.indexed else 0, register), {})
            results += [name for bit, name in names.items() if value >> bit & 1]
        return results

    def __str__(self) -> str:
        where = f"{self.function:#010x}" + (f".{self.index:#x}" if self.indexed else "")
        values = " ".join(f"{name} {getattr(self, name):08x}" for name in REGISTERS)
        return f"{where:<15} {values}  {_TITLES.get(self.function, '')}".rstrip()


def feature_bit(name: str) -> tuple[Word, int]:
    """Return ``((function, index, register), bit)`` of a feature by Linux's name, in any case.

    ``X86_FEATURE_`` may stand before it, and usual other names (``SSE2``, ``pdpe1gb``) do. FeatureNameError
    with the closest names.
    """
    key = name.upper().removeprefix("X86_FEATURE_").replace(".", "_").replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in FEATURES:
        close = difflib.get_close_matches(key, [*FEATURES, *ALIASES], 3, 0.6)
        hint = f": did you mean {', '.join(close)}?" if close else ""
        raise FeatureNameError(f"no CPUID feature is called {name!r}{hint}")
    return FEATURES[key]


class Cpuid:
    """A CPUID table that can be asked and changed; ``to_struct`` makes it a ``kvm_cpuid2`` again."""

    def __init__(self, entries: Iterable[CpuidEntry] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def from_struct(cls, table: kvm_cpuid2) -> Cpuid:
        """Take a copy of what KVM_GET_SUPPORTED_CPUID or KVM_GET_CPUID2 returned."""
        return cls(
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries_list()
        )

    def to_struct(self) -> kvm_cpuid2:
        """Return the table for KVM_SET_CPUID2."""
        from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2

        names = [field.name for field in fields(CpuidEntry)]
        return kvm_cpuid2.of(kvm_cpuid_entry2(**{n: getattr(e, n) for n in names}) for e in self)

    def copy(self) -> Cpuid:
        """Return a table of its own with the same entries."""
        return Cpuid(replace(entry) for entry in self.entries)

    def __iter__(self) -> Iterator[CpuidEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __eq__(self, other: object) -> bool:
        return self.entries == other.entries if isinstance(other, Cpuid) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    # Leaves.

    def find(self, function: int, index: int = 0) -> CpuidEntry | None:
        """Return the entry that KVM would answer with; *index* counts where the leaf has subleaves."""
        for entry in self.entries:
            if entry.function == function and (entry.index == index or not entry.indexed):
                return entry
        return None

    def ensure(self, function: int, index: int = 0) -> CpuidEntry:
        """Return the entry, adding one of zeros where there is none."""
        step = self.find(function, index)
        if step is None:
            step = CpuidEntry(function, index, SIGNIFICANT_INDEX if function in _INDEXED else 0)
            self.entries.append(step)
        return step

    def remove(self, function: int, index: int | None = None) -> int:
        """Take out the leaf, or one of its subleaves; return how many entries went."""
        kept = [e for e in self.entries if e.function != function or index not in (None, e.index)]
        gone = len(self.entries) - len(kept)
        self.entries = kept
        return gone

    def register(self, function: int, index: int, name: str) -> int:
        """Return a register (``eax`` to ``edx``) of a leaf, 0 where the leaf is missing."""
        if name not in REGISTERS:
            raise ValueError(f"CPUID has no register {name!r}")
        walk_result = self.find(function, index)
        return 0 if walk_result is None else int(getattr(walk_result, name))

    # Features.

    def has(self, feature: str) -> bool:
        """Tell whether the feature's bit is set; FeatureNameError for an unknown name."""
        (function, index, register), bit = feature_bit(feature)
        return bool(self.register(function, index, register) >> bit & 1)

    def set_feature(self, feature: str, on: bool = True) -> None:
        """Set (or clear) the feature's bit, adding the leaf where it is missing; FeatureNameError."""
        (function, index, register), bit = feature_bit(feature)
        if not on and self.find(function, index) is None:
            return
        entry = self.ensure(function, index)
        value = getattr(entry, register)
        setattr(entry, register, value | 1 << bit if on else value & ~(1 << bit))

    def set_hypervisor(self, entries: Iterable[CpuidEntry]) -> None:
        """Put *entries* in the place of all leaves from 0x40000000 to 0x400000FF."""
        self.entries = [entry for entry in self.entries if entry.function >> 8 != 0x40_0000]
        self.entries += [replace(entry) for entry in entries]

    def clear_feature(self, feature: str) -> None:
        """Clear the feature's bit; FeatureNameError for an unknown name."""
        self.set_feature(feature, on=False)

    @property
    def features(self) -> frozenset[str]:
        """The names of all features whose bit is set."""
        return frozenset(name for entry in self.entries for name in entry.features)

    # What the leaves say.

    @property
    def is_amd_compatible(self) -> bool:
        """Whether the vendor is AMD, or Hygon, which builds AMD's processors."""
        return self.vendor in ("AuthenticAMD", "HygonGenuine")

    @property
    def vendor(self) -> str:
        """The vendor string of leaf 0, such as ``AuthenticAMD``."""
        leaf = self.find(0)
        return "" if leaf is None else _text(leaf.ebx, leaf.edx, leaf.ecx)

    @property
    def hypervisor(self) -> str:
        """The signature of leaf 0x40000000, such as ``KVMKVMKVM``."""
        leaf = self.find(0x4000_0000)
        return "" if leaf is None else _text(leaf.ebx, leaf.ecx, leaf.edx)

    @property
    def brand(self) -> str:
        """The brand string of leaves 0x80000002 to 0x80000004."""
        leaves = [self.find(0x8000_0002 + n) for n in range(3)]
        return "".join(_text(*leaf.registers) for leaf in leaves if leaf is not None).strip()

    @property
    def version(self) -> tuple[int, int, int]:
        """Family, model and stepping, the extended parts included."""
        eax = self.register(1, 0, "eax")
        family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
        if family in (0x6, 0xF):
            model |= eax >> 12 & 0xF0
        if family == 0xF:
            family += eax >> 20 & 0xFF
        return family, model, eax & 0xF

    @property
    def maxphyaddr(self) -> int:
        """The physical address width in bits; 36 where leaf 0x80000008 is missing."""
        return self.register(0x8000_0008, 0, "eax") & 0xFF or 36

    @property
    def linear_bits(self) -> int:
        """The linear address width in bits; 48 where leaf 0x80000008 is missing."""
        return self.register(0x8000_0008, 0, "eax") >> 8 & 0xFF or 48

    @property
    def guest_maxphyaddr(self) -> int:
        """The width that nested paging can map (EAX 23:16 of leaf 0x80000008), or ``maxphyaddr``."""
        return self.register(0x8000_0008, 0, "eax") >> 16 & 0xFF or self.maxphyaddr

    @property
    def encryption_bit(self) -> int | None:
        """The C-bit's position from leaf 0x8000001F; None where neither SME nor SEV is offered."""
        leaf = self.find(0x8000_001F)
        if leaf is None or not leaf.eax & 3:
            return None
        return leaf.ebx & 0x3F

    @property
    def phys_addr_reduction(self) -> int:
        """By how many bits memory encryption narrows the physical address space (leaf 0x8000001F)."""
        return self.register(0x8000_001F, 0, "ebx") >> 6 & 0x3F

    @property
    def sev_asids(self) -> tuple[int, int]:
        """How many ASIDs encrypted guests have, and the lowest for those without SEV-ES (leaf 0x8000001F)."""
        return self.register(0x8000_001F, 0, "ecx"), self.register(0x8000_001F, 0, "edx")

    # Text.

    def decode(self) -> str:
        """Return the table as text: a summary, then each leaf with the features in it."""
        family, model, stepping = self.version
        bit = self.encryption_bit
        lines = [
            f"vendor {self.vendor or '?'}, family {family:#x} model {model:#x} stepping {stepping}"
            + (f", {self.brand}" if self.brand else ""),
            f"physical {self.maxphyaddr} bits, linear {self.linear_bits} bits, "
            + ("no encryption bit" if bit is None else f"C-bit {bit}")
            + (f", hypervisor {self.hypervisor}" if self.hypervisor else ""),
        ]
        for entry in self.entries:
            lines.append(str(entry))
            if entry.features:
                lines.append(" " * 16 + " ".join(entry.features))
        return "\n".join(lines)

    def differences(self, other: Cpuid) -> list[str]:
        """Return where *other* differs, one line for each register, with the names of the bits that do."""
        keys = {(e.function, e.index): None for table in (self, other) for e in table}
        lines = []
        for function, index in sorted(keys):
            mine, theirs = self._exact(function, index), other._exact(function, index)
            where = f"{function:#x}.{index:#x}"
            if mine is None or theirs is None:
                lines.append(f"{where}: only {'there' if mine is None else 'here'}")
                continue
            for register, here, there in zip(REGISTERS, mine.registers, theirs.registers, strict=True):
                if here != there:
                    bits = BITS.get((function, index, register), {})
                    names = [name for bit, name in bits.items() if (here ^ there) >> bit & 1]
                    note = f" ({' '.join(names)})" if names else ""
                    lines.append(f"{where} {register}: {here:#x} here, {there:#x} there{note}")
        return lines

    def _exact(self, function: int, index: int) -> CpuidEntry | None:
        return next((e for e in self.entries if (e.function, e.index) == (function, index)), None)


def _text(*registers: int) -> str:
    raw = struct.pack(f"<{len(registers)}I", *registers)
    return raw.split(b"\0")[0].decode("ascii", "replace")
