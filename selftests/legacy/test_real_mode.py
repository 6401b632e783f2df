# SPDX-License-Identifier: Apache-2.0
"""Instructions in real mode, where KVM may have to emulate them: results, flags, memory and exceptions.

AMD APM volume 3; volume 2, 8.6 for exceptions in real mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvmpy import Fault, GuestProgram, Legacy, LegacyMode, Vector
from selftests.legacy.conftest import LegacyMaker

pytestmark = pytest.mark.protections("none")

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
DATA = 0xF000

# A line a case: its name, and the instructions.
CASES = """
[moves]
	mov_imm:	movw $0x1234, %ax; movb $0x56, %bl; movl $0x89abcdef, %ecx
	mov_memory:	movw %ax, 0xf000; movw 0xf000, %bx; movb %al, 0xf003; movl 0xf000, %ecx
	mov_moffs:	movl %eax, 0xf010; movw 0xf012, %ax
	mov_base_index:	movw %ax, (%bx,%si); movw -2(%bp,%di), %cx
	mov_wide_address: movw %ax, (%ebx,%ecx,4); movw 8(%edx), %si
	mov_segment:	movw %ax, %es; movw %bx, %es:2; movw %es, %cx
	lds:		ldsw (%bx), %si; movw %ds, %ax
	les:		lesl (%bx), %edi; movw %es, %ax
	lss:		lssw (%bx), %sp; movw %ss, %ax; movw %cx, %ss; movw $0x1ffe, %sp
	lea:		leaw 0x10(%bx,%si), %ax; leal (%ebx,%ecx,8), %edx
	movzx:		movzbw %al, %bx; movzwl %ax, %ecx
	movsx:		movsbw %al, %bx; movswl %ax, %ecx
	xchg:		xchgw %ax, %bx; xchgb %cl, %ch; xchgw %dx, 0xf000
	xlat:		xlatb
[stack]
	push_pop:	pushw %ax; pushl %ebx; popl %ecx; popw %dx
	push_imm:	pushw $-2; pushl $-3; popl %eax; popw %bx
	push_sp:	movw %sp, %bx; pushw %sp; popw %ax; subw %ax, %bx
	pop_memory:	pushw %ax; popw 0xf000; movw 0xf000, %bx
	pusha_popa:	pushaw; xorw %ax, %ax; xorw %bx, %bx; xorw %si, %si; popaw
	pushad_popad:	pushal; xorl %eax, %eax; xorl %edi, %edi; popal
	push_segment:	movw %ax, %fs; pushw %fs; popw %bx; pushw %cx; popw %gs; movw %gs, %dx
	pushf_popf:	pushw $0xcd7; popfw; pushfw; popw %ax
	pushfd:		pushl $0x40ad7; popfl; pushfl; popl %eax; pushl $2; popfl
	lahf_sahf:	sahf; lahf
[arithmetic]
	add_flags:	addw %bx, %ax
	adc:		stc; adcw %bx, %ax
	sub_flags:	subb %bl, %al
	sbb:		stc; sbbl %ebx, %eax
	cmp:		cmpw %bx, %ax
	neg:		negw %ax
	inc_keeps_carry: stc; incw %ax
	dec:		decw %ax
	logic:		andw %bx, %ax; orw $0x80, %ax; xorw %cx, %ax; notw %dx
	test:		testw %bx, %ax
[products]
	mul:		mulw %bx
	mul32:		mull %ebx
	imul:		imulb %bl
	imul3:		imulw $-3, %bx, %ax
	div:		divw %bx
	idiv:		idivw %bx
	div_by_zero:	divw %bx
	div_overflow:	divb %bl
	idiv_overflow:	idivw %bx
	cbw:		cbtw
	cwd:		cwtd
	cwde:		cwtl
	cdq:		cltd
	aam:		aam
	aam_zero:	.byte 0xd4, 0
	aad:		aad
	salc:		stc; .byte 0xd6
	das:		das
[bits]
	shl:		shlw $4, %ax
	shr:		shrw %cl, %ax
	sar:		sarw $1, %ax
	rol:		rolw $4, %ax
	rcr:		stc; rcrw $1, %ax
	shld:		shldw $8, %bx, %ax
	shrd:		shrdl %cl, %ebx, %eax
	bsf:		bsfw %bx, %ax; bsrl %ecx, %edx
	bts:		btsw %bx, 0xf000; movw 0xf002, %ax
	setcc:		cmpw %bx, %ax; setb %cl; setg %ch; sets %dl
	cmov:		cmpw %bx, %ax; cmovbw %si, %cx; cmovaw %si, %dx
	bswap:		bswapl %eax
