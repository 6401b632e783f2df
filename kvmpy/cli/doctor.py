# SPDX-License-Identifier: Apache-2.0
"""``kvmpy doctor``: what this host offers, and what is missing for the rest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvmpy import version
from kvmpy.testing import host
from kvmpy.testing.fixes import FIXES

if TYPE_CHECKING:
    from rich.console import Console

    from kvmpy.coco.kvm import Kvm
    from kvmpy.testing.verdicts import Missing

_CPU_FLAGS = (
    *("svm", "vmx", "npt", "ept", "nrip_save", "decodeassists", "flushbyasid", "lbrv"),
    *("sev", "sev_es", "sev_snp", "la57", "hypervisor"),
)
_OTHER_MACHINES = ("ARM_", "LOONGARCH_", "MIPS_", "PPC_", "RISCV_", "S390_", "SPAPR_")
_CONFIG = (
    "KVM",
    "KVM_AMD",
    "KVM_INTEL",
    "KVM_AMD_SEV",
    "KVM_INTEL_TDX",
    "KVM_SW_PROTECTED_VM",
    "KVM_SMM",
    "KVM_HYPERV",
    "KVM_XEN",
)


def _capabilities(kvm: Kvm) -> dict[str, int]:
    from kvmpy.uapi.constants import Cap

    return {name: kvm.check_extension(number) for name, number in sorted(Cap.__members__.items())}


def _gmem_flags(value: int) -> dict[str, bool]:
    from kvmpy.uapi.constants import GmemFlag

    return {name: bool(value & flag) for name, flag in GmemFlag.__members__.items()}


def _protections(kvm: Kvm) -> dict[str, dict[str, Any]]:
    from kvmpy.coco import ladder

    return {
        name: {
            "available": state.available,
            "label": ladder.get(name).label,
            "note": state.note,
            "missing": [{"what": entry.missing, "how": entry.how} for entry in state.missing],
        }
        for name, state in kvm.protections().items()
    }


def _measured(kvm: Kvm) -> dict[str, Any]:
    from kvmpy.testing.measure import measure

    try:
        costs = measure(kvm)
    except (OSError, RuntimeError) as error:
        return {"error": str(error)}
    return {
        "ring0_native": costs.ring0_native,
        "instruction_ns": round(costs.instruction_ns, 3),
        "exit_us": round(costs.exit_us, 2),
    }


def examine() -> dict[str, Any]:
    """Return everything that the doctor finds, as JSON-ready values."""
    names = os.uname()
    missing = host.kvm_missing()
    amd = "kvm_amd" in host.vendor_modules()
    modules = ("kvm", *host.vendor_modules(), *(["ccp"] if amd else []))
    results: dict[str, Any] = {
        "kvmpy": version.exact(),
        "platform": host.platform_name(),
        "cpu": {
            "model": host.cpu_model(),
            "count": os.cpu_count(),
            "flags": {flag: host.cpu_flag(flag) for flag in _CPU_FLAGS},
        },
        "kernel": {
            "release": names.release,
            "machine": names.machine,
            "config": {option: host.kernel_config(option) for option in _CONFIG},
            "fixes": {name: fix.known() for name, fix in FIXES.items()} if amd else {},
        },
        "modules": {module: dict(host.ModuleParameters(module)) for module in modules},
        "kvm": {
            "usable": missing is None,
            "missing": missing.what if missing else "",
            "how": missing.how if missing else "",
        },
    }
    if missing is None:
        from kvmpy.coco import ladder
        from kvmpy.coco.kvm import Kvm

        with Kvm() as kvm:
            results["capabilities"] = _capabilities(kvm)
            results["vm_types"] = [host.vm_type_name(number) for number in sorted(kvm.vm_types())]
            results["guest_memfd_flags"] = _gmem_flags(results["capabilities"]["KVM_CAP_GUEST_MEMFD_FLAGS"])
            results["protections"] = _protections(kvm)
            results["auto"] = ladder.choose(kvm).name
            results["measured"] = _measured(kvm)
    return results


def _words(flags: Mapping[str, bool]) -> str:
    return " ".join(name for name, there in flags.items() if there) or "none of the relevant ones"


def _print_fixes(console: Console, fixes: Mapping[str, bool]) -> None:
    for fix in (FIXES[name] for name, known in fixes.items() if not known):
        console.print(f"  not known to have {fix.commit} (Linux {fix.versions}): {fix.title}", style="yellow")
        console.print(f"        without it: {fix.without}", style="dim")


def _print_modules(console: Console, modules: Mapping[str, Mapping[str, str]]) -> None:
    for module, parameters in modules.items():
        console.print(f"  {module}")
        for name, value in parameters.items():
            console.print(f"    {name} = {value}", style="dim")
    if len(modules) == 1:
        console.print("  no vendor module (kvm_amd, kvm_intel, ...)", style="bold red")


def _print_protections(console: Console, protections: Mapping[str, Mapping[str, Any]]) -> None:
    for name, state in protections.items():
        about = ", ".join(text for text in (state["label"], state["note"]) if text)
        mark, style = ("yes", "green") if state["available"] else ("no ", "yellow")
        console.print(f"  {mark} {name}{f' ({about})' if about else ''}", style=style)
        for entry in state["missing"]:
            console.print(f"        missing: {entry['what']}")
            if entry["how"]:
                console.print(f"        get it:  {entry['how']}", style="dim")


def _print_measured(console: Console, measured: Mapping[str, Any]) -> None:
    if "error" in measured:
        console.print(f"  not measured: {measured['error']}", style="red")
        return
    way = "natively" if measured["ring0_native"] else "in KVM's instruction emulator"
    console.print(f"  ring 0 runs {way}: {measured['instruction_ns']:.2f} ns an instruction")
    console.print(f"  a port exit, round trip: {measured['exit_us']:.1f} us")


def show(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what :func:`examine` found, for people."""
    cpu, kernel, kvm = facts["cpu"], facts["kernel"], facts["kvm"]
    emulated = "" if facts["platform"] == "host" else " (emulated: its results say nothing about hardware)"
    console.print(f"kvmpy {facts['kvmpy']}, platform {facts['platform']}{emulated}")
    console.print(f"CPU: {cpu['count']} x {cpu['model']}, flags: {_words(cpu['flags'])}")
    console.print(f"kernel: {kernel['release']} {kernel['machine']}")
    known = {name: value for name, value in kernel["config"].items() if value is not None}
    console.print(
        "  " + (" ".join(f"{name}={value}" for name, value in known.items()) or "its .config is unknown")
    )
    _print_fixes(console, kernel["fixes"])
    console.print("modules and parameters:")
    _print_modules(console, facts["modules"])
    if not kvm["usable"]:
        console.print(f"KVM cannot be used: {kvm['missing']}", style="bold red")
        console.print(f"  get it: {kvm['how']}")
        return
    console.print("VM types: " + ", ".join(facts["vm_types"]))
    console.print("guest_memfd flags: " + _words(facts["guest_memfd_flags"]))
    console.print("protections, strongest first:")
    _print_protections(console, facts["protections"])
    console.print(f"  auto selects {facts['auto']}")
    console.print("measured:")
    _print_measured(console, facts["measured"])
    offered = {name: value for name, value in facts["capabilities"].items() if value}
    console.print(f"capabilities: {len(offered)} of {len(facts['capabilities'])} known ones")
    for name, value in offered.items():
        console.print(f"  {name} = {value:#x}" if value > 9 else f"  {name} = {value}", style="dim")
    zero = [name.removeprefix("KVM_CAP_") for name, value in facts["capabilities"].items() if not value]
    absent = [name for name in zero if not name.startswith(_OTHER_MACHINES)]
    console.print("not offered: " + " ".join(absent), style="dim")


def lacking(wanted: Sequence[str]) -> list[Missing]:
    """Return what this host lacks of requirements as tests write them, and of protections by name alone."""
    from kvmpy.coco import ladder
    from kvmpy.testing.requirements import Requirements

    known = [f"protection:{name}" if name in ladder.protections() else name for name in wanted]
    try:
        return Requirements().missing(known)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--require") from None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--require", "wanted", metavar="WHAT", multiple=True,
    help="Only tell whether this host has WHAT: a protection, or a requirement as tests write it, such as "
    "KVM_CAP_GUEST_MEMFD or cpuid:xsave. Exit status 1: it has not.",
)  # fmt: skip
def doctor(as_json: bool, wanted: Sequence[str]) -> None:
    """Check CPU, kernel, modules, capabilities and protections, and measure the cost of an exit."""
    if wanted:
        missing = lacking(wanted)
        if as_json:
            click.echo(json.dumps([{"what": entry.what, "how": entry.how} for entry in missing], indent=2))
        for entry in missing if not as_json else ():
            click.echo(f"missing: {entry.what}")
            if entry.how:
                click.echo(f"get it:  {entry.how}")
        sys.exit(bool(missing))
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    show(Console(highlight=False, emoji=False, markup=False, soft_wrap=True), report)
