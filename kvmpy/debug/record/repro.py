# SPDX-License-Identifier: Apache-2.0
"""A record as one C file that does the same and says whether the same came of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from kvmpy.debug.record import ctext
from kvmpy.debug.record.carguments import CArguments
from kvmpy.debug.record.cmemory import pieces
from kvmpy.debug.record.command import command_of, status_of, status_words
from kvmpy.debug.record.compare import (
    VOLATILE,
    exit_payload,
    exit_reason,
    reason_text,
    recorded_outcome,
    result_text,
)
from kvmpy.debug.record.csource import (
    byte_rows,
    number,
)
from kvmpy.debug.record.events import Close, Event, FileCall, Ioctl, Kick, Memory, Object, Write
from kvmpy.debug.record.format import (
    EVENT_WRITTEN,
    FILE_FALLOCATE,
    MAP_NO_READ,
    MAP_NO_WRITE,
    MAP_SHARED,
    ObjectKind,
)
from kvmpy.debug.record.guestcode import discover
from kvmpy.debug.record.model import request_name
from kvmpy.debug.record.script import Region, Script, Step
from kvmpy.debug.record.writer import version
from kvmpy.uapi import ioctls
from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.constants import ExitReason
from kvmpy.uapi.field_words import ARGUMENTS
from kvmpy.uapi.struct_base import FlexStruct

LIMIT = 30
_RUN = ioctls.KVM_RUN.nr
_READS_MEMORY = {_RUN, ioctls.KVM_TRANSLATE.nr, ioctls.KVM_MEMORY_ENCRYPT_OP.nr}
_HEADERS = (
    "errno.h", "fcntl.h", "pthread.h", "signal.h", "stddef.h", "stdint.h", "stdio.h", "stdlib.h", "string.h",
    "unistd.h", "linux/falloc.h", "linux/kvm.h", "sys/eventfd.h", "sys/ioctl.h", "sys/mman.h",
)  # fmt: skip
_MOST_CHECKS = 400


class CFile(CArguments):
    """Writes the C file for *script*, which ends in step *target*."""

    def __init__(self, script: Script, target: Step, limit: int = LIMIT) -> None:
        super().__init__(script)
        self.target = target
        self.limit = limit
        self.threaded = len(script.threads) > 1
        self.statics: list[str] = []
        self._run_areas: set[int] = set()
        self._rings: dict[str, int] = {}
        self._watched = {other for step in script.steps for other in step.during}
        self._awaited = {other for step in script.steps for other in step.after}

    # Steps.

    def step_lines(self, step: Step) -> Iterator[str]:
        """Yield the lines of one step."""
        what = step.entry.what
        if self.threaded:
            for other in step.after:
                yield f"\tawait(&ended[{other}]);"
            for other in step.during:
                yield f"\tawait(&begun[{other}]);"
            if step.index in self._watched and step.request != _RUN:
                yield f"\tset(&begun[{step.index}]);"
        if isinstance(what, Ioctl):
            yield from self._run(step, what) if what.request == _RUN else self._ioctl(step, what)
        elif isinstance(what, Object):
            yield from self._object(what)
        elif step.region is not None and not step.data:
            yield from self._map_step(step.region)
        elif isinstance(what, (Write, Memory)) and step.region is not None:
            yield from self._write(step, what.address - step.region.start)
        elif isinstance(what, Kick):
            self.need("kick")
            name = f"{self.fd(what.object)}_run"
            self._run_areas.add(what.object)
            yield f"\tkick({name}, {self.fd(what.object)}_thread, {1 if what.how & 2 else 0});"
        elif isinstance(what, FileCall) and what.call == FILE_FALLOCATE:
            yield (
                f'\tneed({step.index}, "fallocate", fallocate({self.fd(what.object)}, {what.mode:#x}, '
                f"{what.offset:#x}, {what.length:#x}), {what.result}, {_errno(what.errno)});"
            )
            self.need("need")
        elif isinstance(what, Close):
            yield f"\tclose({self.fd(what.object)});"
        elif isinstance(what, Event) and what.what == EVENT_WRITTEN:
            yield f"\teventfd_write({self.fd(what.object)}, {what.value});"
        if step.index in self._awaited:
            yield f"\tset(&ended[{step.index}]);"

    def _map_step(self, region: Region) -> Iterator[str]:
        name = self.region(region)
        if name.endswith("_run"):
            return
        if name.endswith("_ring"):
            self._rings[name] = region.size
        self.need("map_fd")
        yield f"\t{name} = map_fd({self.fd(region.object)}, {region.size:#x}, {region.offset:#x});"
        yield from self._fill(region)

    def _object(self, what: Object) -> Iterator[str]:
        name = self.fd(what.id)
        if what.kind == ObjectKind.EVENTFD:
            yield f"\t{name} = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);"
            return
        if what.kind == ObjectKind.GMEM:
            yield f"\t{name} = dup({self.fd(what.parent)});"
            return
        path = {ObjectKind.SYSTEM: "/dev/kvm", ObjectKind.SEV: "/dev/sev"}.get(
            ObjectKind(what.kind), what.name if what.name.startswith("/dev/") else "/dev/null"
        )
        yield f'\t{name} = open("{path}", O_RDWR | O_CLOEXEC);'
        yield f"\tif ({name} < 0) {{"
        yield f'\t\tperror("{path}");'
        yield "\t\texit(2);"
        yield "\t}"

    def _write(self, step: Step, offset: int) -> Iterator[str]:
        name = self.region(step.region) if step.region is not None else "mem0"
        data = step.data
        if isinstance(step.entry.what, Memory) and not any(data):
            yield f"\tmemset({name} + {offset:#x}, 0, {len(data):#x});"
            return
        if len(data) <= 8:
            value = number(int.from_bytes(data, "little"))
            yield f"\t/* The host writes guest memory. */"  # noqa: F541
            yield f"\tmemcpy({name} + {offset:#x}, &(unsigned long long){{ {value} }}, {len(data)});"
            return
        label = self.label("written")
        self.statics += [f"static const unsigned char {label}[] = {{", *byte_rows(data), "};", ""]
        yield f"\tmemcpy({name} + {offset:#x}, {label}, sizeof({label}));"

    def _argument(self, step: Step, what: Ioctl, before: list[str]) -> str:
        if step.argument is None:
            op = ioctls.BY_NR.get(what.request)
            kind = ARGUMENTS.get(op.name) if op is not None else None
            if kind is not None:
                return self.words.words(kind, what.arg)
            return number(what.arg) if what.arg else "NULL" if op and op.arg != "int" else "0"
        text = self.value(step.argument, before, [], "\t\t")
        return text.replace("&(*", "(").replace("_at)", "_at)") if text.startswith("&(*") else text

    def _ioctl(self, step: Step, what: Ioctl) -> Iterator[str]:
        op = ioctls.BY_NR.get(what.request)
        name = self.words.request(op) if op is not None else number(what.request)
        lines: list[str] = []
        argument = self._argument(step, what, lines)
        call = f"ioctl({self.fd(what.object)}, {name}, {argument})"
        if what.request == ioctls.KVM_RESET_DIRTY_RINGS.nr:
            call = f"({self._collect(what.result)}, {call})"
        yield f"\t/* {step.index}: {self._comment(step)} */"
        wrapped = bool(lines)
        indent = "\t\t" if wrapped else "\t"
        if wrapped:
            yield "\t{"
            late = [line.replace("\x00", "") for line in lines if "\x00" in line]
            yield from (line for line in lines if "\x00" not in line)
            yield ""
            yield from late
        result = "ANY" if step.makes or _any_result(what) else str(what.result)
        label = command_of(what) or name
        verdict = f'{step.index}, "{label}", %s, {result}, {_errno(what.errno)}'
        if step is self.target:
            yield from self._judge(step, verdict % call, indent, argument)
        elif step.makes and what.request == ioctls.KVM_CREATE_DEVICE.nr:
            yield f"{indent}need({verdict % call});"
            yield f"{indent}{self.fd(step.makes)} = {argument.removeprefix('&')}.fd;"
        elif step.makes:
            yield f"{indent}{self.fd(step.makes)} = need({verdict % call});"
        else:
            yield f"{indent}need({verdict % call});"
        self.need("need")
        if wrapped:
            yield "\t}"
        if step.makes and self.script.objects[step.makes].kind == ObjectKind.VCPU:
            yield from self._map_run(step.makes)

    def _collect(self, count: int) -> str:
        self.need("ring")
        left = str(count)
        for name, size in self._rings.items():
            left = f"collect({name}, {size:#x}, {left})"
        return f"(void){left}"

    def _map_run(self, ident: int) -> Iterator[str]:
        if ident in self._runs_used():
            self.need("map_fd")
            self._run_areas.add(ident)
            yield f"\t{self.fd(ident)}_run = map_fd({self.fd(ident)}, run_size, 0);"

    def _runs_used(self) -> set[int]:
        found = set()
        for step in self.script.steps:
            what = step.entry.what
            if isinstance(what, Kick) or (isinstance(what, Ioctl) and what.request == _RUN):
                found.add(what.object)
        return found

    def _comment(self, step: Step) -> str:
        what = step.ioctl
        if what is None:
            return ""
        op = ioctls.BY_NR.get(what.request)
        known = command_of(what) or op
        about = known.doc.rstrip(".") if known is not None else "an ioctl that kvmpy does not know"
        outcome = recorded_outcome(step)
        ended = "" if what.result >= 0 else f" Recorded: {result_text(outcome)[3:]}."
        return f"{self.fd(what.object)}: {about}.{ended}"

    def _judge(self, step: Step, arguments: str, indent: str, argument: str) -> Iterator[str]:
        self.need("same")
        checks = self._after_checks(step, argument, indent + "\t")
        if checks:
            self.need("value")
            yield f"{indent}if (same({arguments})) {{"
            yield from checks
            yield f"{indent}}}"
        else:
            yield f"{indent}same({arguments});"
        yield f"{indent}verdict();"

    def _after_checks(self, step: Step, argument: str, indent: str) -> list[str]:
        node = step.argument.node if step.argument is not None else None
        what = step.ioctl
        name = request_name(step.entry.what)
        if node is None or node.after is None or node.struct is None or what is None:
            return []
        # Of what failed, the argument says no more than the status of the secure processor.
        status = status_of(what.request, node.after)
        if what.result < 0 and status is None:
            return []
        if "" in VOLATILE.get(name, ()) or not argument.startswith("&"):
            return []
        from kvmpy.debug.record.compare import comparable

        lines = []
        for path, value in comparable(step, node.after):
            if what.result < 0 and path != "error":
                continue
            place = argument.removeprefix("&")
            # An open array lies behind its struct: see _open_array().
            if issubclass(struct_class(node.struct), FlexStruct) and not path.startswith("entries["):
                place += ".head"
            shown = f"{place}.{path}"
            lines.append(f'{indent}value({step.index}, "{path}", {shown}, {number(value)});')
        return lines[:_MOST_CHECKS]

    # KVM_RUN.

    def _run(self, step: Step, what: Ioctl) -> Iterator[str]:
        vcpu = self.fd(what.object)
        run = f"{vcpu}_run"
        self._run_areas.add(what.object)
        outcome = recorded_outcome(step)
        interrupted = what.result < 0 and what.errno == errno.EINTR
        reason = exit_reason(outcome)
        ending = f"ends with {reason_text(reason)}" if what.result >= 0 else result_text(outcome)[3:]
        yield f"\t/* {step.index}: {vcpu} runs; {ending}. */"
        for offset, data in step.run_in:
            yield from self._run_input(run, offset, data)
        if self.threaded:
            yield f"\t{vcpu}_thread = pthread_self();"
            if step.index in self._watched:
                yield f"\tset(&begun[{step.index}]);"
        call = f"ioctl({vcpu}, KVM_RUN, NULL)"
        if interrupted:
            if self._kicked(step):
                self.need("signals")
            else:
                self.need("interrupt")
                took = max(1, min(2000, (what.end_ns - step.entry.frame.time_ns) // 1_000_000))
                call = f"run_for({vcpu}, {run}, {took})"
        arguments = f'{step.index}, "KVM_RUN", {call}, {what.result}, {_errno(what.errno)}'
        final = step is self.target
        fault = what.result < 0 and reason == ExitReason.KVM_EXIT_MEMORY_FAULT
        lines = self._exit_checks(step, run, "\t\t") if what.result >= 0 or fault else []
        self.need("same")
        if lines:
            yield f"\tif (same({arguments})) {{"
            yield from lines
            yield "\t}"
        else:
            yield f"\tsame({arguments});"
        if interrupted:
            yield f"\t{run}->immediate_exit = 0;"
        if final:
            yield "\tverdict();"

    def _kicked(self, step: Step) -> bool:
        what = step.ioctl
        return what is not None and any(
            isinstance(each.entry.what, Kick)
            and each.entry.what.object == what.object
            and each.entry.order < what.end_order
            for each in self.script.steps
        )

    def _run_input(self, run: str, offset: int, data: bytes) -> Iterator[str]:
        if not any(data) and len(data) <= 8 and offset == 1:
            yield f"\t{run}->immediate_exit = 0;"
        elif offset == 1 and len(data) == 1:
            yield f"\t{run}->immediate_exit = {data[0]};"
        elif len(data) <= 8:
            value = number(int.from_bytes(data, "little"))
            yield (f"\tmemcpy((char *){run} + {offset:#x}, &(unsigned long long){{ {value} }}, {len(data)});")
        else:
            label = self.label("run_input")
            self.statics += [f"static const unsigned char {label}[] = {{", *byte_rows(data), "};", ""]
            yield f"\tmemcpy((char *){run} + {offset:#x}, {label}, sizeof({label}));"

    def _exit_checks(self, step: Step, run: str, indent: str) -> list[str]:
        outcome = recorded_outcome(step)
        reason = exit_reason(outcome)
        if reason is None:
            return []
        self.need("value")
        words = self.words.words(ExitReason, reason) if reason in set(ExitReason) else number(reason)
        lines = [f'{indent}value({step.index}, "exit_reason", {run}->exit_reason, {words});']
        for path, text in exit_payload(outcome).items():
            lines += self._payload_check(step, run, path, text, indent)
        return lines

    def _payload_check(self, step: Step, run: str, path: str, text: str, indent: str) -> list[str]:
        if path.startswith("memory_fault."):
            self.need("fault")
            name = path.partition(".")[2]
            return [f'{indent}value({step.index}, "{path}", memory_fault({run}).{name}, {text});']
        if path == "io.data":
            data = bytes.fromhex(text)
            shown = f"(char *){run} + {run}->io.data_offset"
            return self._bytes_check(step, path, shown, data, indent)
        if not text.startswith("0x"):
            return self._bytes_check(step, path, f"{run}->{path}", bytes.fromhex(text), indent)
        value = int(text, 16)
        return [f'{indent}value({step.index}, "{path}", {run}->{path}, {number(value)});']

    def _bytes_check(self, step: Step, path: str, shown: str, data: bytes, indent: str) -> list[str]:
        if not data:
            return []
        label = self.label("expected")
        self.statics += [f"static const unsigned char {label}[] = {{", *byte_rows(data), "};", ""]
        compared = f"memcmp({shown}, {label}, sizeof({label})) != 0"
        return [f'{indent}value({step.index}, "{path} differs", {compared}, 0);']

    # Memory.

    def _fill(self, region: Region) -> Iterator[str]:
        if not any(step.request in _READS_MEMORY for step in self.script.steps):
            return
        name = self.region(region)
        code = self._code.get(region, {})
        for piece in pieces(name, region.initial, code):
            if piece.words:
                self.need("words")
            self.statics += [*piece.definition, ""]
            yield "\t" + piece.statement

    # The file.

    def text(self) -> str:
        """Return the C file."""
        self._code = discover(self.script.steps)
        lanes: list[list[str]] = [[] for _ in self.script.threads]
        for step in self.script.steps:
            lanes[step.thread] += [*self.step_lines(step), ""]
        setup = []
        for region, name in list(self.regions.items()):
            if region.object == 0:
                self.need("memory")
                setup.append(f"\t{name} = map_memory({region.size:#x}, {_mapping(region.flags)});")
                setup += self._fill(region)
        lines = [*self._header(), "", *self._includes(), ""]
        functions = [*self.statics, *self._verdict()]
        for lane, body in enumerate(lanes):
            if lane:
                functions += [f"static void *thread{lane}(void *arg)", "{", "\t(void)arg;", "", *body[:-1]]
                functions += ["\treturn NULL;", "}", ""]
        functions += self._main(lanes, setup)
        text = "\n".join(functions)
        lines += [*self._common(text), *self._variables(text), *functions]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"

    def _header(self) -> list[str]:
        host = self.script.record.host
        what = self.target.ioctl
        outcome = recorded_outcome(self.target)
        named = command_of(self.target.entry.what) or request_name(self.target.entry.what)
        point = f"{named} on {self.fd(what.object if what else 0)}"
        status = status_of(self.target.request, outcome.after)
        if outcome.result < 0:
            point += f" fails with {errno.errorcode.get(outcome.errno, outcome.errno)}"
        elif self.target.request == _RUN:
            point += f" ends with {reason_text(exit_reason(outcome))}"
        else:
            point += f" returns {outcome.result}"
        if status:
            point += f", firmware status {status_words(status)}"
        rows = [
            ("What it shows", point),
            ("Recorded from", host.get("test") or host.get("command", "?")),
            ("When", host.get("started", "?")),
            ("Kernel", " ".join(filter(None, (host.get("kernel"), host.get("machine"))))),
            ("KVM module", " ".join([host.get("module", "?"), *_own_params(host)])),
            ("CPU", host.get("cpu", "?")),
            ("Platform", host.get("platform", "?")),
            ("Written by", f"kvmpy {version()}, from a record of kvmpy {host.get('kvmpy', '?')}"),
        ]
        lines = ["/*", " * A KVM reproducer.", " *"]
        for label, text in rows:
            clean = text.replace("*/", "* /").replace("\n", " ")
            lines.append(f" * {label + ':':<15}{clean[:400]}".rstrip())
        return [
            *lines,
            " *",
            " * Compile:  gcc -O2 -Wall -Wextra -Werror -o bug bug.c -pthread",
            " *           (kernel headers of Linux 6.1 or newer; what those lack is defined below)",
            " * Run:      ./bug; exit status 0: reproduced, 1: not reproduced, 2: it could not get that far",
            " */",
            "#define _GNU_SOURCE",
        ]

    def _includes(self) -> list[str]:
        headers = list(_HEADERS)
        if any(name.startswith("sev_") for name in self.words.structs):
            headers.insert(headers.index("linux/kvm.h") + 1, "linux/psp-sev.h")
        definitions = list(self.words.definitions())
        if definitions:
            definitions = ["", "/* What older kernel headers lack. */", *definitions]
        return [*(f"#include <{name}>" for name in headers), *definitions]

    def _common(self, functions: str) -> list[str]:
        lines = [
            "/* What a file descriptor or a frequency is differs from run to run. */",
            "#define ANY (-2)",
            f"#define LIMIT {self.limit}",
            f'#define LIMIT_TEXT "{self.limit}"',
        ]
        if self.threaded:
            lines.append(f"#define STEPS {len(self.script.steps)}")
        lines.append("")

        def called(name: str) -> bool:
            return f"{name}(" in functions

        waits = called("await")
        parts = [
            (True, ctext.CHECK),
            (called("need"), ctext.NEED),
            (called("value"), ctext.VALUE),
            (called("map_memory"), ctext.MEMORY),
            (called("map_fd"), ctext.MAP_FD),
            (called("put_words"), ctext.WORDS),
            (self._signals(), ctext.SIGNALS),
            (called("run_for"), ctext.INTERRUPT),
            (called("kick"), ctext.KICK),
            (called("memory_fault"), ctext.FAULT),
            (called("collect"), ctext.RESET_RING),
            (True, ctext.LATE),
            (waits, ctext.ORDER),
            (waits and "&begun[" in functions, "static unsigned char begun[STEPS];\n"),
            (waits and "&ended[" in functions, "static unsigned char ended[STEPS];\n"),
        ]
        for used, text in parts:
            if used:
                lines += [*text.splitlines(), ""]
        return lines

    def _signals(self) -> bool:
        return bool({"interrupt", "kick", "signals"} & self.needs)

    def _variables(self, functions: str) -> list[str]:
        lines = []
        names = [self.names[i] for i in sorted(self.names)]
        used = [name for name in names if re.search(rf"\b{name}\b", functions)]
        if used:
            lines.append(f"static int {', '.join(used)};")
        runs = [self.fd(i) for i in sorted(self._run_areas)]
        if runs:
            lines.append(f"static struct kvm_run *{', *'.join(f'{name}_run' for name in runs)};")
            lines.append("static size_t run_size;")
        if runs and self.threaded:
            lines.append(f"static pthread_t {', '.join(f'{name}_thread' for name in runs)};")
        for region, name in self.regions.items():
            if name.startswith("mem"):
                lines.append(f"static unsigned char *{name};	/* {region.size:#x} bytes */")
            elif name.endswith("_ring"):
                lines.append(f"static struct kvm_dirty_gfn *{name};")
        if "bad" in self.needs:
            lines.append("static unsigned char *bad_address;	/* nobody can read or write there */")
        return [*lines, ""]

    @staticmethod
    def _verdict() -> list[str]:
        return [
            "static void __attribute__((noreturn)) verdict(void)",
            "{",
            '\tputs(differences ? "not reproduced" : "reproduced");',
            "\texit(differences ? 1 : 0);",
            "}",
            "",
        ]

    def _main(self, lanes: list[list[str]], setup: list[str]) -> list[str]:
        lines = ["int main(void)", "{"]
        others = list(range(1, len(lanes)))
        if others:
            lines += [f"\tpthread_t threads[{len(others)}];", ""]
        lines += ["\tsetvbuf(stdout, NULL, _IOLBF, 0);", "\tsignal(SIGALRM, late);", "\talarm(LIMIT);"]
        if self._signals():
            lines += [
                "\t/* Without SA_RESTART: the signal ends KVM_RUN. */",
                "\tsigaction(SIGUSR1, &(struct sigaction){ .sa_handler = woken }, NULL);",
            ]
        if "bad" in self.needs:
            lines.append("\tbad_address = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);")
        lines += setup
        body = list(lanes[0])
        if self._run_areas:
            at = next((n for n, line in enumerate(body) if "/dev/kvm" in line and "perror" in line), -1)
            size = "\trun_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);"
            body.insert(at + 3, size)
        for number_, lane in enumerate(others):
            lines += [f"\tif (pthread_create(&threads[{number_}], NULL, thread{lane}, NULL))", "\t\texit(2);"]
        lines += ["", *body]
        for number_ in range(len(others)):
            lines.append(f"\tpthread_join(threads[{number_}], NULL);")
        if body[-2:-1] != ["\tverdict();"]:
            lines.append("\tverdict();")
        return [*lines, "}"]


def _mapping(flags: int) -> str:
    rights = [] if flags & MAP_NO_READ else ["PROT_READ"]
    rights += [] if flags & MAP_NO_WRITE else ["PROT_WRITE"]
    return f"{' | '.join(rights) or 'PROT_NONE'}, {'MAP_SHARED' if flags & MAP_SHARED else 'MAP_PRIVATE'}"


def _own_params(host: dict[str, str]) -> list[str]:
    # What the kernel's own defaults are is not known here: the vendor module's, and few.
    return [text for text in host.get("params", "").split() if not text.startswith("kvm.")][:12]


def _errno(value: int) -> str:
    return errno.errorcode.get(value, str(value)) if value else "0"


def _any_result(what: Ioctl) -> bool:
    return "" in VOLATILE.get(request_name(what), ()) and what.result >= 0


def write_c(script: Script, target: Step, limit: int = LIMIT) -> str:
    """Return the C file that carries *script* out, and whose verdict is about *target*, one of its steps.

    It gives up after *limit* seconds.
    """
    return CFile(script, target, limit).text()
