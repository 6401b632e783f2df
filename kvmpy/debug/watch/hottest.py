# SPDX-License-Identifier: Apache-2.0
"""Which exits are hottest: KVM's counters of all VMs, by how fast they rise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmpy.debug.watch.processes import VmInfo

TOTAL = "exits"
# Kernel: struct kvm_vcpu_stat and kvm_vm_stat of x86. What says why the guest was left comes first; the rest
# is work that KVM did.
REASONS = {
    TOTAL: "all exits",
    "io_exits": "port I/O",
    "mmio_exits": "memory-mapped I/O",
    "halt_exits": "HLT",
    "irq_exits": "host interrupt",
    "irq_window_exits": "interrupt window",
    "nmi_window_exits": "NMI window",
    "request_irq_exits": "user space waits for an interrupt window",
    "signal_exits": "signal to the vCPU thread",
    "notify_window_exits": "notify window",
    "hypercalls": "hypercall",
    "pf_taken": "page fault",
    "insn_emulation": "instruction emulated",
    "invlpg": "INVLPG",
    "nested_run": "nested guest entered",
}
# Numbers that say how things are, not how often something happened.
_GAUGES = frozenset(
    {
        "blocking",
        "guest_mode",
        "max_mmu_page_hash_collisions",
        "max_mmu_rmap_size",
        "mmu_unsync",
        "nx_lpage_splits",
        "pages_1g",
        "pages_2m",
        "pages_4k",
        "preemption_other",
    }
)


@dataclass(frozen=True)
class Hot:
    """A counter of a VM: how fast it rises, and its part of all the VM's exits (None where those stand
    still).
    """

    vm: VmInfo
    counter: str
    meaning: str
    per_second: float
    share: float | None
    total: int


def hottest(vms: Iterable[VmInfo], *, everything: bool = False) -> list[Hot]:
    """Return the counters that rise, the fastest first; *everything*: also those that are no reason of an
    exit.
    """
    results = []
    for vm in vms:
        exits = vm.rates.get(TOTAL, 0.0)
        for name, rate in vm.rates.items():
            if rate <= 0 or name in _GAUGES or name.endswith("_ns"):
                continue
            if name not in REASONS and not everything:
                continue
            counts_exits = name.endswith(TOTAL) or name == "hypercalls"
            share = rate / exits if exits and counts_exits else None
            results.append(Hot(vm, name, REASONS.get(name, ""), rate, share, vm.counters[name]))
    return sorted(results, key=lambda hot: (-hot.per_second, hot.vm.pid, hot.vm.fd, hot.counter))
