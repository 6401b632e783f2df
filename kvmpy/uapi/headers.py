# SPDX-License-Identifier: Apache-2.0
"""Read somebody's kernel headers: find them, list what they declare, and let the compiler measure it.

Names come from the preprocessor (``gcc -E -dD``) and pycparser, numbers from a compiled probe, so no C
expression is evaluated by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pycparser import c_ast, c_parser

from kvmpy.owned import OwnedFolder

MAIN = "linux/kvm.h"
FILES = (MAIN, "linux/kvm_para.h", "linux/psp-sev.h", "linux/userfaultfd.h")

# Files whose declarations count; what they include beside (types.h, ioctl.h, ...) is not KVM's.
_WANTED = re.compile(r"/(linux|asm)/(kvm|kvm_para|psp-sev|userfaultfd)\.h$")
_ASM_PLACES = ("", "x86_64-linux-gnu", "../lib/linux/uapi/x86", "../../lib/linux/uapi/x86")
_TIMEOUT = 120

_TYPES = "".join(
    f"typedef {sign} {base} __{letter}{bits};"
    for bits, base in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
    for letter, sign in (("u", "unsigned"), ("s", "signed"))
) + "".join(f"typedef unsigned long long __{kind};" for kind in ("le64", "be64", "aligned_u64"))


class HeaderError(RuntimeError):
    """Headers that cannot be used, or a compiler that is missing or fails; the text says what to do."""


@dataclass(frozen=True)
class Headers:
    """A header tree: *includes* are the compiler's include folders, *files* those of FILES that are there."""

    includes: tuple[Path, ...]
    files: tuple[str, ...]

    @property
    def source(self) -> str:
        """The C text that includes all of them."""
        return "".join(f"#include <{name}>\n" for name in self.files)


@dataclass(frozen=True)
class Member:
    """A field by its path in C (``redirtbl[0].bits``); *open* is an array without size, *bits* a width."""

    path: str
    open: bool = False
    bits: int = 0


@dataclass
class Declared:
    """What headers declare: macros with a value and without parameters, enumerators, structs."""

    ioctls: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    structs: dict[str, list[Member]] = field(default_factory=dict)


def locate(directory: Path) -> Headers:
    """Find the headers in a ``headers_install`` tree, an unpacked linux-libc-dev, or an include folder.

    HeaderError when *directory* is none of these.
    """
    if not directory.is_dir():
        raise HeaderError(f"{directory}: no such directory")
    for root in (directory, directory / "include", directory / "usr" / "include"):
        if (root / MAIN).is_file():
            break
    else:
        if (directory / "include" / "uapi" / MAIN).is_file():
            raise HeaderError(
                f"{directory} is a kernel source tree: run `make headers_install INSTALL_HDR_PATH=OUT` there "
                "and give OUT"
            )
        raise HeaderError(
            f"{directory}: no {MAIN} in it, in include/ or in usr/include/; give the folder of a "
            "`make headers_install` or of an unpacked linux-libc-dev"
        )
    for place in _ASM_PLACES:
        if (root / place / "asm" / "kvm.h").is_file():
            includes = (root,) if not place else (root, Path(os.path.normpath(root / place)))
            return Headers(includes, tuple(name for name in FILES if (root / name).is_file()))
    raise HeaderError(
        f"{root}: {MAIN} is there, asm/kvm.h of x86 is not (looked in {', '.join(_ASM_PLACES[1:])} too)"
    )


def compiler() -> list[str]:
    """Return the command of the C compiler, ``$CC`` or gcc; HeaderError when it is not there."""
    command = shlex.split(os.environ.get("CC") or "gcc")
    program = shutil.which(command[0])
    if program is None:
        raise HeaderError(f"no C compiler ({command[0]}): install one with `apt-get install gcc libc6-dev`")
    return [program, *command[1:]]


