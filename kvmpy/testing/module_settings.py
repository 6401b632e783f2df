# SPDX-License-Identifier: Apache-2.0
"""Parameters of KVM's modules on this host: set for a run, and put back as they were.

What sysfs lets be written is written; the rest needs the modules loaded anew, which is done only when nothing
uses KVM.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmpy.core.kernel import SYS_MODULE
from kvmpy.testing.configurations import is_value, nearest

CORE = "kvm"
_SECONDS = 60.0
_OWNER_WRITES = 0o200


class SettingError(RuntimeError):
    """A parameter cannot be set, or cannot be put back; the text says why, and what to do."""


def _users() -> list[str]:
    from kvmpy.debug.watch.processes import survey

    return sorted({f"process {vm.pid} ({vm.command})" for vm in survey().vms})


@dataclass(frozen=True)
class Modules:
    """The kernel's modules: sysfs, and the commands that load and unload one."""

    sysfs: Path = SYS_MODULE
    modprobe: Sequence[str] = ("modprobe",)
    users: Callable[[], list[str]] = _users

    def parameters(self, module: str) -> dict[str, str]:
        """Return the module's parameters that can be read."""
        values = {}
        for file in sorted((self.sysfs / module / "parameters").glob("*")):
            try:
                values[file.name] = file.read_text(encoding="utf-8", errors="replace").strip()
            except OSError:
                continue
        return values

    def loaded(self) -> list[str]:
        """Return the vendor modules of KVM that are there, then KVM itself: the order to unload them in."""
        vendors = sorted(path.name for path in self.sysfs.glob(f"{CORE}_*"))
        return [*vendors, *([CORE] if (self.sysfs / CORE).is_dir() else [])]

    def built_in(self, module: str) -> bool:
        """Whether the kernel has it without a module file."""
        return not (self.sysfs / module / "initstate").exists()

    def writable(self, module: str, name: str) -> bool:
        """Whether the kernel lets root write it."""
        return bool((self.sysfs / module / "parameters" / name).stat().st_mode & _OWNER_WRITES)

    def write(self, module: str, name: str, value: str) -> None:
        """Write one parameter; SettingError when the kernel refuses."""
        try:
            (self.sysfs / module / "parameters" / name).write_text(value, encoding="ascii")
        except OSError as error:
            raise SettingError(f"{module}.{name}={value} is refused: {error.strerror}") from None

    def busy(self) -> list[str]:
        """Return who uses KVM; empty when the modules can be unloaded."""
        counts = {}
        for module in self.loaded():
            try:
                count = int((self.sysfs / module / "refcnt").read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue
            holders = [path.name for path in (self.sysfs / module / "holders").glob("*")]
            counts[module] = count - sum(holder in self.loaded() for holder in holders)
        used = [f"{module} ({count} references)" for module, count in counts.items() if count > 0]
        return (
            (self.users() or [f"somebody whom `kvmpy ps` does not show: {', '.join(used)}"]) if used else []
        )

    def unload(self, module: str) -> None:
        """Unload one module."""
        self._command("-r", module)

    def load(self, module: str, options: Mapping[str, str]) -> None:
        """Load one module with *options* beside those of modprobe.d."""
        self._command(module, *(f"{name}={value}" for name, value in options.items()))

    def _command(self, *words: str) -> None:
        command = [*self.modprobe, *words]
        try:
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SettingError(f"{' '.join(command)}: {error}") from None
        if done.returncode:
            raise SettingError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")


@dataclass
class State:
    """What has been changed: enough to put it back, by whoever reads it.

    *before* and *after* are values by ``module.name``; *loaded* has all parameters of the modules that are
    loaded anew, as they were, in the order in which they are unloaded.
    """

    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What will be done: parameters to be written, and those that modules are loaded anew with."""

    written: Mapping[str, str]
    reloaded: Mapping[str, str]


def plan(modules: Modules, words: Iterable[str], *, reload: bool) -> Plan:
    """Return how the parameters *words* (``kvm.halt_poll_ns=0``) are set; SettingError where they cannot be.

    Nothing is changed. *reload*: modules may be loaded anew.
    """
    written: dict[str, str] = {}
    reloaded: dict[str, str] = {}
    for name, _, value in (word.partition("=") for word in words):
        module, _, parameter = name.partition(".")
        if module != CORE and not module.startswith(f"{CORE}_"):
            raise SettingError(f"{name} is no parameter of KVM's modules: only the lab can boot with it")
        there = modules.parameters(module)
        if parameter not in there:
            if not (modules.sysfs / module).is_dir():
                raise SettingError(f"{name}: no module {module} is loaded{nearest(module, modules.loaded())}")
            hint = nearest(parameter, there).replace("mean ", f"mean {module}.")
            raise SettingError(f"{module} has no parameter {name}{hint}")
        if value != "auto" and is_value(name, value, there[parameter]):
            continue
        if modules.writable(module, parameter):
            written[name] = value
            continue
        if modules.built_in(module):
            raise SettingError(f"{name} can be set on the kernel's command line only: {module} is built in")
        if not reload:
            raise SettingError(f"{name} can be set only when {module} is loaded: --reload does that")
        reloaded[name] = value
    if reloaded:
        if fixed := [module for module in modules.loaded() if modules.built_in(module)]:
            raise SettingError(f"{CORE} cannot be loaded anew: {', '.join(fixed)} is built in")
        if users := modules.busy():
            raise SettingError(f"KVM is in use, so that it cannot be loaded anew: {'; '.join(users)}")
    return Plan(written, reloaded)


def apply(modules: Modules, todo: Plan, keep: Callable[[State], None]) -> State:
    """Do what *todo* says; *keep* gets the state before each change. SettingError: some may be changed."""
    state = State()
    for name in (*todo.written, *todo.reloaded):
        module, _, parameter = name.partition(".")
        state.before[name] = modules.parameters(module)[parameter]
        state.after[name] = todo.written.get(name) or todo.reloaded[name]
    if todo.reloaded:
        touched = _to_reload(modules, todo.reloaded)
        state.loaded = {module: modules.parameters(module) for module in touched}
    keep(state)
    if todo.reloaded:
        _reload(modules, list(state.loaded), todo.reloaded)
    for name, value in todo.written.items():
        module, _, parameter = name.partition(".")
        modules.write(module, parameter, value)
    for name, value in {**todo.written, **todo.reloaded}.items():
        module, _, parameter = name.partition(".")
        real = modules.parameters(module).get(parameter, "gone")
        if not is_value(name, value, real):
            raise SettingError(f"{name} is {real} now, not {value}")
        state.after[name] = real
    keep(state)
    return state


def _to_reload(modules: Modules, wanted: Iterable[str]) -> list[str]:
    """Return which modules go, in that order: the vendor's own alone, or all where KVM itself is meant."""
    meant = {name.partition(".")[0] for name in wanted}
    return [module for module in modules.loaded() if CORE in meant or module in meant]


def _reload(modules: Modules, order: Sequence[str], options: Mapping[str, str]) -> None:
    for module in order:
        if (modules.sysfs / module).is_dir():
            modules.unload(module)
    for module in reversed(order):
        own = {
            name.partition(".")[2]: value
            for name, value in options.items()
            if name.partition(".")[0] == module
        }
        modules.load(module, own)


def restore(modules: Modules, state: State) -> list[str]:
    """Put everything back as *state* has it, and return what could not be: a line each."""
    complaints = []
    if state.loaded:
        try:
            _restore_loaded(modules, state.loaded)
        except SettingError as error:
            complaints.append(str(error))
    for name, before in state.before.items():
        module, _, parameter = name.partition(".")
        now = modules.parameters(module).get(parameter)
        if now is None:
            complaints.append(f"{name} was {before}, and is gone")
        elif not is_value(name, before, now):
            if not is_value(name, state.after[name], now):
                complaints.append(f"{name} was {before}; somebody else has made it {now}, which stays")
                continue
            if not modules.writable(module, parameter):
                complaints.append(f"{name} was {before}, and stays {now}")
                continue
            try:
                modules.write(module, parameter, before)
            except SettingError as error:
                complaints.append(f"{name} was {before}, and stays {now}: {error}")
    return complaints


def _restore_loaded(modules: Modules, before: Mapping[str, Mapping[str, str]]) -> None:
    if users := modules.busy():
        raise SettingError(f"KVM is in use and cannot be loaded as it was: {'; '.join(users)}")
    order = list(before)
    _reload(modules, order, {})
    # What modprobe.d does not say was said on a command line.
    differing = {
        f"{module}.{name}": value
        for module, values in before.items()
        for name, value in values.items()
        if modules.parameters(module).get(name) != value
    }
    fixed = {name: value for name, value in differing.items() if not modules.writable(*name.split(".", 1))}
    if fixed:
        _reload(modules, order, fixed)
    for name, value in differing.items():
        module, _, parameter = name.partition(".")
        if modules.parameters(module).get(parameter) != value:
            modules.write(module, parameter, value)
