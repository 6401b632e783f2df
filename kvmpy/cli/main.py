# SPDX-License-Identifier: Apache-2.0
"""The command group; every command's module holds a click command of the same name."""

from __future__ import annotations

import importlib

import click

from kvmpy.signals import end_by_exception

# Command and its line in --help, so that help imports none of them.
COMMANDS = {
    "abi": "show the KVM ABI that kvmpy uses, or check it against kernel headers",
    "bench": "measure the overhead of kvmpy against plain C",
    "bugs": "list re-created KVM bugs, prove them, and tell which of them a suite notices",
    "compare": "tell what is new between JSON reports: failures, losses, skips, slower tests",
    "coverage": "show which lines of KVM the tests execute, and which none does",
    "decode": "decode ioctls, structs, exits, error codes, MSRs, CPUID, and SEV values and pages",
    "doctor": "show which protections this host supports, and what the others need",
    "encode": "encode names and fields as numbers and bytes, for decode or a C program",
    "export": "turn JSON reports into a submission to KCIDB, the kernel CI's database",
    "faults": "show page faults and conversions of a VM live, decoded",
    "fleet": "run tests on many hosts: serve, join, run, hosts, status, power",
    "hardware": "run everything on a machine with SEV and pack the results into one archive",
    "html": "turn JSON reports of one or more kernels into an HTML page",
    "lab": "build and boot kernels under QEMU and run tests in them; needs no /dev/kvm",
    "measure": "predict SEV and SNP launch digests and sign ID blocks; needs no KVM",
    "pack": "compile the guest programs of tests for hosts without a compiler",
    "ps": "list the VMs on this machine: process, vCPUs and threads, memory, exits",
    "replay": "replay the ioctls of a record and compare the results",
    "report": "show and verify SNP attestation reports; needs no KVM",
    "repro": "turn a record into a C reproducer",
    "results": "make the reports of a run from its journal, even if it was killed",
    "run": "run the selftests on this host's KVM and print a verdict table",
    "shell": "open a Python prompt with a running VM",
    "shrink": "minimise a record",
    "timeline": "turn a record into a timeline for Perfetto",
    "top": "show the most frequent exits of the VMs on this machine, live",
    "trace": "trace the KVM ioctls of a program and its children, decoded",
    "watch": "show VMs as they are created and destroyed",
}


# Within a test an exception is the test's failure: their supervisor ends in its own way.
_OWN_SIGNALS = ("hardware", "results", "run")


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
            raise TypeError(f"kvmpy.cli.{cmd_name}.{cmd_name} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from kvmpy.version import exact

        click.echo(f"kvmpy {exact()}")
        context.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version,
              help="Show the version, to the commit, and exit.")  # fmt: skip
@click.pass_context
def main(context: click.Context) -> None:
    """Create and test KVM virtual machines from Python."""
    if context.invoked_subcommand not in _OWN_SIGNALS:
        end_by_exception()
