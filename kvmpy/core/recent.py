# SPDX-License-Identifier: Apache-2.0
"""The last ioctls of this process: kept by the funnel's C, decoded when a report asks for them.

What a tool asks of a VM itself (:func:`kvmpy.core.observe.inspecting`) is not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvmpy.core.errors import errno_name
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.error_hints import hint
from kvmpy.uapi.ioctls import BY_NR, KVM_RUN
from kvmpy.uapi.struct_base import CLASSES

_HEADER = ffi.sizeof("struct kvmpy_call")

keeps_runs = False
"""Whether KVM_RUN is kept, too; it takes the loop out of C.  Without, each vCPU has its ``trail()``."""


class Call(NamedTuple):
    """An ioctl that returned; *when* in ns, *kind* that of the descriptor.

    *struct* numbers the class of the argument *data* (0: it was *value*); of *times* KVM_RUNs in a row that
    ended for one reason *data* is the begin of the last one's kvm_run.
    """

    when: int
    thread: int
    kind: str
    fd: str
    request: int
    value: int
    struct: int
    data: bytes
    result: int
    errno: int
    times: int


def taken() -> list[Call]:
    """Return the last ioctls, the oldest first."""
    size = 0
    buffer = ffi.NULL
    # Other threads go on meanwhile.
    while (needed := lib.kvmpy_calls_read(buffer, size)) > size:
        size = needed
        buffer = ffi.new("char[]", size)
    calls = []
    place = 0
    while place < needed:
        call = ffi.cast("struct kvmpy_call *", buffer + place)
        data = bytes(ffi.buffer(buffer + place + _HEADER, call.size))
        kind, _, name = ffi.string(call.label).decode("utf-8", "replace").partition(" ")
        calls.append(
            Call(
                call.ns, call.thread, kind, name, call.request, call.value, call.kind, data,
                call.result, call.error, call.times,
            )
        )  # fmt: skip
        place += _HEADER + (call.size + 7 & ~7)
    return calls


def clear() -> None:
    """Forget all ioctls."""
    lib.kvmpy_calls_clear()


def remember_run(label: Any, run: Any, result: int, errno: int) -> None:
    """Keep a KVM_RUN of the vCPU with *label*, with those before it that ended for the same reason."""
    lib.kvmpy_call_note(label, KVM_RUN.nr, 0, run, lib.KVMPY_RUN_HEAD, lib.KVMPY_CALL_RUN, result, errno)


def of_vm(vm: str, taken: list[Call], most: int = 12) -> list[Call]:
    """Return the last *most* calls of *taken* on the VM named *vm* and on what belongs to it, but KVM_RUN."""
    own = [call for call in taken if call.request != KVM_RUN.nr and f"{call.fd}/".startswith(f"{vm}/")]
    return own[-most:]


def entries(taken: list[Call]) -> list[dict[str, Any]]:
    """Return calls as JSON-ready values, the oldest first.

    ``ms`` counts from the first, ``thread`` numbers the threads from 0, ``fd`` and ``ioctl`` are names,
    ``arg`` is the decoded argument as it was when the ioctl returned (for KVM_RUN: the exit), ``result`` its
    result or errno by name, ``meaning`` what that errno means for this ioctl.
    """
    threads: dict[int, int] = {}
    return [
        {
            "ms": round((call.when - taken[0].when) / 1e6, 3),
            "thread": threads.setdefault(call.thread, len(threads)),
            "fd": call.fd,
            "ioctl": _name(call.request),
            "arg": _argument(call),
            "result": errno_name(call.errno) if call.result < 0 else str(call.result),
            "failed": call.result < 0,
            "meaning": hint(_name(call.request), call.errno, call.data) if call.result < 0 else "",
            "count": call.times,
        }
        for call in taken
    ]


def line(entry: dict[str, Any]) -> str:
    """Return an entry as a line of text, with ``-1`` before an errno as in a trace."""
    argument = f" {entry['arg']}" if entry["arg"] else ""
    return f"{entry['fd']} {entry['ioctl']}{argument} = {'-1 ' if entry['failed'] else ''}{entry['result']}"


def _name(request: int) -> str:
    return BY_NR[request].name if request in BY_NR else f"ioctl {request:#x}"


def _argument(call: Call) -> str:
    # Here: what most programs never need would take time at every start.
    from kvmpy.uapi.argument_text import exit_words, run_of, struct_words
    from kvmpy.uapi.field_words import argument_words

    op = BY_NR.get(call.request)
    try:
        if call.struct == lib.KVMPY_CALL_RUN:
            return exit_words(run_of(call.data)) if call.result >= 0 else ""
        if call.struct:
            return struct_words(CLASSES[call.struct].from_bytes(call.data), call.kind)
        if op is not None and op.arg == "int":
            return argument_words(op, call.value)
        return f"arg={call.value:#x}" if call.value else ""
    except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
        return f"not decoded: {type(error).__name__}: {error}"