[exchanges]
	xadd:		xaddw %bx, %ax
	cmpxchg:	cmpxchgw %bx, 0xf000; movw 0xf000, %cx
	cmpxchg8b:	cmpxchg8b 0xf000; movl 0xf004, %esi
[strings]
	movs:		cld; rep movsb
	movs_down:	std; rep movsw; cld
	stos:		cld; rep stosl
	stos_override:	cld; rep stosb
	scas:		cld; repne scasb
	cmps:		cld; repe cmpsb
	lods:		cld; lodsw; lodsb %fs:(%si)
	rep_none:	rep stosb
[jumps]
	jcc:		cmpw %bx, %ax; jb 1f; movw $1, %cx; 1: ja 2f; movw $2, %dx; 2: nop
	jcxz:		jcxz 1f; movw $1, %ax; 1: incw %bx
	jecxz:		jecxz 1f; movw $1, %ax; 1: incw %bx
	loop:		1: incw %ax; loop 1b
	loope:		1: cmpw %ax, %ax; incw %bx; cmpw $3, %bx; loopne 1b
	call_near:	call 1f; jmp 2f; 1: incw %ax; ret; 2: incw %bx
	call_indirect:	movw $1f, %bx; call *%bx; jmp 2f; 1: incw %ax; ret $0; 2: nop
	call_far:	lcall $0x100, $(1f - 0x1000); jmp 2f; 1: movw %cs, %ax; lret; 2: movw %cs, %bx
	jmp_far:	ljmp $0x100, $(1f - 0x1000); 1: movw %cs, %ax; ljmp $0, $2f; 2: movw %cs, %bx
	ret_imm:	pushw %ax; pushw $1f; ret $2; 1: movw %sp, %bx
	lret_imm:	pushw %ax; pushw %cs; pushw $1f; lret $2; 1: nop
	enter_leave:	enterw $0x10, $0; movw %sp, %ax; leavew; movw %sp, %bx
[interrupts]
	int_iret:	movw $1f, 0x1a0; movw $0, 0x1a2; stc; int $0x68; jmp 2f; \
			1: pushfw; popw %bx; incw %ax; iretw; 2: nop
	int3:		int3
	into:		movb $0x7f, %al; incb %al; into
	into_not:	xorw %ax, %ax; into
	iret32:		pushl $0x802; pushl $0; pushl $1f; iretl; 1: pushfw; popw %ax; pushw $2; popfw
	flags:		stc; cmc; setc %al; stc; setc %bl; clc; setc %cl; std; pushfw; popw %dx; cld
	sti_cli:	sti; pushfw; popw %ax; cli; pushfw; popw %bx
	ud2:		ud2
	hlt_free_nop:	nop; pause; xchgw %ax, %ax
[system]
	cpuid:		xorl %eax, %eax; cpuid; testl %eax, %eax; setnz %cl; movzbl %cl, %eax
	rdtsc:		rdtsc; orl %edx, %eax; setnz %al; movzbl %al, %eax; xorl %edx, %edx
	smsw:		smsw %ax; andw $1, %ax
	mov_cr:		movl %cr0, %eax; andl $1, %eax; movl %cr4, %ebx
	mov_dr:		movl %eax, %dr0; movl %dr0, %ebx
	sgdt:		sgdtl 0xf000; movw 0xf000, %ax; sidtl 0xf010; movw 0xf010, %bx
	lidt:		sidtl 0xf000; lidtl 0xf000; sidtl 0xf010; movl 0xf010, %eax; cmpl 0xf000, %eax; sete %bl
	str:		str %ax
	sldt:		sldt %ax
	lock_add:	lock addw %ax, 0xf000; movw 0xf000, %bx
	lock_register:	.byte 0xf0, 0x01, 0xc3
	in_memory_rip:	movw $1f, %bx; movw %cs:(%bx), %ax; jmp 2f; 1: .word 0xbeef; 2: nop
[limits]
	word_at_ffff:	movw 0xffff, %ax
	dword_at_fffd:	movl 0xfffd, %eax
	word_at_ffff_ss: movw $0xffff, %bp; movw (%bp), %ax
	wide_offset:	movl $0x10000, %ebx; movw (%ebx), %ax
