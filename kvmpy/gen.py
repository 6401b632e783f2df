# SPDX-License-Identifier: Apache-2.0
"""The files that say elsewhere what Python says: stubs of types, and headers for C.

The build (:mod:`kvmpy.build`) writes them.  It has no more than the standard library and cffi then.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from enum import Enum, EnumMeta
from pathlib import Path
from types import ModuleType

from kvmpy.debug.preload import shared
from kvmpy.debug.record import events, format, layouts  # noqa: A004
from kvmpy.debug.record.format import object_kind
from kvmpy.guest import layout
from kvmpy.guest.toolchain import runtime_dir
from kvmpy.uapi import constants, gen, ioctls, plan
from kvmpy.uapi.buffers import field_place
from kvmpy.uapi.links import LINKS, Link
from kvmpy.uapi.structs import kvm_run
from kvmpy.x86 import hyperv, svm_exits, vmcb, xen
from kvmpy.x86.msr_numbers import Msr

HERE = Path(__file__).resolve().parent
_HEAD = (
    "/* SPDX-License-Identifier: Apache-2.0 */\n"
    "/* Written by kvmpy/gen.py: do not edit. {about} */\n"
    "#ifndef {guard}\n#define {guard}\n\n{body}\n#endif\n"
)
_CONSTANT = re.compile(r"([A-Z][A-Z0-9_]*) = (.*)")
# Fields that the capture engine looks at.
_FIELDS = (
    ("kvm_run", "exit_reason"), ("kvm_run", "io.direction"), ("kvm_run", "io.size"), ("kvm_run", "io.count"),
    ("kvm_run", "io.data_offset"), ("kvm_run", "kvm_valid_regs"), ("kvm_run", "kvm_dirty_regs"),
    ("kvm_userspace_memory_region", "slot"), ("kvm_userspace_memory_region", "memory_size"),
    ("kvm_userspace_memory_region", "userspace_addr"),
)  # fmt: skip


def _rows(name: str, members: str, rows: list[str]) -> str:
    body = "".join(f"\t{{ {row} }},\n" for row in rows)
    return f"static const struct {name} {{\n{members}}} {name}_table[] = {{\n{body}}};\n"


def _members(*names: str) -> str:
    return "".join(f"\tuint32_t {name};\n" for name in names)


# What follows the name of an object that was made: nothing, the argument, or how many there were before.
_MADE_NUMBERS = {"": -1, "arg": -2, "count": -3}


def _maker(op: ioctls.Ioctl) -> str:
    def at(name: str) -> int:
        return field_place(str(op.struct), name)[0]

    name, _, number = op.made_name.removesuffix("}").partition("{")
    unless, mask = op.made_unless or ("", 0)
    numbered = _MADE_NUMBERS[number] if number in _MADE_NUMBERS else at(number)
    return (
        f"{op.name}, {int(object_kind(str(op.makes)))}, {at(op.made_in) if op.made_in else -1}, "
        f'{at(unless) if unless else 0}, {mask}, "{name}", {numbered}'
    )


def tables() -> str:
    """Return the content of preload/tables.h."""
    ops = list(ioctls.IOCTLS.values())
    lines = ["#include <stdbool.h>\n#include <stdint.h>\n\n"]
    folders = (HERE / "debug/preload", HERE / "uapi/native")
    sources = "".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.c")))
    used = {*re.findall(r"\b(?:KVM|UFFD)\w+", sources)} | {
        op.name for op in ops if op.makes or op.fd_fields or op.nr in ioctls.SETS_SLOT
    }
    lines += [f"#define {op.name} {op.nr:#x}U\n" for op in ops if op.name in used]
    lines += [f"#define {name} {number}U\n" for name, number in constants.ALL.items() if name in used]
    lines += [
        f"#define AT_{struct}_{name.replace('.', '_')} {field_place(struct, name)[0]}U\n"
        for struct, name in _FIELDS
    ]
    lines.append(f"#define SIZE_kvm_run {kvm_run.SIZE}U\n")
    links = []
    for text, kind, name in LINKS:
        link, is_open = Link(kind, name), text.endswith("*")
        flags = ", ".join(str(flag).lower() for flag in (is_open, link.kvm, link.of_vm))
        plain = text.rstrip("*")
        links.append(f'"{plain}", {len(plain)}, {flags}, {int(object_kind(kind))}, "{name}"')
    lines.append(
        "\n/* A link in /proc/PID/fd: the text, with is_open its begin; the kind of the object. */\n"
        + _rows(
            "kvmpy_link",
            "\tconst char *text;\n\tuint32_t length;\n\tbool is_open, kvm, of_vm;\n"
            "\tuint32_t kind;\n\tconst char *name;\n",
            links,
        )
    )
    lines.append(
        "\n/* Where an argument holds a descriptor, if the u32 at where, masked, is value. */\n"
        + _rows(
            "kvmpy_fd_field",
            _members("request", "offset", "where", "mask", "value"),
            [
                f"{op.name}, {field_place(op.struct, each.name)[0]}, "
                f"{field_place(op.struct, each.where)[0] if each.mask else 0}, {each.mask}, {each.value}"
                for op in ops
                for each in op.fd_fields
                if op.struct is not None and not each.seen
            ],
        )
    )
    lines.append(
        "\n/* The kind of object that an ioctl makes, and where its descriptor is: -1 is the result.\n"
        " * It makes none if the u32 at unless has a bit of mask. After the name comes the u32 at number,\n"
        " * or what KVMPY_MADE_ says. */\n"
        + "".join(
            f"#define KVMPY_MADE_{name.upper() or 'ALONE'} {value}\n" for name, value in _MADE_NUMBERS.items()
        )
        + _rows(
            "kvmpy_maker",
            "\tuint32_t request;\n\tuint32_t kind;\n\tint32_t offset;\n"
            "\tuint32_t unless, mask;\n\tconst char *name;\n\tint32_t number;\n",
            [_maker(op) for op in ops if op.makes is not None and op.nr >> 8 & 0xFF == ioctls.KVMIO],
        )
        + "\n/* These set memory slots; their arguments begin like struct kvm_userspace_memory_region. */\n"
        + _rows(
            "kvmpy_slot_setter", "\tuint32_t request;\n", [op.name for op in ops if op.nr in ioctls.SETS_SLOT]
        )
    )
    tree = plan.Plan()
    lines.append(
        f"\n{_defines(plan, 'KVMPY_PLAN_')}#define KVMPY_PLAN_TDX {tree.tdx}\n\n"
        "/* What each ioctl that takes an address reads and writes: trees of nodes. */\n"
        + _rows("kvmpy_plan_root", _members("request", "node"), tree.roots)
        + _rows("kvmpy_plan_case", _members("value", "children", "nr_children"), tree.cases)
        + "static const struct kvmpy_plan_node kvmpy_plan_node_table[] = {\n"
        + "".join(f"\t{{ {row} }},\n" for row in tree.nodes)
        + "};\n"
    )
    return _HEAD.format(
        about="From kvmpy/uapi/ioctls.py and links.py.", guard="KVMPY_TABLES_H", body="".join(lines)
    )


def _defines(module: ModuleType, prefix: str) -> str:
    """Return the integers of a module, with the comments that are there, as C has them."""
    lines = [""]
    comments: list[str] = []
    for line in inspect.getsource(module).splitlines():
        if (match := _CONSTANT.match(line)) and type(vars(module)[match[1]]) is int:
            value = vars(module)[match[1]]
            text = hex(value) if match[2].startswith("0x") else str(value)
            lines += [*comments, f"#define {prefix}{match[1]} {text}"]
        elif not line and lines[-1]:
            lines.append("")
        comments = [*comments, f"/* {line[2:]} */"] if line.startswith("# ") else []
    return "\n".join(lines[1:]).strip() + "\n"


def _enum(kind: EnumMeta, prefix: str) -> str:
    members: Mapping[str, Enum] = kind.__members__
    return "\n" + "".join(f"#define {prefix}{name} {int(value.value)}\n" for name, value in members.items())


def _structs(*names: str) -> str:
    bodies = {name: re.sub(r"; (?=[_a-z])", ";\n\t", layouts.LAYOUTS[name]) for name in names}
    return "".join(f"\nstruct kvmpy_{name} {{\n\t{body}\n}};\n" for name, body in bodies.items())


def record_format() -> str:
    """Return the content of record/format.h."""
    body = "#include <stdint.h>\n\n" + _defines(format, "KVMPY_REC_")
    kinds = {"": format.FrameType, "KIND_": format.ObjectKind, "WHEN_": format.When, "WHAT_": format.What}
    body += "".join(_enum(kind, f"KVMPY_REC_{prefix}") for prefix, kind in kinds.items())
    body += _structs(*(name for name in layouts.LAYOUTS if name.startswith("rec_")))
    about = f"From {format.__name__} and {events.__name__}; docs/record.md says what the fields mean."
    return _HEAD.format(about=about, guard="KVMPY_RECORD_FORMAT_H", body=body)


def ring() -> str:
    """Return the content of preload/ring.h."""
    body = "#include <stdatomic.h>\n#include <stdint.h>\n\n" + _defines(shared, "KVMPY_")
    body += _structs("control", "ring")
    return _HEAD.format(about=f"From {shared.__name__}.", guard="KVMPY_PRELOAD_RING_H", body=body)


def guest_layout() -> str:
    """Return the content of the guest's kvmpy/layout.h: plain literals, as assembly and linker read it."""
    body = _defines(layout, "KVMPY_")
    body += _enum(layout.UcallCmd, "KVMPY_UCALL_CMD_") + _enum(layout.AssertKind, "KVMPY_ASSERT_")
    return _HEAD.format(about=f"From {layout.__name__}.", guard="KVMPY_LAYOUT_H", body=body)


