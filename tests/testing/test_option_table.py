# SPDX-License-Identifier: Apache-2.0
"""The table of options: what a command or pytest gets from it is what it hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from kvmpy.cli.main import LazyGroup, main
from kvmpy.testing.option_table import (
    OPTIONS,
    Between,
    Option,
    command_arguments,
    defaults,
    of,
    pytest_arguments,
)
from kvmpy.testing.options import chosen

COMMANDS = ("run", "lab run", "lab shell", "fleet run", "hardware")
TEXTS = {
    "seed": "0x10",
    "repeat": "3",
    "deadline": "2.5",
    "load_seconds": "1.5",
    "memory": "3G",
    "parameters": "kvm.a=1",
    "cpu": "+la57",
    "bugs": "3,17",
}


def sample(option: Option) -> tuple[Any, Any]:
    """Return a value of *option* as text, and as it is read."""
    kind = option.kind
    value: Any = TEXTS.get(option.name, "x")
    if kind == "flag":
        return True, True
    if isinstance(kind, tuple):
        return kind[-1], kind[-1]
    if isinstance(kind, Between):
        return kind.low, kind.low
    read = kind(value) if callable(kind) else value
    return (value, [read]) if option.repeated else (value, read)


def click_command(name: str) -> click.Command:
    group, _, inner = name.partition(" ")
    command = LazyGroup().get_command(click.Context(main), group)
    assert command is not None
    return command.commands[inner] if isinstance(command, click.Group) else command


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_what_the_table_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the table, given to its command, has its value there; absent, its default."""
    monkeypatch.delenv("KVMPY_LAB", raising=False)
    samples = {option.name: sample(option) for option in of(name)}
    words = command_arguments(name, {key: text for key, (text, _) in samples.items()})
    read = click_command(name).make_context(name, words).params
    read.pop("paths", None)
    assert {key: plain(value) for key, value in read.items()} == {
        key: value for key, (_, value) in samples.items()
    }
    absent = click_command(name).make_context(name, []).params
    absent.pop("paths", None)
    assert {key: value or None for key, value in absent.items()} == {
        key: value or None for key, value in defaults(name).items()
    }


def test_pytest_reads_what_the_table_writes(pytester: pytest.Pytester) -> None:
    """Every option of the plugin, given as a command hands it on, has its value in the session."""
    own = {option.name: sample(option) for option in OPTIONS if option.pytest and option.own}
    config = pytester.parseconfig(*pytest_arguments({key: text for key, (text, _) in own.items()}))
    assert {key: chosen(config, key) for key in own} == {key: value for key, (_, value) in own.items()}


def test_each_side_of_the_lab_gets_its_own() -> None:
    """What is written stays on the host, what decides how tests run goes into the VM, and nothing is lost."""
    values = {option.name: sample(option)[0] for option in of("lab run")}
    inside, host = pytest_arguments(values, "inside"), pytest_arguments(values, "host")
    assert host == ["--kvmpy-json", "x", "--ktap", "x", "--junitxml", "x", "--kvmpy-html", "x"]
    assert inside[:4] == ["-k", "x", "--protection", "x"]
    assert {"--deadline", "--strict-private", "--record", "--record-dir"} < set(inside)
    # The seed goes to both: the host chooses it where none is given. A pack is copied into the VM.
    apart = ["--kvmpy-seed", "0x10", "--kvmpy-pack", "x"]
    assert sorted(pytest_arguments(values)) == sorted([*inside, *host, *apart])
