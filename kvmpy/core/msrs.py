# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a vCPU's MSRs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvmpy.core.topic import Topic
from kvmpy.uapi import ioctls
from kvmpy.uapi.structs import kvm_msr_entry, kvm_msrs

if TYPE_CHECKING:
    from kvmpy.core.vcpu_state import VcpuState

# KVM refuses calls with 256 MSRs or more (E2BIG).
_MSR_BATCH = 128


class MsrError(RuntimeError):
    """KVM refused MSR ``.index`` (``.value`` is None for a read) after it took those in ``.done``."""

    def __init__(self, target: str, index: int, value: int | None, done: dict[int, int]) -> None:
        self.target = target
        self.index = index
        self.value = value
        self.done = done
        text = "read of" if value is None else f"write of {value:#x} to"
        super().__init__(f"{target}: KVM refused the {text} MSR {index:#x}, after {len(done)} others")

    def __reduce__(self) -> tuple[object, ...]:
        return (MsrError, (self.target, self.index, self.value, self.done))


def _batches(items: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(items), _MSR_BATCH):
        yield items[start : start + _MSR_BATCH]


class Msrs(Topic):
    """The MSRs of a vCPU."""

    _owner: VcpuState

    def get_many(self, indices: Iterable[int]) -> dict[int, int]:
        """Return MSRs by index; MsrError names the first that KVM refuses (KVM_GET_MSRS)."""
        values: dict[int, int] = {}
        for batch in _batches(list(indices)):
            arg = kvm_msrs.of([kvm_msr_entry(index=index) for index in batch])
            count = self._owner.ioctl(ioctls.KVM_GET_MSRS, arg)
            values.update((entry.index, entry.data) for entry in arg.entries_list()[:count])
            if count < len(batch):
                raise MsrError(self._owner.name, batch[count], None, values)
        return values

    def get_offered(self, indices: Iterable[int]) -> dict[int, int]:
        """Return those of the MSRs that KVM does not refuse, by index."""
        values: dict[int, int] = {}
        pending = list(indices)
        while pending:
            try:
                values.update(self.get_many(pending))
                break
            except MsrError as error:
                values.update(error.done)
                pending = pending[pending.index(error.index) + 1 :]
        return values

    def set_many(self, values: Mapping[int, int]) -> None:
        """Set MSRs by index, in the order given; MsrError names the first that KVM refuses (KVM_SET_MSRS)."""
        done: dict[int, int] = {}
        for batch in _batches(list(values)):
            arg = kvm_msrs.of([kvm_msr_entry(index=index, data=values[index]) for index in batch])
            count = self._owner.ioctl(ioctls.KVM_SET_MSRS, arg)
            done.update((index, values[index]) for index in batch[:count])
            if count < len(batch):
                raise MsrError(self._owner.name, batch[count], values[batch[count]], done)

    def get(self, index: int) -> int:
        """Return one MSR; MsrError when KVM refuses it."""
        return self.get_many([index])[index]

    def set(self, index: int, value: int) -> None:
        """Set one MSR; MsrError when KVM refuses it."""
        self.set_many({index: value})

    def takes(self, index: int, value: int) -> bool:
        """Set one MSR, and return whether KVM took the value."""
        try:
            self.set(index, value)
        except MsrError:
            return False
        return True
