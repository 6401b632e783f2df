# SPDX-License-Identifier: Apache-2.0
"""The names of a C reproducer, and the arguments of its ioctls with what pointers in them lead to."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmpy.debug.record.csource import (
    UnspeakableError,
    Vocabulary,
    braces,
    byte_rows,
    initializer,
    make_struct,
    number,
)
from kvmpy.debug.record.events import Ioctl, Object
from kvmpy.debug.record.format import PAGE_SIZE, ObjectKind
from kvmpy.debug.record.script import Node, Ref, Region, Script
from kvmpy.uapi.struct_base import FlexStruct

_BASES = {ObjectKind.SYSTEM: "kvm", ObjectKind.UFFD: "fd", ObjectKind.OTHER: "fd"}
# An argument's declarations stand in a block of their own.
_INDENT, _DEEPER = "\t\t", "\t\t\t"


@dataclass(frozen=True)
class Variable:
    """A C variable: *pointer* where its name is an address already; *array* lies behind a member ``head``."""

    name: str
    pointer: bool = False
    array: str = ""

    @property
    def address(self) -> str:
        """The expression for where it lies."""
        return self.name if self.pointer else f"&{self.name}"

    def member(self, path: str) -> str:
        """Return the expression for one of its fields."""
        inner = "head." if self.array and not path.startswith(f"{self.array}[") else ""
        return f"{self.name}{'->' if self.pointer else '.'}{inner}{path}"


@dataclass
class Scope:
    """What has to stand in front of an ioctl: declarations, and stores into what has no initialiser."""

    declarations: list[str] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)


class CArguments:
    """What the steps of *script* name: objects, memory, arguments.

    ``uses`` gathers which of the common parts of the file are needed.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.words = Vocabulary()
        self.uses: set[str] = set()
        self.names: dict[int, str] = {}
        self.used: dict[str, None] = {}
        self.memory: dict[Region, str] = {}
        self.rings: dict[Region, str] = {}
        self._label = 0
        self._name_objects()

    # Names.

    def _name_objects(self) -> None:
        counts: dict[str, int] = {}
        present = self._objects_used()
        single = sum(1 for i in present if self.script.objects[i].kind == ObjectKind.VM) < 2
        for ident in sorted(present):
            each = self.script.objects[ident]
            kind = ObjectKind(each.kind)
            base = _BASES.get(kind, kind.name.lower())
            if each.kind in (ObjectKind.VCPU, ObjectKind.GMEM) and not single:
                base = f"{self.names.get(each.parent, 'vm')}_{base}"
            count = counts.get(base, 0)
            counts[base] = count + 1
            alone = each.kind in (ObjectKind.SYSTEM, ObjectKind.SEV) or (
                each.kind == ObjectKind.VM and single
            )
            self.names[ident] = base if alone and not count else f"{base}{count}"

    def _objects_used(self) -> set[int]:
        used: set[int] = set()
        for step in self.script.steps:
            payload = step.entry.what
            if isinstance(payload, Ioctl):
                used |= {payload.object, step.makes}
            elif isinstance(payload, Object):
                used.add(payload.id)
        return used & self.script.objects.keys()

    def fd(self, ident: int) -> str:
        """Return the C variable of an object's descriptor, which the file then declares."""
        name = self.names.get(ident)
        if name is None:
            return "-1"
        self.used[name] = None
        return name

    def is_vcpu(self, ident: int) -> bool:
        """Tell whether an object is a vCPU that has a variable."""
        known = self.script.objects.get(ident)
        return known is not None and known.kind == ObjectKind.VCPU and ident in self.names

    def region(self, region: Region) -> str:
        """Return the C variable of memory that is written or given to KVM."""
        if not self.is_vcpu(region.object):
            return self.memory.setdefault(region, f"mem{len(self.memory)}")
        if region.offset:
            return self.rings.setdefault(region, f"{self.fd(region.object)}_ring")
        return f"(unsigned char *){self.fd(region.object)}_run"

    def label(self, base: str) -> str:
        """Return a new C name."""
        self._label += 1
        return f"{base}_{self._label}"

    # Arguments.

    def value(self, ref: Ref, scope: Scope) -> str:
        """Return the C expression for what *ref* names; *scope* gets what it needs."""
        if ref.region is not None:
            delta = ref.value - ref.region.start
            name = self.region(ref.region)
            return f"({name} + {delta:#x})" if delta else name
        if ref.node is not None:
            if ref.node.what is not None and ref.node.what.placed:
                return self._placed(ref.node, ref.value % PAGE_SIZE, scope)
            return self.node(ref.node, scope).address
        if ref.object:
            return f"({'uint32_t' if ref.size < 8 else 'uint64_t'}){self.fd(ref.object)}"
        if 0x1000 <= ref.value < 1 << 47:
            self.uses.add("bad_address")
            return f"(bad_address + {ref.value & 0xFFF:#x})" if ref.value & 0xFFF else "bad_address"
        return number(ref.value)

    def node(self, node: Node, scope: Scope) -> Variable:
        """Declare the memory of *node* and return its variable."""
        inner = {ref.offset: self.value(ref, scope) for ref in node.refs}
        if node.struct is None:
            return self._plain(node, inner, scope)
        name = self.label(node.struct.removeprefix("kvm_"))
        try:
            value = make_struct(node.struct, node.data)
            if isinstance(value, FlexStruct) and len(node.data) > value.SIZE:
                return self._open_array(value, name, scope)
            lines = initializer(value, self.words, inner.get, _DEEPER)
        except (UnspeakableError, ValueError):
            return self._raw(node, name, inner, scope)
        kind = self.words.struct(node.struct)
        text = [f"{_INDENT}{kind} {name} = {{", *lines, f"{_INDENT}}};"]
        scope.declarations += text if lines else [f"{_INDENT}{kind} {name} = {{ 0 }};"]
        return Variable(name)

    def _plain(self, node: Node, inner: dict[int, str], scope: Scope) -> Variable:
        name, size = self.label("data"), max(1, len(node.data))
        if node.what is not None and node.what.scalar and not inner:
            raw = int.from_bytes(node.data, "little")
            scope.declarations.append(f"{_INDENT}__u{8 * size} {name}[] = {{ {number(raw)} }};")
        elif any(node.data):
            rows = byte_rows(node.data.rstrip(b"\0"), _DEEPER)
            scope.declarations += [f"{_INDENT}unsigned char {name}[{size}] = {{", *rows, f"{_INDENT}}};"]
        else:
            scope.declarations.append(f"{_INDENT}unsigned char {name}[{size}] = {{ 0 }};")
        return Variable(name, pointer=True)

    def _placed(self, node: Node, offset: int, scope: Scope) -> str:
        name, size = self.label("data"), offset + max(1, len(node.data))
        place = f"{name}_page + {offset:#x}"
        scope.declarations.append(
            f"{_INDENT}static unsigned char {name}_page[{size}] __attribute__((aligned({PAGE_SIZE})));"
        )
        if any(node.data):
            rows = byte_rows(node.data.rstrip(b"\0"), _DEEPER)
            scope.declarations += [
                f"{_INDENT}static const unsigned char {name}[] = {{",
                *rows,
                f"{_INDENT}}};",
            ]
            scope.stores.append(f"{_INDENT}memcpy({place}, {name}, sizeof({name}));")
        return f"({place})"

    def _open_array(self, value: FlexStruct, name: str, scope: Scope) -> Variable:
        # Headers differ in whether an open array may be initialised: give it an array behind the struct.
        item = value.FIELDS[value.OPEN[-1]].ctype.item if len(value.OPEN) == 1 else None
        if item is None or value.COUNT is None or value.OPEN_OFFSET != value.SIZE:
            raise UnspeakableError(value.NAME)
        raw, inner = value.to_bytes(), _DEEPER + "\t"
        head = initializer(type(value).from_bytes(raw[: value.SIZE]), self.words, lambda _: None, inner)
        rows: list[str] = []
        # Of what has more room than was filled, the rest is zero.
        filled = -(-len(raw[value.SIZE :].rstrip(b"\0")) // value.ENTRY_SIZE)
        for each in value.entries_list()[:filled]:
            if isinstance(each, int):
                rows.append(f"{inner}{number(each)},")
            else:
                lines = initializer(each, self.words, lambda _: None, inner + "\t")
                rows += braces(inner, lines, inner)
        if item.kind == "struct":
            entry = self.words.struct(item.cname.removeprefix("struct "))
        else:
            entry = item.cname.replace("uint", "__u").removesuffix("_t")
        scope.declarations += [
            f"{_INDENT}static struct {{",
            f"{_DEEPER}{self.words.struct(value.NAME)} head;",
            f"{_DEEPER}{entry} {value.OPEN[-1]}[{max(1, value.room)}];",
            f"{_INDENT}}} {name} = {{",
            *([f"{_DEEPER}.head = {{", *head, f"{_DEEPER}}},"] if head else [f"{_DEEPER}.head = {{ 0 }},"]),
            *([f"{_DEEPER}.{value.OPEN[-1]} = {{", *rows, f"{_DEEPER}}},"] if rows else []),
            f"{_INDENT}}};",
        ]
        return Variable(name, array=value.OPEN[-1])

    def _raw(self, node: Node, name: str, inner: dict[int, str], scope: Scope) -> Variable:
        kind = self.words.struct(node.struct or "")
        rows = byte_rows(node.data.rstrip(b"\0"), _DEEPER) or [_DEEPER + "0"]
        store = f"{name}_raw"
        scope.declarations += [
            f"{_INDENT}static unsigned char {store}[{len(node.data)}] __attribute__((aligned(16))) = {{",
            *rows,
            f"{_INDENT}}};",
            f"{_INDENT}{kind} *{name} = (void *){store};",
        ]
        for ref in node.refs:
            value = f"(uint{8 * ref.size}_t){{ (uintptr_t){inner[ref.offset]} }}"
            scope.stores.append(f"{_INDENT}memcpy({store} + {ref.offset}, &{value}, {ref.size});")
        return Variable(name, pointer=True)
