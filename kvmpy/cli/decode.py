# SPDX-License-Identifier: Apache-2.0
"""``kvmpy decode``: numbers and bytes to words."""

from __future__ import annotations

import click


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-a", "--all", "full", is_flag=True, help="Print arrays in full.")
@click.option("-w", "--words", "as_words", is_flag=True, help="Print the arguments for `kvmpy encode`.")
@click.argument("what")
@click.argument("args", nargs=-1)
def decode(full: bool, as_words: bool, what: str, args: tuple[str, ...]) -> None:
    """Decode WHAT and the values that follow it.

    \b
    kvmpy decode 0xc008aeba [BYTES]        an ioctl by number or name, and its argument
    kvmpy decode kvm_sregs BYTES           a struct, or a command such as KVM_SEV_INIT2
    kvmpy decode exit 39 [BYTES]           an exit of KVM_RUN, and struct kvm_run
    kvmpy decode errno EINVAL [IOCTL]      an errno, and its meaning for an ioctl
    kvmpy decode pferr 0x200000004         a page-fault error code
    kvmpy decode msr EFER [VALUE]          an MSR and its bits
    kvmpy decode cpuid 1 EAX EBX ECX EDX   a CPUID leaf and its features, or a kvm_cpuid2
    kvmpy decode sev-error 0x16            a status of the SEV firmware
    kvmpy decode policy [sev|snp] 0x30000  a guest policy
    kvmpy decode vmsa BYTES                a VM save area
    kvmpy decode vmcb BYTES                the control block of an SVM guest
    kvmpy decode ghcb BYTES|VALUE          a GHCB, or a value of its MSR

    BYTES are hexadecimal digits, @FILE, or - for standard input.
    """
    from kvmpy.cli.decoding import DecodeError, lines_of
    from kvmpy.debug.decode.encoder import EncodeError

    try:
        lines = lines_of(what, args, full=full, as_words=as_words)
    except (DecodeError, EncodeError, ValueError, OverflowError) as error:
        raise click.ClickException(str(error)) from None
    for line in lines:
        click.echo(line)
