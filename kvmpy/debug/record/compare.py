# SPDX-License-Identifier: Apache-2.0
"""Two outcomes of one ioctl side by side: what differs, field by field, and what may differ anyway."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpy.debug.record.script import Step
from kvmpy.uapi import ioctls
from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.constants import (
    KVM_EXIT_IO,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    ExitReason,
)
from kvmpy.uapi.struct_base import FlexStruct, Struct
from kvmpy.uapi.struct_text import EXIT_MEMBERS
from kvmpy.uapi.structs import kvm_run

RUN_HEAD = kvm_run.fields()["io"][0]
REASON_AT = kvm_run.fields()["exit_reason"][0]
_UNION_END = kvm_run.fields()["kvm_valid_regs"][0]

# TSC, APERF and MPERF, TSC deadline, Hyper-V's reference counters.
_VOLATILE_MSRS = {0x10, 0xE7, 0xE8, 0x6E0, 0x4000_0010, 0x4000_0020, 0x4000_0022}
_PAD = re.compile(r"\b(pad|padding|reserved)\d*(\[|$)")
_POINTER = re.compile(r"(uaddr|userspace_addr|address|addr|dirty_bitmap|bitmap)(_\w+)?$")


@dataclass(frozen=True)
class Difference:
    """One thing that differs: what it is called, what was recorded, what there is now."""

    name: str
    recorded: str
    now: str


@dataclass(frozen=True)
class Outcome:
    """What an ioctl did: the argument behind it, and for KVM_RUN the pieces of the run area.

    *rip* is where the guest stood after it, where that was asked for.
    """

    result: int
    errno: int
    after: bytes | None = None
    run: tuple[tuple[int, bytes], ...] = ()
    rip: int | None = None


def recorded_outcome(step: Step) -> Outcome:
    """Return what the record says of *step*, an ioctl."""
    ioctl = step.ioctl
    if ioctl is None:
        raise ValueError(f"step {step.index} is not an ioctl")
    after = step.argument.node.after if step.argument is not None and step.argument.node else None
    return Outcome(ioctl.result, ioctl.errno, after, step.run_out)


def result_text(outcome: Outcome) -> str:
    """Return result and errno as text."""
    if outcome.result >= 0:
        return str(outcome.result)
    return f"-1 {errno.errorcode.get(outcome.errno, str(outcome.errno))}"


def differences(step: Step, then: Outcome, now: Outcome) -> list[Difference]:
    """Return where *now* differs from *then*, but for what may, and for what no program ever did."""
    if step.entry.frame.synthetic:
        return []
    results: list[Difference] = []
    same = then.errno == now.errno and (then.result >= 0) == (now.result >= 0)
    if same and not step.makes and "" not in volatile(step.request):
        same = then.result == now.result
    if not same:
        results.append(Difference("result", result_text(then), result_text(now)))
    if step.request == ioctls.KVM_RUN.nr:
        if not (then.result < 0 and now.result < 0 and then.errno == errno.EINTR):
            results += _run_differences(then, now)
    elif then.after is not None and now.after is not None and not (results or step.unsteady):
        # An answer that counts itself is recorded as far as it goes, and the array here has more room.
        answer = now.after[: len(then.after)]
        if answer != then.after:
            results += _struct_differences(step, then.after, answer)
    return results


def volatile(request: int) -> tuple[str, ...]:
    """Return the fields of an ioctl's answer that no two runs share; ``""`` is all of it."""
    return ioctls.BY_NR[request].volatile if request in ioctls.BY_NR else ()


def exit_reason(outcome: Outcome) -> int | None:
    """Return the exit reason in *outcome*, None where it is not there."""
    head = next((data for offset, data in outcome.run if offset == 0), b"")
    return int.from_bytes(head[REASON_AT : REASON_AT + 4], "little") if len(head) >= RUN_HEAD else None


def reason_text(reason: int | None) -> str:
    """Return the name of an exit reason."""
    if reason is None:
        return "?"
    try:
        return ExitReason(reason).name
    except ValueError:
        return f"exit {reason}"