[rare]
	daa:		daa
	aaa:		aaa
	aas:		aas
	enter_nested:	enterw $8, $2; movw %sp, %ax; leavew
	icebp:		.byte 0xf1
	bound:		boundw %ax, 0xf000
	bound_out:	boundw %ax, 0xf000
	lar:		larw %ax, %bx
	verr:		verr %ax
	arpl:		arpl %ax, %bx
	fpu:		fninit; fld1; fld1; faddp; fistps 0xf000; movw 0xf000, %ax
"""


def _chapters() -> dict[str, dict[str, str]]:
    chapters: dict[str, dict[str, str]] = {}
    for line in CASES.replace("\\\n", " ").splitlines():
        name, colon, code = line.strip().partition(":")
        if colon:
            chapters[next(reversed(chapters))][name] = code.strip()
        else:
            chapters[name.strip("[]")] = {}
    return chapters


CHAPTERS = _chapters()
LIMITS, RARE = CHAPTERS.pop("limits"), CHAPTERS.pop("rare")
ASSEMBLY = '\t.section .low, "awx", @progbits\n\t.code16\n' + "".join(
    f"{name}:\t{code}\n\tret\n"
    for cases in (*CHAPTERS.values(), LIMITS, RARE)
    for name, code in cases.items()
)


@dataclass(frozen=True)
class Case:
    """Registers and the data page's bytes before and after; *flags* by mask; *vector* of an exception."""

    before: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)
    flags: tuple[int, int] = (0, 0)
    vector: Vector | None = None
    memory: bytes = b""
    stored: bytes = b""
    # How far behind the label an exception's IP is.
    offset: int = 0


