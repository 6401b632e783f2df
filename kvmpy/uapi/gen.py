# SPDX-License-Identifier: Apache-2.0
"""The stubs that tell type checkers what structs.py and constants/ make at run time (:mod:`kvmpy.gen`)."""

from __future__ import annotations

from pathlib import Path

from kvmpy.uapi import constants, structs
from kvmpy.uapi.struct_base import Field, FlexStruct, Struct

HERE = Path(__file__).resolve().parent
_WIDTH = 110

_HEAD = "# SPDX-License-Identifier: Apache-2.0\n# Written by kvmpy/uapi/gen.py: do not edit.\n"

_STRUCTS_HEAD = (
    _HEAD
    + """from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from kvmpy.uapi.struct_arrays import ByteArray as ByteArray
from kvmpy.uapi.struct_arrays import IntArray as IntArray
from kvmpy.uapi.struct_arrays import NestedArray as NestedArray
from kvmpy.uapi.struct_arrays import StructArray as StructArray
from kvmpy.uapi.struct_base import Field as Field
from kvmpy.uapi.struct_base import FlexStruct as FlexStruct
from kvmpy.uapi.struct_base import Struct as Struct

_S = TypeVar("_S", bound=Struct)

class _Nested(Generic[_S]):
    def __get__(self, obj: object, kind: Any = ...) -> _S: ...
    def __set__(self, obj: object, value: _S | Mapping[str, object]) -> None: ...

class _Structs(Generic[_S]):
    def __get__(self, obj: object, kind: Any = ...) -> StructArray[_S]: ...
    def __set__(self, obj: object, value: Iterable[_S | Mapping[str, object]]) -> None: ...

class _Ints:
    def __get__(self, obj: object, kind: Any = ...) -> IntArray: ...
    def __set__(self, obj: object, value: Iterable[int]) -> None: ...

class _Bytes:
    def __get__(self, obj: object, kind: Any = ...) -> ByteArray: ...
    def __set__(self, obj: object, value: Iterable[int]) -> None: ...

class _Rows:
    def __get__(self, obj: object, kind: Any = ...) -> NestedArray: ...
    def __set__(self, obj: object, value: Iterable[Iterable[int]]) -> None: ...

COUNTS: dict[str, str]
STRUCTS: dict[str, type[Struct]]
NESTED: dict[str, type[Struct]]
"""
)


def _tag(ctype: object) -> str:
    return str(ctype).split("'")[1].split(" ", 1)[1]


def _types(field: Field) -> tuple[str, str]:
    """Return the type of the attribute, and what the constructor takes for it."""
    ctype = field.ctype
    if ctype.kind == "primitive":
        return "int", "int"
    if ctype.kind != "array":
        tag = _tag(ctype)
        return f"_Nested[{tag}]", f"{tag} | Mapping[str, object]"
    item = ctype.item
    if item.kind == "array":
        return "_Rows", "Iterable[Iterable[int]]"
    if item.kind in ("struct", "union"):
        tag = _tag(item)
        return f"_Structs[{tag}]", f"Iterable[{tag} | Mapping[str, object]]"
    return ("_Bytes" if item.cname == "uint8_t" else "_Ints"), "Iterable[int]"


def _entry(kind: type[FlexStruct]) -> str:
    owner: type[Struct] = kind
    for name in kind.OPEN[:-1]:
        owner = structs.STRUCTS[_tag(owner.FIELDS[name].ctype)]
    item = owner.FIELDS[kind.OPEN[-1]].ctype.item
    return "int" if item.kind == "primitive" else _tag(item)


def _class(kind: type[Struct]) -> str:
    base = FlexStruct if issubclass(kind, FlexStruct) else Struct
    lines = [f"\nclass {kind.__name__}({base.__name__}):"]
    for field in kind.FIELDS.values():
        ignore = "  # type: ignore[assignment]" if callable(getattr(base, field.attribute, None)) else ""
        lines.append(f"    {field.attribute}: {_types(field)[0]}{ignore}")
    lines += ["    def __init__(", "        self,", "        *,"]
    lines += [f"        {field.attribute}: {_types(field)[1]} = ...," for field in kind.FIELDS.values()]
    lines.append("    ) -> None: ...")
    if issubclass(kind, FlexStruct):
        lines.append(f"    def entries_list(self) -> list[{_entry(kind)}]: ...")
    return "\n".join(lines) + "\n"


def structs_stub() -> str:
    """Return the content of structs.pyi."""
    kinds = {**structs.NESTED, **structs.STRUCTS}
    return _STRUCTS_HEAD + "".join(_class(kinds[name]) for name in sorted(kinds))


def _final(name: str, value: str) -> str:
    line = f"{name}: Final = {value}"
    return line if len(line) <= _WIDTH else f"{name}: Final = (\n    {value}\n)"


def constants_stub() -> str:
    """Return the content of constants/__init__.pyi."""
    lines = [
        _HEAD + "from enum import IntEnum, IntFlag",
        "from types import ModuleType",
        "from typing import Final",
        "",
    ]
    for topic in sorted(constants.TOPICS, key=lambda each: each.__name__):
        module = topic.__name__
        names = [name for name, kind in constants.GROUPS.items() if kind.__module__ == module]
        names.sort(key=lambda name: (not name.isupper(), name.lower()))
        lines += [f"from {module} import {name} as {name}" for name in names]
    lines += [
        "",
        "TOPICS: tuple[ModuleType, ...]",
        "GROUPS: dict[str, type[IntEnum | IntFlag]]",
        "ALL: dict[str, int]",
    ]
    for name, kind in constants.GROUPS.items():
        lines.append("")
        lines += [_final(member, f"{name}.{member}") for member in kind.__members__]
    return "\n".join(lines) + "\n"


def stubs() -> dict[Path, str]:
    """Return every generated file with its content."""
    return {
        HERE / "structs.pyi": structs_stub(),
        HERE / "constants" / "__init__.pyi": constants_stub(),
    }
