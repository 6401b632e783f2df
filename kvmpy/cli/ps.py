# SPDX-License-Identifier: Apache-2.0
"""``kvmpy ps``: every VM on this machine, by process."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from kvmpy.cli.columns import explain, numbers, per_second, shorten, size, span

if TYPE_CHECKING:
    from rich.table import Table

    from kvmpy.debug.watch.processes import Survey, VcpuInfo, VmInfo


def _vcpu_row(vcpu: VcpuInfo) -> list[str]:
    thread = "-" if vcpu.thread is None else f"{vcpu.thread} ({vcpu.thread_from})"
    return [
        f"  vcpu {vcpu.id}",
        thread,
        "-" if vcpu.cpu_percent is None else f"{vcpu.cpu_percent:.0f}%",
        "-" if vcpu.cpu_seconds is None else span(vcpu.cpu_seconds),
        (f"pinned to {numbers(vcpu.cpus)}" if vcpu.pinned else numbers(vcpu.cpus)) or "-",
        "",
        per_second(vcpu.exits_per_second),
        "",
    ]


def _vm_row(vm: VmInfo) -> list[str]:
    memory = f"{size(vm.gmem_used)} of {size(vm.gmem)} guest_memfd, " if vm.gmem else ""
    known = [vcpu.cpu_seconds for vcpu in vm.vcpus if vcpu.cpu_seconds is not None]
    busy = [vcpu.cpu_percent for vcpu in vm.vcpus if vcpu.cpu_percent is not None]
    return [
        f"{vm.pid}:{vm.fd}",
        vm.type or "unknown",
        f"{sum(busy):.0f}%" if busy else "-",
        span(sum(known)) if known else "-",
        f"{len(vm.vcpus)} vCPU{'s' if len(vm.vcpus) != 1 else ''}",
        f"{memory}{size(vm.rss)} resident",
        per_second(vm.exits_per_second),
        f"{shorten(vm.command)} ({vm.user}, {span(max(0.0, time.time() - vm.started))})",
    ]


def table(survey: Survey) -> Table:
    """Return one row for each VM and each vCPU."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("VM pid:fd", "type / thread", "CPU", "CPU time", "vCPUs / host CPUs", "memory"):
        grid.add_column(title, justify="right" if title.startswith("CPU") else "left", no_wrap=True)
    grid.add_column("exits/s", justify="right", no_wrap=True)
    grid.add_column("process", overflow="fold")
    for vm in survey.vms:
        grid.add_row(*_vm_row(vm), style="bold" if vm.vcpus else None)
        for vcpu in vm.vcpus:
            grid.add_row(*_vcpu_row(vcpu))
    return grid


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every counter.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 60),
    default=0.5,
    show_default=True,
    help="Seconds between the two samples that rates are computed from.",
)
def ps(as_json: bool, interval: float) -> None:
    """List every VM on this machine: process, type if known, vCPUs and threads, memory, exits.

    Exits per second come from debugfs, or from statistics files that the VMM has open; both need root.
    """
    from kvmpy.debug.watch.processes import survey_twice
    from kvmpy.testing.table import plain_console

    snapshot = survey_twice(interval)
    if as_json:
        document = {
            "schema": "kvmpy-ps/1",
            "interval": interval,
            "vms": [vm.as_dict() for vm in snapshot.vms],
            "unseen": [{"what": entry.what, "how": entry.how} for entry in snapshot.unseen],
        }
        click.echo(json.dumps(document, indent=2))
        return
    if snapshot.vms:
        plain_console().print(table(snapshot))
    else:
        click.echo("no running VM was seen")
    explain(snapshot.unseen)