ARITHMETIC = CF | PF | AF | ZF | SF | OF
EXPECTED = {
    "mov_imm": Case({}, {"ax": 0x1234, "bx": 0x56, "ecx": 0x89ABCDEF}),
    "mov_memory": Case({"eax": 0xAAAA1234}, {"bx": 0x1234, "ecx": 0x34001234}),
    "mov_moffs": Case({"eax": 0xAABBCCDD}, {"eax": 0xAABBAABB}),
    "mov_base_index": Case(
        {"ax": 0x77, "bx": 0xF000, "si": 8, "bp": 0xF002, "di": 8}, {"cx": 0x77}, stored=bytes(8) + b"\x77"
    ),
    "mov_wide_address": Case({"ax": 0x55, "ebx": 0xF000, "ecx": 2, "edx": 0xF000}, {"si": 0x55}),
    "mov_segment": Case({"ax": 0xF00, "bx": 0x1111}, {"cx": 0xF00}, stored=b"\0\0\x11\x11"),
    "lds": Case({"bx": 0xF000}, {"si": 0x1234, "ax": 0x5678}, memory=b"\x34\x12\x78\x56"),
    "les": Case({"bx": 0xF000}, {"edi": 0x9ABC1234, "ax": 0x42}, memory=b"\x34\x12\xbc\x9a\x42\0"),
    "lss": Case({"bx": 0xF000, "cx": 0}, {"ax": 0x20}, memory=b"\0\x10\x20\0"),
    "lea": Case({"ebx": 0x10F00, "si": 0x200, "ecx": 2}, {"ax": 0x1110, "edx": 0x10F10}),
    "movzx": Case({"eax": 0xFFFFFF80, "ebx": 0xFFFF0000}, {"ebx": 0xFFFF0080, "ecx": 0xFF80}),
    "movsx": Case({"eax": 0xFF80}, {"bx": 0xFF80, "ecx": 0xFFFFFF80}),
    "xchg": Case(
        {"ax": 1, "bx": 2, "cx": 0x1234, "dx": 7}, {"ax": 2, "bx": 1, "cx": 0x3412, "dx": 9}, memory=b"\x09"
    ),
    "xlat": Case({"eax": 0x1103, "bx": 0xF000}, {"eax": 0x1144}, memory=b"\x11\x22\x33\x44"),
    "push_pop": Case({"ax": 0x1111, "ebx": 0x22223333}, {"ecx": 0x22223333, "dx": 0x1111}),
    "push_imm": Case({}, {"eax": 0xFFFFFFFD, "bx": 0xFFFE}),
    "push_sp": Case({}, {"bx": 0}),
    "pop_memory": Case({"ax": 0x4321}, {"bx": 0x4321}),
    "pusha_popa": Case(
        {"ax": 1, "bx": 2, "si": 3, "bp": 4}, {"ax": 1, "bx": 2, "si": 3, "bp": 4, "sp": 0x2000}
    ),
    "pushad_popad": Case({"eax": 0x10001, "edi": 0x20002}, {"eax": 0x10001, "edi": 0x20002, "sp": 0x2000}),
    "push_segment": Case({"ax": 0x1234, "cx": 0x4321}, {"bx": 0x1234, "dx": 0x4321}),
    "pushf_popf": Case({}, {"ax": 0xCD7}),
    "pushfd": Case({}, {"eax": 0x40AD7}),
    "lahf_sahf": Case({"ax": 0xD500}, {"ax": 0xD700}),
    "add_flags": Case({"ax": 0x7FFF, "bx": 1}, {"ax": 0x8000}, (ARITHMETIC, PF | AF | SF | OF)),
    "adc": Case({"ax": 0xFFFF, "bx": 0}, {"ax": 0}, (ARITHMETIC, CF | PF | AF | ZF)),
    "sub_flags": Case({"eax": 0x100, "bx": 1}, {"eax": 0x1FF}, (ARITHMETIC, CF | PF | AF | SF)),
    "sbb": Case({"eax": 0, "ebx": 0xFFFFFFFF}, {"eax": 0}, (CF | ZF, CF | ZF)),
    "cmp": Case({"ax": 0x8000, "bx": 1}, {"ax": 0x8000}, (ARITHMETIC, PF | AF | OF)),
    "neg": Case({"ax": 0x8000}, {"ax": 0x8000}, (CF | OF, CF | OF)),
    "inc_keeps_carry": Case({"eax": 0x1FFFF}, {"eax": 0x10000}, (CF | ZF, CF | ZF)),
    "dec": Case({"ax": 0}, {"ax": 0xFFFF}, (SF | ZF, SF)),
    "logic": Case({"ax": 0xFF0F, "bx": 0xF0F, "cx": 0xFF, "dx": 0x1234}, {"ax": 0x0F70, "dx": 0xEDCB}),
    "test": Case({"ax": 0x8000, "bx": 0x8000}, {"ax": 0x8000}, (CF | SF | ZF | OF, SF)),
    "mul": Case(
        {"eax": 0x1FFFF, "bx": 2, "edx": 0x10000}, {"eax": 0x1FFFE, "edx": 0x10001}, (CF | OF, CF | OF)
    ),
    "mul32": Case({"eax": 0x80000000, "ebx": 6}, {"eax": 0, "edx": 3}, (CF | OF, CF | OF)),
    "imul": Case({"ax": 0xFE, "bx": 3}, {"ax": 0xFFFA}, (CF | OF, 0)),
    "imul3": Case({"bx": 5}, {"ax": 0xFFF1}, (CF | OF, 0)),
    "div": Case({"ax": 0x10, "dx": 1, "bx": 0x100}, {"ax": 0x100, "dx": 0x10}),
    "idiv": Case({"ax": 0xFFF9, "dx": 0xFFFF, "bx": 2}, {"ax": 0xFFFD, "dx": 0xFFFF}),
    "div_by_zero": Case({"ax": 1}, {"ax": 1}, vector=Vector.DE),
    "div_overflow": Case({"ax": 0x200, "bx": 2}, {"ax": 0x200}, vector=Vector.DE),
    "idiv_overflow": Case({"ax": 0, "dx": 0x4000, "bx": 0x8001}, {"dx": 0x4000}, vector=Vector.DE),
    "cbw": Case({"eax": 0xFFFF0080}, {"eax": 0xFFFFFF80}),
    "cwd": Case({"ax": 0x8000, "edx": 0x10000}, {"edx": 0x1FFFF}),
    "cwde": Case({"eax": 0x8000}, {"eax": 0xFFFF8000}),
    "cdq": Case({"eax": 0x80000000}, {"edx": 0xFFFFFFFF}),
    "daa": Case({"ax": 0x9A}, {"ax": 0}, (CF | ZF | AF, CF | ZF | AF)),
    "das": Case({"ax": 0xFF}, {"ax": 0x99}, (CF | SF, CF | SF)),
    "aaa": Case({"ax": 0x2F}, {"ax": 0x105}, (CF | AF, CF | AF)),
    "aas": Case({"ax": 0x20F}, {"ax": 0x109}, (CF | AF, CF | AF)),
    "aam": Case({"ax": 0x63}, {"ax": 0x909}, (ZF | SF | PF, PF)),
    "aam_zero": Case({"ax": 1}, {"ax": 1}, vector=Vector.DE),
    "aad": Case({"ax": 0x907}, {"ax": 97}, (ZF | SF | PF, 0)),
    "salc": Case({"ax": 0x1234}, {"ax": 0x12FF}),
    "shl": Case({"ax": 0x1800}, {"ax": 0x8000}, (CF | ZF | SF, CF | SF)),
    "shr": Case({"ax": 0x8001, "cx": 0x21}, {"ax": 0x4000}, (CF | OF, CF | OF)),
    "sar": Case({"ax": 0x8001}, {"ax": 0xC000}, (CF | OF | SF, CF | SF)),
    "rol": Case({"ax": 0x8001}, {"ax": 0x0018}, (CF, 0)),
    "rcr": Case({"ax": 0x0002}, {"ax": 0x8001}, (CF, 0)),
    "shld": Case({"ax": 0x1234, "bx": 0xAB00}, {"ax": 0x34AB}),
    "shrd": Case({"eax": 0x10, "ebx": 0xF, "cx": 4}, {"eax": 0xF0000001}, (CF, 0)),
    "bsf": Case({"bx": 0x100, "ecx": 0x80000000}, {"ax": 8, "edx": 31}),
    "bts": Case({"bx": 17}, {"ax": 2}, (CF, 0)),
    "setcc": Case({"ax": 1, "bx": 2, "dx": 0x100}, {"cx": 1, "dx": 0x101}),
    "cmov": Case({"ax": 1, "bx": 2, "si": 0x55, "cx": 0, "dx": 0}, {"cx": 0x55, "dx": 0}),
    "bswap": Case({"eax": 0x12345678}, {"eax": 0x78563412}),
    "xadd": Case({"ax": 5, "bx": 3}, {"ax": 8, "bx": 5}),
    "cmpxchg": Case({"ax": 7, "bx": 9}, {"ax": 7, "cx": 9}, (ZF, ZF), memory=b"\x07\0"),
    "cmpxchg8b": Case(
        {"eax": 1, "edx": 2, "ebx": 3, "ecx": 4}, {"esi": 4}, (ZF, ZF), memory=b"\1\0\0\0\2\0\0\0"
    ),
    "movs": Case(
        {"si": 0xF000, "di": 0xF010, "cx": 4}, {"si": 0xF004, "di": 0xF014, "cx": 0}, memory=b"abcd"
    ),
    "movs_down": Case({"si": 0xF002, "di": 0xF012, "cx": 2}, {"si": 0xEFFE, "di": 0xF00E}, memory=b"abcd"),
    "stos": Case(
        {"eax": 0x11223344, "di": 0xF000, "cx": 2}, {"di": 0xF008, "cx": 0}, stored=b"\x44\x33\x22\x11" * 2
    ),
    "stos_override": Case({"ax": 0x5A, "edi": 0x1F000, "ecx": 0x10002}, {"edi": 0x1F002, "ecx": 0x10000}),
    "scas": Case({"ax": 0x63, "di": 0xF000, "cx": 8}, {"di": 0xF003, "cx": 5}, (ZF, ZF), memory=b"abcd"),
    "cmps": Case({"si": 0xF000, "di": 0xF004, "cx": 4}, {"si": 0xF003, "cx": 1}, (ZF, 0), memory=b"abcdabxd"),
    "lods": Case({"si": 0xF000}, {"ax": 0x6263, "si": 0xF003}, memory=b"abc"),
    "rep_none": Case({"di": 0xF000, "cx": 0}, {"di": 0xF000, "cx": 0}),
    "jcc": Case({"ax": 1, "bx": 2}, {"cx": 0, "dx": 2}),
    "jcxz": Case({"ecx": 0x10000}, {"ax": 0, "bx": 1}),
    "jecxz": Case({"ecx": 0x10000}, {"ax": 1, "bx": 1}),
    "loop": Case({"ecx": 0x10003}, {"ax": 3, "ecx": 0x10000}),
    "loope": Case({"cx": 9}, {"bx": 3, "cx": 6}),
    "call_near": Case({}, {"ax": 1, "bx": 1}),
    "call_indirect": Case({}, {"ax": 1}),
    "call_far": Case({}, {"ax": 0x100, "bx": 0, "sp": 0x2000}),
    "jmp_far": Case({}, {"ax": 0x100, "bx": 0}),
    "ret_imm": Case({}, {"bx": 0x1FFE}),
    "lret_imm": Case({}, {"sp": 0x2000}),
    "enter_leave": Case({"bp": 0x1234}, {"ax": 0x1FEC, "bx": 0x1FFE, "bp": 0x1234}),
    "enter_nested": Case({"bp": 0x1800}, {"ax": 0x1FF0, "bp": 0x1800}),
    "int_iret": Case({"ax": 0}, {"ax": 1, "sp": 0x2000}, (CF, CF)),
    "int3": Case({}, vector=Vector.BP, offset=1),
    "into": Case({}, {"ax": 0x80}, vector=Vector.OF, offset=5),
    "into_not": Case({}, {"ax": 0}),
    "icebp": Case({}, vector=Vector.DB, offset=1),
    "iret32": Case({}, {"ax": 0x802}),
    "flags": Case({}, {"ax": 0, "bx": 1, "cx": 0, "dx": DF | 2}),
    "sti_cli": Case({}, {"ax": IF | 2, "bx": 2}),
    "bound": Case({"ax": 5}, {"ax": 5}, memory=b"\x05\0\x05\0"),
    "bound_out": Case({"ax": 0xFFFF}, vector=Vector.BR, memory=b"\0\0\x05\0"),
    "ud2": Case({}, vector=Vector.UD),
    "hlt_free_nop": Case({"ax": 3}, {"ax": 3}),
    "cpuid": Case({}, {"eax": 1}),
    "rdtsc": Case({}, {"eax": 1}),
    "smsw": Case({}, {"ax": 0}),
    "mov_cr": Case({}, {"eax": 0, "ebx": 0}),
    "mov_dr": Case({"eax": 0x12345678}, {"ebx": 0x12345678}),
    "sgdt": Case({}, {"ax": 0xFFFF, "bx": 0x3FF}),
    "lidt": Case({}, {"bx": 1}),
    "lar": Case({}, vector=Vector.UD),
    "verr": Case({}, vector=Vector.UD),
    "str": Case({}, vector=Vector.UD),
    "sldt": Case({}, vector=Vector.UD),
    "arpl": Case({}, vector=Vector.UD),
    "lock_add": Case({"ax": 2}, {"bx": 5}, memory=b"\x03\0"),
    "lock_register": Case({"ax": 2}, vector=Vector.UD),
    "word_at_ffff": Case({}, vector=Vector.GP),
    "dword_at_fffd": Case({}, vector=Vector.GP),
    "word_at_ffff_ss": Case({}, vector=Vector.SS, offset=3),
    "wide_offset": Case({}, vector=Vector.GP, offset=6),
    "fpu": Case({}, {"ax": 2}),
    "in_memory_rip": Case({}, {"ax": 0xBEEF}),
}