def _run(arguments: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            arguments, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        raise HeaderError(f"{Path(arguments[0]).name} did not end within {_TIMEOUT} s") from None


def _flags(headers: Headers) -> list[str]:
    return [f"-I{folder}" for folder in headers.includes]


def declared(headers: Headers) -> Declared:
    """Return what *headers* declare; HeaderError when they cannot be preprocessed or parsed."""
    gcc = [
        *compiler(),
        "-E",
        "-dD",
        "-nostdinc",
        "-D__attribute__(x)=",
        "-D__extension__=",
        *_flags(headers),
        "-",
    ]
    done = _run(gcc, headers.source)
    if done.returncode:
        raise HeaderError(f"the headers cannot be preprocessed:\n{done.stderr.strip()}")
    declarations = Declared()
    code = []
    wanted = False
    for line in done.stdout.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            wanted = bool(_WANTED.search(marker[1]))
        elif wanted and line.startswith("#"):
            _macro(line, declarations)
        elif wanted:
            code.append(line)
    _parse("\n".join(code), declarations)
    if "kvm_regs" in declarations.structs and not declarations.structs.keys() & {
        "kvm_dtable",
        "kvm_lapic_state",
    }:
        raise HeaderError(f"{headers.includes[-1]}: asm/kvm.h is of another architecture than x86")
    return declarations


def _macro(line: str, result: Declared) -> None:
    macro = re.match(r"#define (\w+)\s+(\S.*)", line)
    if macro is None or macro[2] == macro[1]:
        return
    kind = result.ioctls if re.search(r"\b_IO(R|W|WR)?\(", macro[2]) else result.constants
    if macro[1] not in kind:
        kind.append(macro[1])


def _parse(code: str, declarations: Declared) -> None:
    # The kernel wraps open arrays in a struct that begins with an empty one; pycparsers differ on that.
    text = re.sub(r"struct\s*\{\s*\}\s*\w+\s*;", "", code)
    try:
        tree = c_parser.CParser().parse(_TYPES + "\n" + text, "headers")
    except c_parser.ParseError as error:
        raise HeaderError(f"the headers cannot be parsed: {error}") from None
    visitor = _Visitor(declarations)
    visitor.visit(tree)


class _Visitor(c_ast.NodeVisitor):  # type: ignore[misc]
    def __init__(self, declarations: Declared) -> None:
        self.found = declarations

    def visit_Struct(self, node: c_ast.Struct) -> None:  # noqa: N802
        if node.decls is not None and node.name:
            self.found.structs[node.name] = list(_members(node, ""))
        self.generic_visit(node)

    def visit_Enumerator(self, node: c_ast.Enumerator) -> None:  # noqa: N802
        if node.name not in self.found.constants:
            self.found.constants.append(node.name)


def _members(node: c_ast.Struct | c_ast.Union, prefix: str) -> Iterator[Member]:
    for decl in node.decls or ():
        kind = decl.type
        path = prefix + (decl.name or "")
        is_open = isinstance(kind, c_ast.ArrayDecl) and kind.dim is None
        while isinstance(kind, c_ast.ArrayDecl):
            path += "[0]"
            kind = kind.type
        inner = kind.type if isinstance(kind, c_ast.TypeDecl) else kind
        nameless = isinstance(inner, (c_ast.Struct, c_ast.Union)) and not inner.name
        if decl.name is None:
            if nameless:
                yield from _members(inner, prefix)
            continue
        yield Member(prefix + decl.name, is_open, int(decl.bitsize.value, 0) if decl.bitsize else 0)
        if nameless:
            yield from _members(inner, path + ".")


@dataclass(frozen=True)
class Question:
    """Something to measure: an integer constant *expression*, or the place of a bit-field of *struct*."""

    key: str
    expression: str = ""
    struct: str = ""
    member: str = ""


def measure(headers: Headers, questions: Iterable[Question]) -> dict[str, int | tuple[int, int]]:
    """Compile a probe against *headers* and run it; return the answers by key.

    A bit-field's answer is (first bit, width).  Questions that do not compile to a number have no answer.
    HeaderError when the probe cannot be built at all.
    """
    wanted = list(questions)
    with OwnedFolder("abi") as folder:
        while True:
            source = folder / "probe.c"
            source.write_text(_probe(headers, wanted))
            program = folder / "probe"
            gcc = [*compiler(), "-w", "-std=gnu11", "-fmax-errors=0", *_flags(headers), "-DPAGE_SIZE=4096"]
            done = _run([*gcc, "-o", str(program), str(source)])
            if done.returncode == 0:
                break
            bad = {int(line) for line in re.findall(r"question:(\d+):\d+: (?:fatal )?error", done.stderr)}
            if not bad and "stdio.h" in done.stderr:
                raise HeaderError("the C library's headers are missing: `apt-get install libc6-dev`")
            if not bad:
                raise HeaderError(f"the probe does not compile:\n{done.stderr.strip()[:2000]}")
            wanted = [question for number, question in enumerate(wanted, 1) if number not in bad]
        done = _run([str(program)])
    if done.returncode:
        raise HeaderError(f"the probe failed with status {done.returncode}")
    answers: dict[str, int | tuple[int, int]] = {}
    for line in done.stdout.splitlines():
        kind, number, first, second = line.split()
        value = (int(first), int(second)) if kind == "b" else int(second) - (1 << 64 if int(first) else 0)
        answers[wanted[int(number)].key] = value
    return answers


_PROBE = """#include <stdio.h>
#include <stddef.h>
#include <string.h>
#include <errno.h>
{includes}
static void bits(int number, const unsigned char *at, size_t size)
{{
	int first = -1, count = 0;
	for (size_t i = 0; i < size * 8; i++)
		if (at[i / 8] >> i % 8 & 1) {{
			if (first < 0)
				first = i;
			count++;
		}}
	printf("b %d %d %d\\n", number, first, count);
}}
int main(void)
{{
{body}
return 0;
}}
"""


def _probe(headers: Headers, questions: list[Question]) -> str:
    lines = []
    for number, ask in enumerate(questions):
        # Errors name the question by the line number that this directive sets.
        lines.append(f'#line {number + 1} "question"')
        if ask.struct:
            lines.append(
                f"{{ struct {ask.struct} s; memset(&s, 0, sizeof s); s.{ask.member} = -1; "
                f"bits({number}, (void *)&s, sizeof s); }}"
            )
        else:
            # The assertion refuses what is no integer constant: strings, types, incomplete structs.
            lines.append(
                f'{{ _Static_assert((({ask.expression}) | 0) == ({ask.expression}), "");'
                f' printf("n {number} %d %llu\\n", ({ask.expression}) < 0,'
                f" (unsigned long long)({ask.expression})); }}"
            )
    return _PROBE.format(includes=headers.source, body="\n".join(lines))
