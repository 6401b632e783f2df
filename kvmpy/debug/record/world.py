# SPDX-License-Identifier: Apache-2.0
"""The live counterpart of a script: descriptors, mappings and vCPUs that stand for the recorded ones."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import Any

from kvmpy.debug.record.compare import Outcome
from kvmpy.debug.record.events import Close, Event, FileCall, Ioctl, Kick, Object
from kvmpy.debug.record.format import (
    FILE_FALLOCATE,
    MAP_NO_READ,
    MAP_NO_WRITE,
    MAP_SHARED,
    PAGE_SIZE,
    ObjectKind,
)
from kvmpy.debug.record.prune import is_question
from kvmpy.debug.record.script import Node, Ref, Region, Script, Step
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.constants import KVM_DIRTY_LOG_PAGE_OFFSET
from kvmpy.uapi.structs import kvm_regs, kvm_run

_NORESERVE = 0x4000
_DIRTY_RING = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
_UNION_END = kvm_run.fields()["kvm_valid_regs"][0]
_IO = kvm_run.fields()["io"][0]
_BAD_FD = 1 << 20
# A run that goes on for so much longer than it did is stuck.
PATIENCE_NS = 5_000_000_000
_IMMEDIATE_EXIT = kvm_run.fields()["immediate_exit"][0]
# What of a run area KVM_RUN reads whatever the exit before it was.
_INPUTS = kvm_run.fields()["exit_reason"][0]
_INTERRUPTED = Outcome(-1, errno.EINTR)


class ReplayError(RuntimeError):
    """A step that cannot be carried out here; the text says which and why."""


class World:
    """Carries out the steps of *script* one by one, on request of whoever keeps the order."""

    def __init__(
        self,
        script: Script,
        device: str = "/dev/kvm",
        patience_ns: int = PATIENCE_NS,
        *,
        probe: bool = False,
    ) -> None:
        self.script = script
        self._probe = probe
        self._patience = patience_ns
        self._device = device
        self.fds: dict[int, int] = {}
        self._areas: dict[Region, mmap.mmap] = {}
        self._vcpus: dict[int, Any] = {}
        # Exits that vCPUs came to in runs that were interrupted when they were recorded.
        self._early: dict[int, Outcome] = {}
        self._bad: mmap.mmap | None = None
        for region in script.regions:
            if region.object == 0:
                self._map(region, -1)

    # Memory.

    def _map(self, region: Region, fd: int) -> None:
        if fd < 0:
            kind = mmap.MAP_SHARED if region.flags & MAP_SHARED else mmap.MAP_PRIVATE
            rights = 0 if region.flags & MAP_NO_READ else mmap.PROT_READ
            rights |= 0 if region.flags & MAP_NO_WRITE else mmap.PROT_WRITE
            area = mmap.mmap(-1, region.size, kind | mmap.MAP_ANONYMOUS | _NORESERVE, rights)
        else:
            area = mmap.mmap(
                fd, region.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=region.offset
            )
        self._areas[region] = area
        for offset, data in region.initial:
            area[offset : offset + len(data)] = data

    def address(self, region: Region) -> int:
        """Return where *region* lies now; an address that cannot be used where it could not be made."""
        area = self._areas.get(region)
        return self.bad_address() if area is None else int(ffi.cast("uintptr_t", ffi.from_buffer(area)))

    def bad_address(self) -> int:
        """Return an address that faults whoever touches it."""
        if self._bad is None:
            self._bad = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
        return int(ffi.cast("uintptr_t", ffi.from_buffer(self._bad)))

    # Steps.

    def do(self, step: Step) -> Outcome | None:
        """Carry *step* out; the outcome where it is an ioctl."""
        payload = step.entry.what
        if step.ioctl is not None:
            return self._run(step) if step.request == ioctls.KVM_RUN.nr else self._ioctl(step)
        if isinstance(payload, Object):
            self._open(payload)
        elif step.region is not None and not step.data:
            if step.region.object in self.fds:
                with contextlib.suppress(OSError):
                    self._map(step.region, self.fds[step.region.object])
        elif step.region is not None:
            self._write(step)
        elif isinstance(payload, Kick):
            vcpu = self._vcpus.get(payload.object)
            if vcpu is not None:
                lib.kvmpy_vcpu_kick(vcpu)
        elif isinstance(payload, FileCall):
            if payload.call == FILE_FALLOCATE and payload.object in self.fds:
                lib.kvmpy_fallocate(self.fds[payload.object], payload.mode, payload.offset, payload.length)
        elif isinstance(payload, Event):
            if payload.object in self.fds:
                os.eventfd_write(self.fds[payload.object], payload.value)
        elif isinstance(payload, Close):
            self._close(payload.object)
        return None

    def _write(self, step: Step) -> None:
        region = step.region
        area = self._areas.get(region) if region is not None else None
        if region is None or area is None:
            return
        offset = step.entry.what.address - region.start  # type: ignore[union-attr]
        area[offset : offset + len(step.data)] = step.data

    def _open(self, event: Object) -> None:
        if event.kind == ObjectKind.SYSTEM:
            self.fds[event.id] = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        elif event.kind == ObjectKind.EVENTFD:
            self.fds[event.id] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        elif event.kind == ObjectKind.SEV:
            with contextlib.suppress(OSError):
                self.fds[event.id] = os.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC)
        elif event.kind == ObjectKind.GMEM and event.parent in self.fds:
            self.fds[event.id] = os.dup(self.fds[event.parent])
        elif event.kind == ObjectKind.MEMFD:
            self.fds[event.id] = os.memfd_create("kvmpy", os.MFD_CLOEXEC)
        elif event.kind == ObjectKind.OTHER and event.name.startswith("/dev/"):
            with contextlib.suppress(OSError):
                self.fds[event.id] = os.open(event.name, os.O_RDWR | os.O_CLOEXEC)
        elif event.kind in (ObjectKind.VM, ObjectKind.VCPU):
            raise ReplayError(
                f"{event.name} existed before recording began: the record does not say how it was made"
            )

    def _ioctl(self, step: Step) -> Outcome:
        ioctl = step.ioctl
        if ioctl is None or ioctl.object not in self.fds:
            raise ReplayError(f"step {step.index}: its file descriptor does not exist here")
        if step.unsteady and not is_question(step):
            # The recorded state takes the place of what the guest has done since.
            self._early.pop(ioctl.object, None)
        keep: list[Any] = []
        place: Any = None
        if step.argument is None:
            value = ioctl.arg
        elif step.argument.node is not None:
            place = self._fill(step.argument.node, keep)
            value = int(ffi.cast("uintptr_t", place))
        else:
            value = self._value(step.argument, keep)
        if step.request == ioctls.KVM_RESET_DIRTY_RINGS.nr:
            self._harvest(ioctl.result)
        result = lib.kvmpy_ioctl(ffi.NULL, self.fds[ioctl.object], ioctl.request, value)
        number = ffi.errno if result < 0 else 0
        after = None
        if place is not None and step.argument is not None and step.argument.node is not None:
            after = bytes(ffi.buffer(place, len(step.argument.node.data)))
        if step.makes and result >= 0:
            self._made(step, result, after)
        return Outcome(result, number, after)

    def _made(self, step: Step, result: int, after: bytes | None) -> None:
        fd = result
        if step.request == ioctls.KVM_CREATE_DEVICE.nr and after is not None:
            fd = int.from_bytes(after[4:8], "little")
        if step.request == ioctls.KVM_CREATE_GUEST_MEMFD.nr:
            os.set_inheritable(fd, False)
        self.fds[step.makes] = fd

    def _fill(self, node: Node, keep: list[Any], address: int = 0) -> Any:
        room = PAGE_SIZE if node.what is not None and node.what.placed else 0
        raw = ffi.new("uint64_t[]", (len(node.data) + room + 7) // 8 + 1)
        keep.append(raw)
        place = ffi.cast("uint8_t *", raw)
        if room:
            place += (address - int(ffi.cast("uintptr_t", raw))) % PAGE_SIZE
        ffi.memmove(place, node.data, len(node.data))
        for ref in node.refs:
            value = self._value(ref, keep)
            ffi.memmove(
                place + ref.offset, (value & (1 << 8 * ref.size) - 1).to_bytes(ref.size, "little"), ref.size
            )
        return place

    def _value(self, ref: Ref, keep: list[Any]) -> int:
        if ref.region is not None:
            return self.address(ref.region) + ref.value - ref.region.start
        if ref.node is not None:
            return int(ffi.cast("uintptr_t", self._fill(ref.node, keep, ref.value)))
        if ref.object:
            return self.fds.get(ref.object, _BAD_FD)
        # What nobody could read keeps its alignment, and cannot be read here either.
        return self.bad_address() + (ref.value & 0xFFF) if 0x1000 <= ref.value < 1 << 47 else ref.value

    def _vcpu(self, step: Step) -> tuple[Any, mmap.mmap]:
        call = step.ioctl
        ident = call.object if call is not None else 0
        region = next((r for r in self._areas if r.object == ident and not r.offset), None)
        if region is None:
            region = Region(0, self._mmap_size(), ident)
            if ident not in self.fds:
                raise ReplayError(f"step {step.index}: the vCPU does not exist here")
            self._map(region, self.fds[ident])
        area = self._areas[region]
        vcpu = self._vcpus.get(ident)
        if vcpu is None:
            # lifetime: the mapping lives until close(), which drops the vCPU first.
            vcpu = lib.kvmpy_vcpu_new(self.fds[ident], ffi.cast("struct kvm_run *", ffi.from_buffer(area)))
            self._vcpus[ident] = vcpu
        return vcpu, area

    def _mmap_size(self) -> int:
        fd = next(
            fd for ident, fd in self.fds.items() if self.script.objects[ident].kind == ObjectKind.SYSTEM
        )
        return int(lib.kvmpy_ioctl(ffi.NULL, fd, ioctls.KVM_GET_VCPU_MMAP_SIZE.nr, 0))

    def prepare(self, step: Step) -> None:
        """Make what a KVM_RUN needs, before anybody may kick it."""
        if step.request == ioctls.KVM_RUN.nr:
            self._vcpu(step)

    def _run(self, step: Step) -> Outcome:
        vcpu, area = self._vcpu(step)
        ioctl = step.ioctl
        if ioctl is None:
            raise ReplayError(f"step {step.index} is not an ioctl")
        if ioctl.object in self._early:
            if step.ended_by_signal:
                return _INTERRUPTED
            for offset, data in step.run_in:
                if offset + len(data) <= _INPUTS:
                    area[offset : offset + len(data)] = data
            return self._early.pop(ioctl.object)
        for offset, data in step.run_in:
            if offset + len(data) <= len(area):
                area[offset : offset + len(data)] = data
        area[_IMMEDIATE_EXIT] = step.immediate_exit
        outcome = self._enter(step, ioctl, vcpu, area)
        if step.interrupted and step.unsteady and outcome.errno != errno.EINTR:
            # The guest was faster than it was: this is what the next run came to.
            self._early[ioctl.object] = outcome
            return _INTERRUPTED
        return outcome

    def _enter(self, step: Step, ioctl: Ioctl, vcpu: Any, area: mmap.mmap) -> Outcome:
        took = max(1, ioctl.end_ns - step.entry.frame.time_ns)
        patience = self._patience + 20 * took
        if step.interrupted:
            patience = took + (self._patience if self._will_be_kicked(step) else 0)
        # With immediate_exit nothing is waited for, and a timer would end the next run instead.
        lib.kvmpy_vcpu_deadline(vcpu, 0 if step.immediate_exit else patience)
        ran = ffi.new("struct kvmpy_ran *")
        while True:
            ending = int(lib.kvmpy_vcpu_run(vcpu, ran))
            number = int(ran.error if ran.issued else vcpu.err)
            # A kick or a timer of an earlier run may come late: no program ever saw that.
            late = number == errno.EINTR and ending in (lib.KVMPY_RUN_EINTR, lib.KVMPY_RUN_KICKED)
            if not late or step.ended_by_signal:
                break
        if step.interrupted:
            area[_IMMEDIATE_EXIT] = 0
        rip = self._rip(ioctl.object) if self._probe and not step.ended_by_signal else None
        return Outcome(-1 if number else 0, number, None, tuple(self._pieces(area)), rip)

    def _rip(self, ident: int) -> int | None:
        regs = kvm_regs()
        if lib.kvmpy_ioctl_ptr(ffi.NULL, self.fds[ident], ioctls.KVM_GET_REGS.nr, regs.cdata, 0, 0):
            return None
        return int(regs.rip)

    def _will_be_kicked(self, step: Step) -> bool:
        ioctl = step.ioctl
        if ioctl is None:
            return False
        return any(
            isinstance(each.entry.what, Kick)
            and each.entry.what.object == ioctl.object
            and step.entry.order < each.entry.order < ioctl.end_order
            for each in self.script.steps
        )

    @staticmethod
    def _pieces(area: mmap.mmap) -> list[tuple[int, bytes]]:
        head = area[:_UNION_END]
        matches = [(0, head)]
        if head[8:12] == b"\2\0\0\0":
            size = head[_IO + 1] * int.from_bytes(head[_IO + 4 : _IO + 8], "little")
            offset = int.from_bytes(head[_IO + 8 : _IO + 16], "little")
            if offset + size <= len(area):
                matches.append((offset, area[offset : offset + size]))
        return matches

    def _harvest(self, count: int) -> None:
        # The program marked entries of the dirty rings as collected: as many as were reset.
        for region, area in self._areas.items():
            owner = self.script.objects.get(region.object)
            if owner is None or owner.kind != ObjectKind.VCPU:
                continue
            position = max(0, _DIRTY_RING - region.offset)
            while position + 16 <= len(area) and count > 0:
                if area[position] & 3 == 1:
                    area[position] = area[position] | 2
                    count -= 1
                position += 16

    # The end.

    def _close(self, ident: int) -> None:
        self._early.pop(ident, None)
        vcpu = self._vcpus.pop(ident, None)
        if vcpu is not None:
            lib.kvmpy_vcpu_free(vcpu)
        for region in [r for r in self._areas if r.object == ident]:
            owner = self.script.objects.get(ident)
            if owner is not None and owner.kind == ObjectKind.VCPU:
                self._areas.pop(region).close()
        fd = self.fds.pop(ident, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close and unmap everything."""
        for ident in sorted(self.fds, reverse=True):
            self._close(ident)
        for area in self._areas.values():
            area.close()
        self._areas.clear()
        if self._bad is not None:
            self._bad.close()
            self._bad = None
