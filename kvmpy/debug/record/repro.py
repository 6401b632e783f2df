# SPDX-License-Identifier: Apache-2.0
"""A record as one C file that does the same and says whether the same came of it."""

from __future__ import annotations

import errno
import functools
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template

from kvmpy import __version__
from kvmpy.debug.record.command import command_of, status_of, status_words
from kvmpy.debug.record.compare import exit_reason, reason_text, recorded_outcome
from kvmpy.debug.record.csteps import Block, CSteps
from kvmpy.debug.record.format import MAP_NO_READ, MAP_NO_WRITE, MAP_SHARED
from kvmpy.debug.record.model import request_name
from kvmpy.debug.record.script import Script, Step
from kvmpy.uapi import ioctls

LIMIT = 30


@functools.lru_cache(maxsize=1)
def _template() -> Template:
    # C has no use for these marks, and text of a record is never read as a template.
    environment = Environment(  # noqa: S701 - it is C, not HTML
        block_start_string="//%",
        block_end_string="%//",
        trim_blocks=True,
        variable_start_string="{$",
        variable_end_string="$}",
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.from_string(resources.files(__package__).joinpath("repro.c.j2").read_text("utf-8"))


def write_c(script: Script, target: Step, limit: int = LIMIT) -> str:
    """Return the C file that carries *script* out, and whose verdict is about *target*, one of its steps.

    It gives up after *limit* seconds.
    """
    writer = CSteps(script, target)
    lanes: list[list[Block]] = [[] for _ in script.threads]
    for step in script.steps:
        block = writer.block(step)
        lanes[step.thread] += [] if block.empty else [block]
    setup = []
    for region, name in list(writer.memory.items()):
        if region.object == 0:
            writer.uses.add("map_memory")
            setup.append(f"{name} = map_memory({region.size:#x}, {_mapping(region.flags)});")
            setup += writer.fill(region)
    blocks = [block for lane in lanes for block in lane]
    writer.uses |= (
        {"need"} if any(b.call is not None and b.call.function == "need" for b in blocks) else set()
    )
    return _template().render(
        about=_about(writer),
        sev=any(name.startswith("sev_") for name in writer.words.structs),
        definitions=list(writer.words.definitions()),
        limit=limit,
        uses=writer.uses,
        steps=len(script.steps),
        descriptors=list(writer.used),
        runs=list(writer.runs.values()),
        earlies=list(writer.early.values()),
        vcpu_threads=[f"{writer.fd(ident)}_thread" for ident in writer.runs] if writer.threaded else [],
        memories=[(name, f"{region.size:#x}") for region, name in writer.memory.items()],
        rings=list(writer.rings.values()),
        statics=writer.statics,
        lanes=lanes,
        setup=setup,
    )


def _about(writer: CSteps) -> list[tuple[str, str]]:
    host, target = writer.script.record.host, writer.target
    ioctl, outcome = target.ioctl, recorded_outcome(target)
    point = f"{command_of(target.entry.what) or request_name(target.entry.what)}"
    point += f" on {writer.fd(ioctl.object if ioctl else 0)}"
    status = status_of(target.request, outcome.after)
    if outcome.result < 0:
        point += f" fails with {errno.errorcode.get(outcome.errno, outcome.errno)}"
    elif target.request == ioctls.KVM_RUN.nr:
        point += f" ends with {reason_text(exit_reason(outcome))}"
    else:
        point += f" returns {outcome.result}"
    if status:
        point += f", firmware status {status_words(status)}"
    # What the kernel's own defaults are is not known here: the vendor module's, and few.
    params = [text for text in host.get("params", "").split() if not text.startswith("kvm.")][:12]
    rows = (
        ("What it shows", point),
        ("Recorded from", host.get("test") or host.get("command", "?")),
        ("When", host.get("started", "?")),
        ("Kernel", " ".join(filter(None, (host.get("kernel"), host.get("machine"))))),
        ("KVM module", " ".join([host.get("module", "?"), *params])),
        ("CPU", host.get("cpu", "?")),
        ("Platform", host.get("platform", "?")),
        ("Written by", f"kvmpy {__version__}, from a record of kvmpy {host.get('kvmpy', '?')}"),
    )
    return [(label, text.replace("*/", "* /").replace("\n", " ")[:400]) for label, text in rows]


def _mapping(flags: int) -> str:
    rights = [] if flags & MAP_NO_READ else ["PROT_READ"]
    rights += [] if flags & MAP_NO_WRITE else ["PROT_WRITE"]
    return f"{' | '.join(rights) or 'PROT_NONE'}, {'MAP_SHARED' if flags & MAP_SHARED else 'MAP_PRIVATE'}"
