# SPDX-License-Identifier: Apache-2.0
"""The names of a C reproducer, and the arguments of its ioctls with what pointers in them lead to."""

from __future__ import annotations

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


class CArguments:
    """What the steps of *script* name: objects, memory, arguments."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.words = Vocabulary()
        self.needs: set[str] = set()
        self.names: dict[int, str] = {}
        self.regions: dict[Region, str] = {}
        self._label = 0
        self._name_objects()

    def need(self, name: str) -> None:
        """Note that the file needs one of the common parts."""
        self.needs.add(name)

    # Names.

    def _name_objects(self) -> None:
        counts: dict[str, int] = {}
        kinds = {
            ObjectKind.SYSTEM: "kvm", ObjectKind.VM: "vm", ObjectKind.VCPU: "vcpu", ObjectKind.GMEM: "gmem",
            ObjectKind.DEVICE: "device", ObjectKind.STATS: "stats", ObjectKind.SEV: "sev",
            ObjectKind.EVENTFD: "eventfd", ObjectKind.MEMFD: "memfd",
        }  # fmt: skip
        present = self._objects_used()
        single = sum(1 for i in present if self.script.objects[i].kind == ObjectKind.VM) < 2
        for ident in sorted(present):
            each = self.script.objects[ident]
            base = kinds.get(ObjectKind(each.kind), "fd")
            if each.kind in (ObjectKind.VCPU, ObjectKind.GMEM) and not single:
                base = f"{self.names.get(each.parent, 'vm')}_{base}"
            count = counts.get(base, 0)
            counts[base] = count + 1
            alone = each.kind in (ObjectKind.SYSTEM, ObjectKind.SEV) or (
                each.kind == ObjectKind.VM and single
            )
            self.names[ident] = base if alone and not count else f"{base}{count}"

    def _objects_used(self) -> set[int]:
        found: set[int] = set()
        for step in self.script.steps:
            what = step.entry.what
            if isinstance(what, Ioctl):
                found.add(what.object)
                if step.makes:
                    found.add(step.makes)
            elif isinstance(what, Object):
                found.add(what.id)
        return found & self.script.objects.keys()

    def fd(self, ident: int) -> str:
        """Return the C variable of an object's descriptor."""
        return self.names.get(ident, "-1")

    def region(self, region: Region) -> str:
        """Return the C variable of a memory region."""
        if region not in self.regions:
            owner = self.script.objects.get(region.object)
            if owner is not None and owner.kind == ObjectKind.VCPU:
                self.regions[region] = f"{self.fd(region.object)}_{'ring' if region.offset else 'run'}"
            else:
                self.regions[region] = f"mem{sum(1 for n in self.regions.values() if n.startswith('mem'))}"
        return self.regions[region]

    def label(self, base: str) -> str:
        """Return a new C name."""
        self._label += 1
        return f"{base}_{self._label}"

    # Arguments.

    def value(self, ref: Ref, before: list[str], after: list[str], indent: str) -> str:
        """Return the C expression for what *ref* names; *before* gets declarations that it needs."""
        if ref.region is not None:
            delta = ref.value - ref.region.start
            name = self.region(ref.region)
            base = f"(unsigned char *){name}" if name.endswith("_run") else name
            return f"({base} + {delta:#x})" if delta else f"{name}"
        if ref.node is not None:
            if ref.node.what is not None and ref.node.what.placed:
                return self._placed(ref.node, ref.value % PAGE_SIZE, before, indent)
            name = self.node(ref.node, before, after, indent)
            return name if ref.node.struct is None else f"&{name}"
        if ref.object:
            return f"(uint32_t){self.fd(ref.object)}" if ref.size < 8 else f"(uint64_t){self.fd(ref.object)}"
        if 0x1000 <= ref.value < 1 << 47:
            self.need("bad")
            return f"(bad_address + {ref.value & 0xFFF:#x})" if ref.value & 0xFFF else "bad_address"
        return number(ref.value)

    def node(self, node: Node, before: list[str], after: list[str], indent: str) -> str:
        """Declare the memory of *node* and return its name."""
        inner = {ref.offset: self.value(ref, before, after, indent) for ref in node.refs}
        if node.struct is None:
            name = self.label("data")
            if node.what is not None and node.what.scalar and not inner:
                raw = int.from_bytes(node.data, "little")
                before.append(f"{indent}__u{8 * len(node.data)} {name}[] = {{ {number(raw)} }};")
            elif any(node.data):
                rows = byte_rows(node.data.rstrip(b"\0"), indent + "\t")
                size = len(node.data)
                before += [f"{indent}unsigned char {name}[{size}] = {{", *rows, f"{indent}}};"]
            else:
                before.append(f"{indent}unsigned char {name}[{max(1, len(node.data))}] = {{ 0 }};")
            return name
        name = self.label(node.struct.removeprefix("kvm_"))
        try:
            value = make_struct(node.struct, node.data)
            if isinstance(value, FlexStruct) and len(node.data) > value.SIZE:
                return self._open_array(value, name, before, indent)
            lines = initializer(value, self.words, lambda at: inner.get(at), indent + "\t")
        except (UnspeakableError, ValueError):
            return self._raw(node, name, inner, before, indent)
        kind = self.words.struct(node.struct)
        if lines:
            before += [f"{indent}{kind} {name} = {{", *lines, f"{indent}}};"]
        else:
            before.append(f"{indent}{kind} {name} = {{ 0 }};")
        return name

    def _placed(self, node: Node, offset: int, before: list[str], indent: str) -> str:
        name, size = self.label("data"), offset + max(1, len(node.data))
        place = f"{name}_page + {offset:#x}"
        before.append(
            f"{indent}static unsigned char {name}_page[{size}] __attribute__((aligned({PAGE_SIZE})));"
        )
        if any(node.data):
            rows = byte_rows(node.data.rstrip(b"\0"), indent + "\t")
            before += [f"{indent}static const unsigned char {name}[] = {{", *rows, f"{indent}}};"]
            before.append(f"{indent}\x00memcpy({place}, {name}, sizeof({name}));")
        return f"({place})"

    def _open_array(self, value: FlexStruct, name: str, before: list[str], indent: str) -> str:
        # Headers differ in whether an open array may be initialised: give it an array behind the struct.
        item = value.FIELDS[value.OPEN[-1]].ctype.item if len(value.OPEN) == 1 else None
        if item is None or value.COUNT is None or value.OPEN_OFFSET != value.SIZE:
            raise UnspeakableError(value.NAME)
        count = min(len(value), value.room)
        head = type(value).from_bytes(value.to_bytes()[: value.SIZE])
        deeper = indent + "\t"
        kind = self.words.struct(value.NAME)
        if item.kind == "struct":
            entry = self.words.struct(item.cname.removeprefix("struct "))
        else:
            entry = item.cname.replace("uint", "__u").removesuffix("_t")
        before += [
            f"{indent}static struct {{",
            f"{deeper}{kind} head;",
            f"{deeper}{entry} {value.OPEN[-1]}[{max(1, count)}];",
            f"{indent}}} {name} = {{",
            f"{deeper}.head = {{",
            *initializer(head, self.words, lambda _: None, deeper + "\t"),
            f"{deeper}}},",
        ]
        if count:
            before.append(f"{deeper}.{value.OPEN[-1]} = {{")
            for each in value.entries_list():
                if isinstance(each, int):
                    before.append(f"{deeper}\t{number(each)},")
                    continue
                lines = initializer(each, self.words, lambda _: None, deeper + "\t\t")
                before += braces(deeper + "\t", lines, deeper + "\t")
            before.append(f"{deeper}}},")
        before.append(f"{indent}}};")
        return name

    def _raw(self, node: Node, name: str, inner: dict[int, str], before: list[str], indent: str) -> str:
        kind = self.words.struct(node.struct or "")
        size = len(node.data)
        rows = byte_rows(node.data.rstrip(b"\0"), indent + "\t") or [indent + "\t0"]
        store = f"{name}_raw"
        before += [
            f"{indent}static unsigned char {store}[{size}] __attribute__((aligned(16))) = {{",
            *rows,
            f"{indent}}};",
            f"{indent}{kind} *{name}_at = (void *){store};",
        ]
        for ref in node.refs:
            kind_of = f"uint{8 * ref.size}_t"
            text = inner[ref.offset]
            before.append(f"{indent}{kind_of} {name}_{ref.offset} = ({kind_of})(uintptr_t){text};")
        for ref in node.refs:
            at = f"{store} + {ref.offset}"
            before.append(f"{indent}\x00memcpy({at}, &{name}_{ref.offset}, {ref.size});")
        return f"(*{name}_at)"
