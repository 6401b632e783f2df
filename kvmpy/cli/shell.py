# SPDX-License-Identifier: Apache-2.0
"""``kvmpy shell``: a Python prompt with a running VM."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvmpy.guest.program import GuestProgram

GUEST = """
#include <kvmpy/guest.h>

u64 counter GUEST_SHARED;

void guest_main(void)
{
	for (;;) {
		counter++;
		GUEST_SYNC(counter);
	}
}
"""
_CALL = re.compile(r"(kvm_\w+)\([^()]*?(\w*)$")


def banner(names: dict[str, Any], reason: str) -> str:
    """Return what the prompt says at its start."""
    from kvmpy import __version__

    lines = [f"kvmpy {__version__}"]
    vm = names.get("vm")
    if vm is not None:
        label = f" ({vm.protection.label})" if vm.protection.label else ""
        about = f"protection {vm.protection.name}{label}, {len(vm.vcpus)} vCPU(s)"
        lines.append(f"vm: {vm.name}, {about}, launched")
        lines.append("  vcpu.sync()                    run the guest to its next SYNC ucall")
        lines.append("  vm.symbol('counter').u64       a global of the guest (its source: GUEST)")
        lines.append("  vcpu.regs.get()                each ioctl is a method; raw: vm.ioctl(KVM_X, arg)")
    else:
        lines.append(f"there is no VM: {reason}")
    lines.append("  trace(True)                    print every ioctl, decoded")
    lines.append("  kvm_regs(rax=1), KVM_RUN       structs, ioctls and constants; Tab completes them")
    return "\n".join(lines)


def namespace() -> dict[str, Any]:
    """Return the words of the kernel's interface, and trace(): what the prompt has without a KVM."""
    import kvmpy
    from kvmpy.core import exits
    from kvmpy.core.address import Gpa, Gva
    from kvmpy.debug.decode.live import LivePrinter
    from kvmpy.guest import GuestProgram
    from kvmpy.uapi import constants, ioctls, structs
    from kvmpy.uapi.struct_base import Struct

    printer = LivePrinter(lambda line: print(line, file=sys.stderr))

    def trace(on: bool = True) -> None:
        """Print every ioctl from now on, decoded, or (False) stop that."""
        printer.switch(on)

    names: dict[str, Any] = dict(constants.ALL)
    names.update(
        (name, value)
        for name, value in vars(structs).items()
        if isinstance(value, type) and issubclass(value, Struct) and name.startswith("kvm_")
    )
    names.update(ioctls.IOCTLS)
    names.update(
        kvmpy=kvmpy,
        ioctls=ioctls,
        structs=structs,
        constants=constants,
        exits=exits,
        Gpa=Gpa,
        Gva=Gva,
        GuestProgram=GuestProgram,
        GUEST=GUEST,
        trace=trace,
        _printer=printer,
    )
    return names


class Completer:
    """Completes names, attributes, and the fields of a struct inside its call: ``kvm_regs(r<Tab>``."""

    def __init__(self, names: dict[str, Any], line: Callable[[], str]) -> None:
        import rlcompleter

        self._names = names
        self._line = line
        self._plain = rlcompleter.Completer(names)
        self._fields: list[str] = []

    def fields(self, line: str) -> list[str]:
        """Return the fields that fit at the end of *line*, inside the call of a struct."""
        match = _CALL.search(line)
        kind = self._names.get(match[1]) if match else None
        fields = getattr(kind, "FIELDS", None)
        if match is None or fields is None:
            return []
        return [f"{name}=" for name in fields if name.startswith(match[2])]

    def complete(self, text: str, state: int) -> str | None:
        """Return the completion number *state* of *text*, as readline asks for it."""
        if state == 0:
            self._fields = self.fields(self._line()) if "." not in text else []
        if state < len(self._fields):
            return self._fields[state]
        return self._plain.complete(text, state - len(self._fields))


