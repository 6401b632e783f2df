# SPDX-License-Identifier: Apache-2.0
"""Which memory an ioctl reads and writes: the argument, and what the pointers in it lead to.

``BUFFERS`` maps request numbers to the argument's :class:`Buffer`; its fields lead to its children.
The recorders in Python and in C, the decoder and the reproducer follow pointers by this table alone.
Guest memory behind an address (a memory slot's, or the data of a SEV command) is marked and not followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.commands import SEV_COMMANDS, SEV_PLATFORM_COMMANDS, TDX_COMMANDS, Command, DataKind
from kvmpy.uapi.constants.coco import SnpSize
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.struct_base import FlexStruct, Struct
from kvmpy.uapi.structs import NESTED, STRUCTS

Special = Literal["slot-bitmap", "xsave", "one-reg"]
"""Sizes that the struct does not tell.

``slot-bitmap``: one bit for each page of the memory slot, in whole quadwords. ``xsave``: what
KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says of the VM, 4096 at least. ``one-reg``: in the register's id.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How long a buffer is: ``max(least, base + count * unit / per)`` bytes, a multiple of ``round``.

    *count* is a field of the parent, or with *own* of the buffer itself. Without *count* it is *base*.
    """

    base: int = 0
    count: str = ""
    own: bool = False
    unit: int = 1
    per: int = 1
    least: int = 0
    round: int = 1
    special: Special | None = None

    def bytes(self, count: int) -> int:
        """Return the length for a *count*."""
        size = self.base + -(-count * self.unit // self.per)
        return max(self.least, -(-size // self.round) * self.round)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that an ioctl reads (``arg`` in), writes (out), or both.

    *pointer* is the field of the parent that holds its address (dots lead into nested structs), ``""`` for
    the argument itself; *when* is a field of the parent without which the kernel ignores the pointer. *reads*
    says how many bytes the kernel reads where that is less than all. *guest*: it is guest memory. *placed*:
    where it lies in its page counts, as the kernel hands it on by its physical address.
    *cases* holds further children by the value of the field *select*.
    """

    struct: str | None
    arg: DataKind
    size: Size
    pointer: str = ""
    scalar: str | None = None
    when: str = ""
    reads: int | None = None
    guest: bool = False
    placed: bool = False
    children: tuple[Buffer, ...] = ()
    select: str = ""
    cases: Mapping[int, tuple[Buffer, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> type[Struct] | None:
        """The class of the struct that lies here."""
        return None if self.struct is None else struct_class(self.struct)

    def place(self, name: str) -> tuple[int, int]:
        """Return offset and size of the field *name* of the struct that lies here."""
        if self.struct is None:
            raise ValueError(f"bytes have no field {name}")
        return field_place(self.struct, name)


def struct_class(name: str) -> type[Struct]:
    """Return the class of a struct, nested ones included."""
    return STRUCTS[name] if name in STRUCTS else NESTED[name]


def field_place(struct: str, name: str) -> tuple[int, int]:
    """Return offset and size of a field; dots lead into nested structs, ``[N]`` to an item of an array."""
    kind = struct_class(struct)
    offset = size = 0
    parts = name.split(".")
    for number, part in enumerate(parts):
        base, _, index = part.partition("[")
        found = kind.FIELDS[base]
        offset += found.offset
        ctype, size = found.ctype, found.size
        if index:
            ctype = ctype.item
            size = int(ffi.sizeof(ctype))
            offset += int(index.removesuffix("]")) * size
        if number < len(parts) - 1:
            kind = struct_class(ctype.cname.split(" ", 1)[1])
    return offset, size


def _whole(struct: str) -> Size:
    kind = struct_class(struct)
    if struct == "kvm_nested_state":
        return Size(count="size", own=True, least=kind.SIZE)
    if issubclass(kind, FlexStruct) and kind.COUNT is not None:
        count = ".".join((*kind.OPEN[:-1], kind.COUNT))
        return Size(kind.OPEN_OFFSET, count, own=True, unit=kind.ENTRY_SIZE)
    return Size(kind.SIZE)


def _struct(struct: str, arg: DataKind, **more: object) -> Buffer:
    return replace(Buffer(struct, arg, _whole(struct)), **more)  # type: ignore[arg-type]


def _bytes(
    pointer: str, length: str, arg: DataKind, *, guest: bool = False, placed: bool = False, when: str = ""
) -> Buffer:
    return Buffer(None, arg, Size(count=length), pointer, guest=guest, placed=placed, when=when)


def _fixed(pointer: str, size: int, arg: DataKind, when: str = "") -> Buffer:
    return Buffer(None, arg, Size(size), pointer, when=when)


# What the pointers of a command's struct lead to.
_COMMAND_POINTERS: dict[str, tuple[Buffer, ...]] = {
    "KVM_SEV_LAUNCH_START": (
        _bytes("dh_uaddr", "dh_len", "in"),
        _bytes("session_uaddr", "session_len", "in"),
    ),
    "KVM_SEV_LAUNCH_UPDATE_DATA": (_bytes("uaddr", "len", "inout", guest=True),),
    "KVM_SEV_LAUNCH_SECRET": (
        _bytes("hdr_uaddr", "hdr_len", "in"),
        _bytes("guest_uaddr", "guest_len", "inout", guest=True),
        _bytes("trans_uaddr", "trans_len", "in"),
    ),
    "KVM_SEV_LAUNCH_MEASURE": (_bytes("uaddr", "len", "out"),),
    "KVM_SEV_SEND_START": (
        _bytes("pdh_cert_uaddr", "pdh_cert_len", "in"),
        _bytes("plat_certs_uaddr", "plat_certs_len", "in"),
        _bytes("amd_certs_uaddr", "amd_certs_len", "in"),
        _bytes("session_uaddr", "session_len", "out"),
    ),
    "KVM_SEV_SEND_UPDATE_DATA": (
        _bytes("hdr_uaddr", "hdr_len", "out"),
        _bytes("guest_uaddr", "guest_len", "in", guest=True),
        _bytes("trans_uaddr", "trans_len", "out"),
    ),
    "KVM_SEV_RECEIVE_START": (
        _bytes("pdh_uaddr", "pdh_len", "in"),
        _bytes("session_uaddr", "session_len", "in"),
    ),
    "KVM_SEV_RECEIVE_UPDATE_DATA": (
        _bytes("hdr_uaddr", "hdr_len", "in"),
        _bytes("guest_uaddr", "guest_len", "inout", guest=True),
        _bytes("trans_uaddr", "trans_len", "in"),
    ),
    "KVM_SEV_DBG_DECRYPT": (
        _bytes("src_uaddr", "len", "in", guest=True),
        _bytes("dst_uaddr", "len", "out", placed=True),
    ),
    "KVM_SEV_DBG_ENCRYPT": (
        _bytes("src_uaddr", "len", "in", placed=True),
        _bytes("dst_uaddr", "len", "inout", guest=True),
    ),
    "KVM_SEV_GET_ATTESTATION_REPORT": (_bytes("uaddr", "len", "out"),),
    # The source may be written, too: a CPUID page that the firmware corrected.
    "KVM_SEV_SNP_LAUNCH_UPDATE": (_bytes("uaddr", "len", "inout"),),
    "KVM_SEV_SNP_LAUNCH_FINISH": (
        _fixed("id_block_uaddr", SnpSize.KVM_SEV_SNP_ID_BLOCK_SIZE, "in", "id_block_en"),
        _fixed("id_auth_uaddr", SnpSize.KVM_SEV_SNP_ID_AUTH_SIZE, "in", "id_block_en"),
    ),
    "SEV_PEK_CSR": (_bytes("address", "length", "out"),),
    "SEV_PDH_CERT_EXPORT": (
        _bytes("pdh_cert_address", "pdh_cert_len", "out"),
        _bytes("cert_chain_address", "cert_chain_len", "out"),
    ),
    "SEV_PEK_CERT_IMPORT": (
        _bytes("pek_cert_address", "pek_cert_len", "in"),
        _bytes("oca_cert_address", "oca_cert_len", "in"),
    ),
    "SEV_GET_ID2": (_bytes("address", "length", "out"),),
    "SNP_VLEK_LOAD": (
        _struct("sev_user_data_snp_wrapped_vlek_hashstick", "in", pointer="vlek_wrapped_address"),
    ),
    "KVM_TDX_INIT_MEM_REGION": (Buffer(None, "in", Size(count="nr_pages", unit=4096), "source_addr"),),
}

_READS_HEADER = {"KVM_TDX_CAPABILITIES", "KVM_TDX_GET_CPUID"}


def _command(command: Command) -> tuple[Buffer, ...]:
    if command.struct is None:
        return ()
    children = _COMMAND_POINTERS.get(command.name, ())
    made = _struct(command.struct, command.arg, pointer="data", children=children)
    if command.name in _READS_HEADER:
        made = replace(made, reads=_header(command.struct))
    return (made,)


def _header(struct: str) -> int:
    kind = struct_class(struct)
    return kind.OPEN_OFFSET if issubclass(kind, FlexStruct) else kind.SIZE


def _cases(commands: Mapping[str, Command]) -> dict[int, tuple[Buffer, ...]]:
    return {command.id: _command(command) for command in commands.values()}


_MSR_BITMAPS = tuple(
    Buffer(
        None, "in", Size(count=f"ranges[{number}].nmsrs", per=8, round=8), pointer=f"ranges[{number}].bitmap"
    )
    for number in range(16)
)

_POINTERS: dict[str, tuple[Buffer, ...]] = {
    "KVM_GET_DIRTY_LOG": (Buffer(None, "out", Size(special="slot-bitmap"), "dirty_bitmap"),),
    "KVM_CLEAR_DIRTY_LOG": (
        Buffer(None, "in", Size(count="num_pages", per=8, round=8), pointer="dirty_bitmap"),
    ),
    "KVM_SET_DEVICE_ATTR": (_fixed("addr", 8, "in"),),
    "KVM_GET_DEVICE_ATTR": (_fixed("addr", 8, "out"),),
    "KVM_GET_ONE_REG": (Buffer(None, "out", Size(special="one-reg"), "addr"),),
    "KVM_SET_ONE_REG": (Buffer(None, "in", Size(special="one-reg"), "addr"),),
    "KVM_X86_SET_MSR_FILTER": _MSR_BITMAPS,
    "KVM_XEN_HVM_CONFIG": (
        Buffer(None, "in", Size(count="blob_size_32", unit=4096), "blob_addr_32"),
        Buffer(None, "in", Size(count="blob_size_64", unit=4096), "blob_addr_64"),
    ),
    "UFFDIO_COPY": (_bytes("src", "len", "in", guest=True),),
}

# The kernel takes the count and nothing else of the entries that it fills.
_COUNT_READ = (
    "KVM_GET_MSR_INDEX_LIST",
    "KVM_GET_MSR_FEATURE_INDEX_LIST",
    "KVM_GET_SUPPORTED_CPUID",
    "KVM_GET_EMULATED_CPUID",
    "KVM_GET_SUPPORTED_HV_CPUID",
    "KVM_GET_CPUID2",
    "KVM_GET_REG_LIST",
    "KVM_GET_NESTED_STATE",
)
_XSAVE = ("KVM_GET_XSAVE2", "KVM_SET_XSAVE")


def _argument(op: Ioctl) -> Buffer | None:
    if op.arg == "none" or op.arg == "int":
        return None
    arg: DataKind = op.arg
    if op.struct is None:
        return Buffer(None, arg, Size(int(ffi.sizeof(op.scalar))), scalar=op.scalar)
    made = _struct(op.struct, arg, children=_POINTERS.get(op.name, ()))
    if op.name in _COUNT_READ:
        made = replace(made, reads=_header(op.struct))
    if op.name in _XSAVE:
        made = replace(made, size=Size(made.size.base, special="xsave"))
    return made


BUFFERS: dict[int, Buffer] = {
    op.nr: made for op in ioctls.IOCTLS.values() if (made := _argument(op)) is not None
}

BUFFERS[ioctls.KVM_MEMORY_ENCRYPT_OP.nr] = _struct(
    "kvm_sev_cmd", "inout", select="id", cases=_cases(SEV_COMMANDS)
)
BUFFERS[ioctls.SEV_ISSUE_CMD.nr] = _struct(
    "sev_issue_cmd", "inout", select="cmd", cases=_cases(SEV_PLATFORM_COMMANDS)
)

TDX_BUFFER = _struct("kvm_tdx_cmd", "inout", select="id", cases=_cases(TDX_COMMANDS))
"""The argument of KVM_MEMORY_ENCRYPT_OP on VMs of type KVM_X86_TDX_VM and their vCPUs."""


def children_of(buffer: Buffer, selected: int | None) -> Iterator[Buffer]:
    """Yield what the pointers of *buffer* lead to; *selected* is the value of its field ``select``."""
    yield from buffer.children
    if selected is not None:
        yield from buffer.cases.get(selected, ())
