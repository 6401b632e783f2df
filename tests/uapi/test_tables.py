# SPDX-License-Identifier: Apache-2.0
"""The ioctl table, the command tables and the constants agree with one another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpy
from kvmpy.uapi import constants, ioctls
from kvmpy.uapi.buffers import field_place
from kvmpy.uapi.constants import ALL, Cap, ExitReason, SevCmd, SevPlatformCmd, TdxCmd
from kvmpy.uapi.ioctl_type import NONE, READ, WRITE
from kvmpy.uapi.ioctls import IOCTLS, SEV_COMMANDS, SEV_PLATFORM_COMMANDS, TDX_COMMANDS, Ioctl
from kvmpy.uapi.structs import STRUCTS

DIRECTION = {"none": NONE, "int": NONE, "out": READ, "in": WRITE, "inout": READ | WRITE}

# The number says one thing, the kernel does another.
ODD_DIRECTIONS = {
    "KVM_SET_IRQCHIP": READ,
    "KVM_SET_PIT": READ,
    "KVM_MEMORY_ENCRYPT_REG_REGION": READ,
    "KVM_MEMORY_ENCRYPT_UNREG_REGION": READ,
    "KVM_REINJECT_CONTROL": NONE,
    "KVM_CLEAR_DIRTY_LOG": READ | WRITE,
    "KVM_CREATE_GUEST_MEMFD": READ | WRITE,
    "UFFDIO_UNREGISTER": READ,
    "UFFDIO_WAKE": READ,
    "UFFDIO_WRITEPROTECT": READ | WRITE,
}
ODD_SIZES = {"KVM_MEMORY_ENCRYPT_OP": 8, "KVM_REINJECT_CONTROL": 0}
SCALARS = {"uint64_t": 8}

ENTRIES = sorted(IOCTLS.values(), key=lambda entry: entry.name)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_the_number_says_what_the_entry_says(entry: Ioctl) -> None:
    request = entry.request
    kinds = {"KVM": 0xAE, "SEV": ord("S"), "UFF": 0xAA, "USE": 0xAA}
    assert request.type == kinds[entry.name[:3]]
    assert request.direction == ODD_DIRECTIONS.get(entry.name, DIRECTION[entry.arg])
    if entry.struct is not None:
        expected = STRUCTS[entry.struct].SIZE
    else:
        expected = SCALARS[entry.scalar] if entry.scalar else 0
    assert request.size == ODD_SIZES.get(entry.name, expected)


def test_argument_and_pointee_agree() -> None:
    for entry in ENTRIES:
        points = entry.struct is not None or entry.scalar is not None
        assert points == (entry.arg in ("in", "out", "inout")), entry
        assert entry.struct is None or entry.scalar is None, entry


def test_capabilities_exist() -> None:
    for entry in ENTRIES:
        assert len(set(entry.fds)) == len(entry.fds), entry
        for kind in entry.fds:
            cap = entry.cap_on(kind)
            assert cap is None or cap in Cap.__members__, entry


def test_entries_are_module_attributes_with_a_sentence() -> None:
    for entry in ENTRIES:
        assert getattr(ioctls, entry.name) is entry
        assert re.fullmatch(r"[A-Z].*\.", entry.doc), entry


def test_capability_depends_on_the_file_descriptor() -> None:
    assert ioctls.KVM_ENABLE_CAP.fds == ("vcpu", "vm")
    assert ioctls.KVM_ENABLE_CAP.cap_on("vcpu") == "KVM_CAP_ENABLE_CAP"
    assert ioctls.KVM_ENABLE_CAP.cap_on("vm") == "KVM_CAP_ENABLE_CAP_VM"
    with pytest.raises(KeyError):
        ioctls.KVM_ENABLE_CAP.cap_on("system")


@pytest.mark.parametrize(
    ("table", "ids", "ends"),
    [
        (SEV_COMMANDS, SevCmd, {"KVM_SEV_NR_MAX"}),
        (SEV_PLATFORM_COMMANDS, SevPlatformCmd, {"SEV_MAX"}),
        (TDX_COMMANDS, TdxCmd, {"KVM_TDX_CMD_NR_MAX"}),
    ],
)
def test_every_command_is_in_its_table(
    table: dict[str, ioctls.Command], ids: type[SevCmd] | type[SevPlatformCmd] | type[TdxCmd], ends: set[str]
) -> None:
    assert {name: command.id for name, command in table.items()} == {
        name: int(member) for name, member in ids.__members__.items() if name not in ends
    }
    for command in table.values():
        assert (command.struct is None) == (command.arg == "none")
        assert command.struct is None or command.struct in STRUCTS
        assert command.families


def test_snp_commands_are_the_ones_from_100_on() -> None:
    snp_only = {name for name, command in SEV_COMMANDS.items() if command.families == ("snp",)}
    assert snp_only == {name for name, command in SEV_COMMANDS.items() if command.id >= 100}
    assert SEV_COMMANDS["KVM_SEV_INIT2"].families == ("sev", "es", "snp")


def test_constants_are_in_one_group_each() -> None:
    assert sum(len(kind.__members__) for kind in constants.GROUPS.values()) == len(ALL)


def test_constants_are_module_attributes() -> None:
    for name, number in ALL.items():
        member = getattr(constants, name)
        assert int(member) == number
        assert isinstance(member, tuple(constants.GROUPS.values()))


def test_no_name_is_a_constant_and_an_ioctl() -> None:
    assert not ALL.keys() & IOCTLS.keys()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_CAP_NR_VCPUS", 9),
        ("KVM_CAP_GUEST_MEMFD", 234),
        ("KVM_CAP_GUEST_MEMFD_FLAGS", 244),
        ("KVM_EXIT_MEMORY_FAULT", 39),
        ("KVM_EXIT_SNP_REQ_CERTS", 43),
        ("KVM_X86_SNP_VM", 4),
        ("KVM_MEM_GUEST_MEMFD", 4),
        ("KVM_MEMORY_ATTRIBUTE_PRIVATE", 8),
        ("KVM_SEV_SNP_LAUNCH_START", 100),
        ("SEV_RET_NO_FW_CALL", -1),
        ("SEV_RET_BAD_MEASUREMENT", 0xB),
        ("MSR_KVM_STEAL_TIME", 0x4B564D03),
        ("KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL", 0xFFFFFFFF),
        ("KVM_XEN_INVALID_GFN", (1 << 64) - 1),
        ("kvm_ioeventfd_flag_nr_max", 5),
        ("UFFD_FEATURE_MOVE", 1 << 16),
    ],
)
def test_constant(name: str, number: int) -> None:
    assert ALL[name] == number


def test_capability_and_exit_numbers_are_unique() -> None:
    assert len({int(cap) for cap in Cap.__members__.values()}) == len(Cap.__members__)
    assert sorted(int(reason) for reason in ExitReason) == list(range(44))


def test_aliases_are_known_ones() -> None:
    aliases = {
        name
        for kind in constants.GROUPS.values()
        for name, member in kind.__members__.items()
        if member.name != name
    }
    ends = {name for name in aliases if re.search(r"_(MAX|MASK|SIZE|OFFSET)$", name)}
    assert aliases - ends == {
        "KVM_DEV_VFIO_GROUP",
        "KVM_DEV_VFIO_GROUP_ADD",
        "KVM_DEV_VFIO_GROUP_DEL",
        "KVM_PV_EOI_DISABLED",
        "KVM_PV_EOI_ENABLED",
        "KVM_XEN_INVALID_GPA",
        "SEV_RET_INAVLID_CONFIG",
        "UFFDIO",
        "UFFD_API",
    }


def _ioctls_in(node: ast.expr) -> str:
    """Return the ioctl that an item names: by name, as an attribute, or by its number."""
    for each in ast.walk(node):
        name = each.attr if isinstance(each, ast.Attribute) else each.id if isinstance(each, ast.Name) else ""
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            name = each.value
        if name in ioctls.IOCTLS:
            return name
    return ""


def _is_tuple(targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Tuple) for target in targets)


def _displays(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    # The right side of "a, b = c, d" is no set of anything.
    pairs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) if _is_tuple(node.targets)}
    for node in ast.walk(tree):
        items: list[ast.expr] = []
        if isinstance(node, (ast.Set, ast.List, ast.Tuple)) and node not in pairs:
            items = node.elts
        elif isinstance(node, ast.Dict):
            items = [key for key in node.keys if key is not None]
        names = [name for name in map(_ioctls_in, items) if name]
        if len(names) > 1 and isinstance(node, ast.expr):
            yield node.lineno, names


def test_a_display_of_ioctls_is_noticed() -> None:
    source = "a = {x.KVM_RUN.nr, x.KVM_NMI.nr}\nb = ('KVM_SMI', 'KVM_NMI')\nc = {KVM_RUN: 1, KVM_NMI: 2}\n"
    assert [line for line, _ in _displays(ast.parse(source))] == [1, 2, 3]
    assert not list(_displays(ast.parse("a, b = KVM_RUN.nr, KVM_NMI.nr\nc = (ioctls.KVM_RUN.nr, 5)\n")))


# What an errno of an ioctl means.
ERRORS = {"uapi/error_hints.py", "uapi/error_rules.py"}


def test_what_ioctls_mean_stands_in_the_table_alone() -> None:
    """No set, tuple or dict of ioctls outside the table: its columns say what they have in common."""
    package = Path(kvmpy.__file__).parent
    results = [
        f"{path.relative_to(package)}:{line}: {', '.join(names)}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in ERRORS
        for line, names in _displays(ast.parse(path.read_text()))
    ]
    assert results == []


def test_what_is_made_by_kvm_has_a_name() -> None:
    for op in ioctls.IOCTLS.values():
        assert bool(op.made_name) == (op.makes not in (None, "uffd")), op


def test_fields_of_the_table_exist() -> None:
    for op in ioctls.IOCTLS.values():
        names = [each.name for each in op.fd_fields] + [each.where for each in op.fd_fields if each.mask]
        names += [*op.addresses, *filter(None, [op.made_in, op.select, *op.volatile])]
        names += [each.pointer for each in op.pointers] + ([op.made_unless[0]] if op.made_unless else [])
        names += set(re.findall(r"\{(\w+)\}", op.made_name)) - {"arg", "count"}
        names += op.lasting.key if op.lasting is not None else ()
        for name in names:
            assert op.struct is not None, op
            assert field_place(op.struct, name)