def _numbers(source: ModuleType, guard: str, msrs: str = "") -> str:
    """Return a guest header with the enums of *source* and the MSRs whose names begin with *msrs*."""
    kinds = [
        kind
        for kind in vars(source).values()
        if isinstance(kind, EnumMeta) and kind.__module__ == source.__name__
    ]
    numbers = {name: int(msr) for name, msr in Msr.__members__.items() if msrs and name.startswith(msrs)}
    for kind in kinds:
        members: Mapping[str, Enum] = kind.__members__
        numbers |= {name: int(member.value) for name, member in members.items()}
    body = "".join(f"#define {name} {number:#x}\n" for name, number in numbers.items())
    return _HEAD.format(about=f"From {source.__name__}.", guard=guard, body=body)


_C_TYPES = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}


def guest_vmcb() -> str:
    """Return the content of the guest's kvmpy/vmcb.h: struct vmcb, the exits and the bits of fields."""
    members, checks, end = [], [], 0
    for place in vmcb.VMCB.places.values():
        name, _, part = place.name.partition(".")
        if part and part != "selector":
            continue
        if place.offset > end:
            members.append(f"\tu8 reserved_{end:03x}[{place.offset - end}];")
        size = 16 if part else place.size
        kind = "struct vmcb_seg" if part else _C_TYPES.get(size, "u8")
        members.append(f"\t{kind} {name}{'' if part or size in _C_TYPES else f'[{size}]'};")
        checks.append(f'_Static_assert(offsetof(struct vmcb, {name}) == {place.offset:#x}, "{name}");')
        end = place.offset + size
    members.append(f"\tu8 reserved_{end:03x}[{vmcb.VMCB_SIZE - end}];")
    body = "#include <kvmpy/types.h>\n\n/* The number of an exit is that of its intercept, too. */"
    body += _enum(svm_exits.SvmExit, "SVM_EXIT_").replace("INVALID 18446744073709551615", "INVALID (~0ull)")
    fields: dict[str, EnumMeta] = {
        "INT_CTL": vmcb.IntCtl,
        "INT_STATE": vmcb.IntState,
        "MISC_CTL": vmcb.MiscCtl,
        "MISC_CTL2": vmcb.MiscCtl2,
        "CLEAN": vmcb.Clean,
        "TLB": vmcb.TlbControl,
        "EVENT": vmcb.EventType,
        "IO": vmcb.IoInfo,
    }
    for name, words in fields.items():
        body += _enum(words, f"SVM_{name}_")
    body += "\nstruct vmcb_seg {\n\tu16 selector, attrib;\n\tu32 limit;\n\tu64 base;\n};\n"
    body += "\nstruct vmcb {\n" + "\n".join(members) + "\n} __packed;\n\n" + "\n".join(checks) + "\n"
    body += f'_Static_assert(sizeof(struct vmcb) == {vmcb.VMCB_SIZE}, "struct vmcb");\n'
    return _HEAD.format(
        about=f"From {vmcb.__name__} and {svm_exits.__name__}.", guard="KVMPY_VMCB_H", body=body
    )


def files() -> dict[Path, str]:
    """Return every generated file with its content."""
    headers = runtime_dir() / "include/kvmpy"
    return {
        **gen.stubs(),
        HERE / "debug/preload/tables.h": tables(),
        HERE / "debug/preload/ring.h": ring(),
        HERE / "debug/record/format.h": record_format(),
        headers / "layout.h": guest_layout(),
        headers / "hyperv_numbers.h": _numbers(hyperv, "KVMPY_HYPERV_NUMBERS_H", "HV_X64_MSR_"),
        headers / "xen_numbers.h": _numbers(xen, "KVMPY_XEN_NUMBERS_H"),
        headers / "vmcb.h": guest_vmcb(),
    }


def write() -> list[Path]:
    """Write what is not there or differs; return every generated file."""
    generated = files()
    for path, text in generated.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return list(generated)