def exit_payload(outcome: Outcome) -> dict[str, str]:
    """Return the fields of an exit that tell it from another, as text."""
    head = next((data for offset, data in outcome.run if offset == 0), b"")
    reason = exit_reason(outcome)
    if reason is None:
        return {}
    run = kvm_run.from_bytes(head[: kvm_run.SIZE].ljust(kvm_run.SIZE, b"\0"))
    member = EXIT_MEMBERS.get(reason, "")
    if not member:
        return {}
    fields = dict(_flat(getattr(run, member), member))
    if reason == KVM_EXIT_IO:
        fields.pop("io.data_offset", None)
        if run.io.direction == KVM_EXIT_IO_OUT:
            data = next((part for offset, part in outcome.run if offset == run.io.data_offset), b"")
            fields["io.data"] = data.hex()
    elif reason == KVM_EXIT_MMIO and not run.mmio.is_write:
        fields.pop("mmio.data", None)
    elif member == "internal":
        # The words behind the suberror are for people; some of them are addresses of this boot.
        fields = {name: text for name, text in fields.items() if name == "internal.suberror"}
        failure = run.emulation_failure
        has_bytes = failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if run.internal.suberror == KVM_INTERNAL_ERROR_EMULATION and has_bytes:
            fields["emulation_failure.insn_bytes"] = failure.insn_bytes[: failure.insn_size].hex()
    fields.pop("fail_entry.cpu", None)
    return {name: text for name, text in fields.items() if not _PAD.search(name)}


def _run_differences(then: Outcome, now: Outcome) -> Iterator[Difference]:
    before, after = exit_reason(then), exit_reason(now)
    if before is None or after is None:
        return
    if before != after:
        yield Difference("exit_reason", reason_text(before), reason_text(after))
        return
    old, new = exit_payload(then), exit_payload(now)
    for name in old:
        if old[name] != new.get(name):
            yield Difference(name, old[name], new.get(name, "-"))


def _struct_differences(step: Step, then: bytes, now: bytes) -> Iterator[Difference]:
    node = step.argument.node if step.argument is not None else None
    unsteady = volatile(step.request)
    if "" in unsteady:
        return
    if node is None or node.struct is None:
        yield Difference("argument", then.hex(), now.hex())
        return
    kind = struct_class(node.struct)
    references = {ref.offset for ref in node.refs}
    try:
        old, new = dict(_flat(_make(kind, then), "")), dict(_flat(_make(kind, now), ""))
    except ValueError:
        yield Difference("argument", then.hex(), now.hex())
        return
    pointers = {name for name, (offset, _) in kind.fields().items() if offset in references}
    for name in old.keys() | new.keys():
        top = re.split(r"[.\[]", name)[0]
        if top in unsteady or top in pointers or _POINTER.search(name):
            continue
        if node.struct == "kvm_msrs" and name.endswith(".data"):
            index = old.get(name.replace(".data", ".index"), "0")
            if int(index, 0) in _VOLATILE_MSRS:
                continue
        if old.get(name) != new.get(name):
            yield Difference(name, old.get(name, "-"), new.get(name, "-"))


def _make(kind: type[Struct], data: bytes) -> Struct:
    if issubclass(kind, FlexStruct):
        return kind.from_bytes(data)
    return kind.from_bytes(data[: kind.SIZE].ljust(kind.SIZE, b"\0"))


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Struct):
        for attribute in value.FIELDS:
            yield from _flat(getattr(value, attribute), f"{name}.{attribute}" if name else attribute)
    elif isinstance(value, int):
        yield name, hex(value)
    elif hasattr(value, "to_bytes") and not hasattr(value, "_kind"):
        yield name, value.to_bytes().hex()
    else:
        for number, item in enumerate(value):  # type: ignore[arg-type,var-annotated]
            yield from _flat(item, f"{name}[{number}]")


def comparable(step: Step, after: bytes) -> Iterator[tuple[str, int]]:
    """Yield the numbers of an argument, by their path in C, that have to be the same every time."""
    node = step.argument.node if step.argument is not None else None
    if node is None or node.struct is None:
        return
    kind = struct_class(node.struct)
    references = {ref.offset for ref in node.refs}
    pointers = {name for name, (offset, _) in kind.fields().items() if offset in references}
    unsteady = volatile(step.request)
    value = _make(kind, after)
    for name, text in _flat(value, ""):
        top = re.split(r"[.\[]", name)[0]
        if top in unsteady or top in pointers or not text.startswith("0x"):
            continue
        # Not every kernel's headers name the padding.
        if _POINTER.search(name) or _PAD.search(name):
            continue
        yield name, int(text, 16)
