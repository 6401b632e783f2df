# SPDX-License-Identifier: Apache-2.0
"""The command group; every command's module holds a click command of the same name."""

from __future__ import annotations

import importlib
import signal
from types import FrameType

import click

import kvmpy

# Command and its line in --help, so that help imports none of them.
COMMANDS = {
    "abi": "the KVM ABI as kvmpy knows it, and its check against kernel headers",
    "bench": "what kvmpy costs beside bare C loops, in one run",
    "decode": "ioctls, structs, exits, error codes, MSRs, CPUID, SEV's numbers and pages: to words",
    "doctor": "what this host offers, protection by protection, and what is missing",
    "encode": "the same from words: numbers and bytes",
    "faults": "page faults and conversions of a VM as KVM sees them, live and decoded",
    "hardware": "the whole suite on a machine with SEV, and one archive of it to attach to a report",
    "html": "JSON reports, of one kernel or several, as one HTML page",
    "lab": "kernels under QEMU, and the selftests inside them: no /dev/kvm needed",
    "measure": "what an SNP launch will measure, and ID blocks for it: no KVM needed",
    "ps": "every VM on this machine: its process, vCPUs with their threads, memory, exits",
    "replay": "a record's ioctls once more, results compared",
    "report": "SNP attestation reports, shown and verified: no KVM needed",
    "repro": "a record as one C file that shows the same",
    "run": "the selftests on this host's KVM, with a verdict table",
    "shell": "a prompt with a VM in hand, and every ioctl and struct by name",
    "shrink": "a record without what is not needed",
    "timeline": "a record as a timeline with a track for each thread and vCPU",
    "top": "the hottest exits of the VMs on this machine, refreshed",
    "trace": "every KVM ioctl of a program and its children, decoded as it happens",
    "watch": "VMs as they are created and destroyed, live",
}


# Within a test an exception is the test's failure: their supervisor ends in its own way.
_OWN_SIGNALS = ("hardware", "run")


class LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"kvmpy.cli.{cmd_name}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"kvmpy.cli.{cmd_name}.{cmd_name} is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvmpy.__version__, prog_name="kvmpy", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Real KVM virtual machines, made and tested from Python."""
    if context.invoked_subcommand not in _OWN_SIGNALS:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # What nohup had us ignore stays ignored.
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # As an exception: every block that has something to put in order does so.
    del frame
    raise SystemExit(128 + number)