def differs(cpu: Legacy, name: str) -> str:
    """Run a case and tell what is not as it should be."""
    case = EXPECTED[name]
    cpu.reset()
    cpu.view(DATA, len(case.memory))[:] = case.memory
    ended = cpu.run(name, **case.before)
    fault = None if case.vector is None else Fault(case.vector, 0)
    if ended.fault != fault:
        return f"ended by {ended.fault}, expected {fault}"
    if fault is not None and ended["eip"] != (at := int(cpu.vm.program.address_of(name)) + case.offset):
        return f"exception at {ended['eip']:#x}, expected {at:#x}"
    wrong = [
        f"{register} is {ended[register]:#x}, expected {value:#x}"
        for register, value in case.after.items()
        if ended[register] != value
    ]
    mask, wanted = case.flags
    if ended.regs.rflags & mask != wanted:
        wrong.append(f"flags are {ended.regs.rflags & mask:#x}, expected {wanted:#x}")
    stored = bytes(cpu.view(DATA, len(case.stored)))
    if stored != case.stored:
        wrong.append(f"memory is {stored.hex(' ')}, expected {case.stored.hex(' ')}")
    return ", ".join(wrong)


def real(legacy: LegacyMaker) -> Legacy:
    """Return a vCPU in real mode with all cases."""
    return legacy(LegacyMode.REAL, GuestProgram.from_asm(ASSEMBLY, name="real mode"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_instructions(legacy: LegacyMaker, chapter: str) -> None:
    """Instructions do in real mode what the manual says."""
    cpu = real(legacy)
    wrong = {name: text for name in CHAPTERS[chapter] if (text := differs(cpu, name))}
    assert not wrong


@pytest.mark.parametrize("name", LIMITS)
def test_limits(legacy: LegacyMaker, name: str) -> None:
    """An operand that does not end within 64 KiB is #GP, or #SS by the stack segment."""
    assert differs(real(legacy), name) == ""


@pytest.mark.parametrize("name", RARE)
def test_rare_instructions(legacy: LegacyMaker, name: str) -> None:
    """The same of instructions that KVM's emulator does not know."""
    assert differs(real(legacy), name) == ""
