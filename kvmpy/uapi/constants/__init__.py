# SPDX-License-Identifier: Apache-2.0
"""Every constant of KVM's user interface (Linux 7.2): enums by topic, each member under its own name too.

``Cap.KVM_CAP_IRQCHIP`` and ``KVM_CAP_IRQCHIP`` are the same object; ``ALL`` maps names to numbers.  The
stub ``__init__.pyi``, which tells type checkers the names, is generated (:mod:`kvmpy.uapi.gen`).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvmpy.uapi.constants import caps, coco, irq, para, run, uffd, vcpu, vm, xen

TOPICS = (caps, vm, vcpu, run, irq, xen, coco, para, uffd)

GROUPS: dict[str, type[IntEnum | IntFlag]] = {
    name: kind
    for topic in TOPICS
    for name, kind in vars(topic).items()
    if isinstance(kind, type) and kind.__module__ == topic.__name__
}

_MEMBERS = {name: member for kind in GROUPS.values() for name, member in kind.__members__.items()}

ALL: dict[str, int] = {name: int(member) for name, member in _MEMBERS.items()}

globals().update(GROUPS)
globals().update(_MEMBERS)
