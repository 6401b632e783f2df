# SPDX-License-Identifier: Apache-2.0
"""Which steps of a script matter for one of them: the same VM, before it, and not mere questions."""

from __future__ import annotations

from kvmpy.debug.record import command
from kvmpy.debug.record.events import Close, Deadline, Kick, Object
from kvmpy.debug.record.format import ObjectKind
from kvmpy.debug.record.script import Node, Script, Step, select
from kvmpy.uapi import ioctls


def is_question(step: Step) -> bool:
    """Tell whether *step* only asks, so that leaving it out changes nothing for the others."""
    ioctl = step.ioctl
    if ioctl is None:
        return False
    op = ioctls.BY_NR.get(ioctl.request)
    carried = command.command_of(ioctl)
    return (op is not None and op.asks) or (carried is not None and carried.asks)


def target_of(script: Script) -> Step:
    """Return the step that a reproducer is about: the last ioctl that failed or did more than ask.

    Statistics are asked for through a descriptor of their own, by a post-mortem as a rule: nobody's subject
    unless it fails. Nor is a run with immediate_exit, which completes the exit before it.
    ValueError where the record has no ioctl.
    """
    asked = None
    for step in reversed(script.steps):
        call = step.ioctl
        if call is None:
            continue
        asked = asked or step
        beside = is_question(step) or _of_statistics(call.request) or step.ended_by_signal
        if (call.result < 0 and not step.ended_by_signal) or step.interrupted or not beside:
            return step
    if asked is None:
        raise ValueError("the record holds no ioctl that returned")
    return asked


def _of_statistics(request: int) -> bool:
    return ioctls.MAKERS.get(request) == "stats"


def references(node: Node | None) -> set[int]:
    """Return the ids of the objects that an argument names."""
    names: set[int] = set()
    for ref in node.refs if node is not None else ():
        if ref.object:
            names.add(ref.object)
        names |= references(ref.node)
    return names


def prune(script: Script, target: Step) -> Script:
    """Return the steps that may matter for *target*, which comes last of those that are waited for."""
    family = _family(script, target)
    kept = []
    for step in script.steps:
        payload = step.entry.what
        if step.index > target.index or isinstance(payload, Deadline):
            continue
        if isinstance(payload, Close) and not _matters(script, payload.object, family):
            continue
        if step.ioctl is not None:
            if step.ioctl.object not in family or (is_question(step) and step is not target):
                continue
            if step.ioctl.result < 0 and step is not target and step.request != ioctls.KVM_RUN.nr:
                continue
        elif isinstance(payload, Kick) and payload.object not in family:
            continue
        kept.append(step)
    used = {step.ioctl.object for step in kept if step.ioctl is not None}
    used |= {ident for step in kept if step.argument is not None for ident in references(step.argument.node)}
    return select(script, [step for step in kept if not _spare(step, used)])


def _spare(step: Step, used: set[int]) -> bool:
    # A /dev/sev that was opened for questions alone.
    event = step.entry.what
    return isinstance(event, Object) and event.kind == ObjectKind.SEV and event.id not in used


def _matters(script: Script, ident: int, family: set[int]) -> bool:
    # Closing a vCPU or VM changes nothing for the others; memory goes with the last who has it open.
    each = script.objects.get(ident)
    return each is not None and ident in family and each.kind == ObjectKind.GMEM


def _family(script: Script, target: Step) -> set[int]:
    # The target's VM with all its objects, the VMs that those name, and what belongs to no VM.
    members = {target.ioctl.object} if target.ioctl is not None else set()
    objects = script.objects
    while True:
        before = len(members)
        for ident, each in objects.items():
            above = objects.get(each.parent)
            if each.kind in (ObjectKind.SYSTEM, ObjectKind.SEV):
                members.add(ident)
            elif ident in members and above is not None and above.kind != ObjectKind.SYSTEM:
                members.add(above.id)
            elif above is not None and above.kind != ObjectKind.SYSTEM and above.id in members:
                members.add(ident)
        for step in script.steps:
            if step.ioctl is not None and step.ioctl.object in members and step.argument is not None:
                members |= references(step.argument.node)
        if len(members) == before:
            return members