def _standard(names: dict[str, Any], text: str) -> None:
    import code

    try:
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is not None:
        readline.set_completer(Completer(names, readline.get_line_buffer).complete)
        # '=' and brackets end a word, so that the arguments of a call are completed one by one.
        readline.set_completer_delims(" \t\n=()[]{},;:'\"+-*/%&|^~<>!")
        readline.parse_and_bind("tab: complete")
    code.interact(banner=text, local=names, exitmsg="")


def _ipython(names: dict[str, Any], text: str) -> None:
    # Optional, so by name: it need not be there when this file is checked.
    embed: Any = importlib.import_module("IPython.terminal.embed")
    config = importlib.import_module("traitlets.config").Config()
    # A KvmError says in its own words what was asked and what came back.
    config.InteractiveShellEmbed.xmode = "Minimal"
    config.InteractiveShellEmbed.confirm_exit = False
    prompt: Any = embed.InteractiveShellEmbed(config=config, banner1=text, exit_msg="", user_ns=names)
    completer = Completer(names, str)

    def fields(_: object, event: Any) -> list[str]:
        return completer.fields(str(event.text_until_cursor))

    prompt.Completer.use_jedi = False
    prompt.set_hook("complete_command", fields, re_key=f".*{_CALL.pattern}")
    prompt()


def has_ipython() -> bool:
    """Whether IPython is installed."""
    return importlib.util.find_spec("IPython") is not None


def _program(file: Path | None) -> GuestProgram:
    from kvmpy.guest import GuestProgram

    return GuestProgram.from_c(GUEST, name="shell") if file is None else GuestProgram.from_file(file)


def _open(names: dict[str, Any], stack: ExitStack, options: dict[str, Any]) -> str:
    """Put an open KVM and a running VM into *names*; return why there is none, nothing when there is."""
    from kvmpy.coco.kvm import Kvm
    from kvmpy.core.errors import KvmError, MissingError

    names.update(kvm=None, vm=None, vcpu=None)
    try:
        kvm = names["kvm"] = stack.enter_context(Kvm())
        if options["bare"]:
            return "--bare asked for none"
        vm = stack.enter_context(
            kvm.create_vm(
                _program(options["program"]),
                vcpus=options["vcpus"],
                memory=options["memory"] << 20,
                protection=options["protection"],
                deadline=options["deadline"],
            )
        )
        vm.launch()
    except MissingError as error:
        return str(error)
    except (KvmError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    names.update(vm=vm, vcpu=vm.vcpus[0] if vm.vcpus else None)
    return ""


@click.command()
@click.option("--protection", default="auto", show_default=True, help="The protection of the VM.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--memory", metavar="MIB", type=click.IntRange(4), default=64, show_default=True)
@click.option(
    "--program",
    metavar="FILE",
    type=click.Path(exists=True, path_type=Path),
    help="Your own guest program, in C or assembly.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0.1),
    default=20.0,
    show_default=True,
    help="Time limit for a run of the guest, in seconds.",
)
@click.option("--bare", is_flag=True, help="Only open /dev/kvm; create no VM.")
@click.option("--plain", is_flag=True, help="Use the standard prompt even if IPython is installed.")
@click.option("--trace", "traced", is_flag=True, help="Print every ioctl from the start.")
@click.option("-c", "commands", metavar="CODE", help="Run CODE instead of opening a prompt.")
def shell(plain: bool, traced: bool, commands: str | None, **options: Any) -> None:
    """Open a Python prompt with a running VM: kvm, vm, vcpu, and every ioctl, struct and constant by name.

    IPython's prompt where it is installed.  trace(True) prints each ioctl, decoded.
    """
    names = namespace()
    printer = names["_printer"]
    with ExitStack() as stack:
        stack.callback(printer.switch, False)
        printer.switch(traced)
        reason = _open(names, stack, options)
        if commands is not None:
            if reason and names["kvm"] is None:
                click.echo(f"kvmpy shell: {reason}", err=True)
            exec(compile(commands, "<-c>", "exec"), names)  # noqa: S102 - the user's own words
            return
        text = banner(names, reason)
        if has_ipython() and not plain:
            _ipython(names, text)
        else:
            _standard(names, text)
