// SPDX-License-Identifier: Apache-2.0
#include "insn.h"

#define MAX_LENGTH	15

struct cursor {
	const volatile u8 *at;
	const volatile u8 *start;
};

struct prefixes {
	bool operand;		/* 0x66 */
	bool address;		/* 0x67 */
	bool rep;
	bool segment;		/* FS or GS */
	bool lock;
	u8 rex;
};

u64 *insn_register(struct exception_frame *frame, u32 reg)
{
	switch (reg) {
	case 0:
		return &frame->rax;
	case 1:
		return &frame->rcx;
	case 2:
		return &frame->rdx;
	case 3:
		return &frame->rbx;
	case 4:
		return &frame->rsp;
	case 5:
		return &frame->rbp;
	case 6:
		return &frame->rsi;
	case 7:
		return &frame->rdi;
	default:
		/* The frame holds r15 first. */
		return &frame->r15 + (15 - reg);
	}
}

static u64 register_value(const struct exception_frame *frame, u32 reg)
{
	return *insn_register((struct exception_frame *)frame, reg);
}

static u8 next(struct cursor *c)
{
	return *c->at++;
}

/* @size bytes, sign-extended. */
static s64 next_signed(struct cursor *c, u32 size)
{
	u64 value = 0;

	for (u32 i = 0; i < size; i++)
		value |= (u64)next(c) << 8 * i;
	return (s64)(value << (64 - 8 * size)) >> (64 - 8 * size);
}

static struct prefixes read_prefixes(struct cursor *c)
{
	struct prefixes p = { 0 };

	while (c->at - c->start < MAX_LENGTH) {
		u8 byte = *c->at;

		if (byte == 0x66)
			p.operand = true;
		else if (byte == 0x67)
			p.address = true;
		else if (byte == 0xf2 || byte == 0xf3)
			p.rep = true;
		else if (byte == 0x64 || byte == 0x65)
			p.segment = true;
		else if (byte == 0xf0)
			p.lock = true;
		else if (byte != 0x26 && byte != 0x2e && byte != 0x36 && byte != 0x3e)
			break;
		c->at++;
	}
	if ((*c->at & 0xf0) == 0x40)
		p.rex = next(c);
	return p;
}

/* The memory operand of a ModRM byte; false for a register operand. @imm_size: immediate bytes that follow. */
static bool memory_operand(struct cursor *c, const struct prefixes *p, const struct exception_frame *frame,
			   u32 imm_size, struct insn *insn)
{
	u8 modrm = next(c);
	u8 mod = modrm >> 6, rm = modrm & 7;
	u64 address = 0;
	bool rip_relative = false;

	insn->reg = (modrm >> 3 & 7) | (p->rex & 4 ? 8 : 0);
	if (mod == 3 || p->segment)
		return false;

	if (rm == 4) {
		u8 sib = next(c);
		u8 index = (sib >> 3 & 7) | (p->rex & 2 ? 8 : 0);
		u8 base = (sib & 7) | (p->rex & 1 ? 8 : 0);

		if (index != 4)
			address = register_value(frame, index) << (sib >> 6);
		if ((base & 7) == 5 && mod == 0)
			address += next_signed(c, 4);
		else
			address += register_value(frame, base);
	} else if (rm == 5 && mod == 0) {
		address = next_signed(c, 4);
		rip_relative = true;
	} else {
		address = register_value(frame, rm | (p->rex & 1 ? 8 : 0));
	}

	if (mod == 1)
		address += next_signed(c, 1);
	else if (mod == 2)
		address += next_signed(c, 4);
	if (rip_relative)
		address += (u64)c->at + imm_size;
	/* With the prefix for 32-bit addresses, which compilers use for small ones, the sum is cut off. */
	insn->address = p->address ? (u32)address : address;
	return true;
}

static u8 operand_size(const struct prefixes *p)
{
	if (p->rex & 8)
		return 8;
	return p->operand ? 2 : 4;
}

/* AH to BH: registers 4 to 7 of a byte operand without a REX prefix. */
static void byte_register(struct insn *insn, const struct prefixes *p)
{
	if (insn->reg_size == 1 && !p->rex && insn->reg >= 4 && insn->reg < 8) {
		insn->reg -= 4;
		insn->high = true;
	}
}

static void two_bytes(struct cursor *c, const struct prefixes *p, const struct exception_frame *frame,
		      struct insn *insn)
{
	u8 op = next(c);

	insn->opcode = 0x0f00 | op;
	switch (op) {
	case 0x01:
		insn->opcode = 0x0f0100 | next(c);
		switch (insn->opcode & 0xff) {
		case 0xc8:	/* MONITOR */
		case 0xc9:	/* MWAIT */
		case 0xd9:	/* VMMCALL */
		case 0xf9:	/* RDTSCP */
			insn->kind = INSN_PLAIN;
		}
		break;
	case 0x08:	/* INVD */
	case 0x09:	/* WBINVD */
	case 0x30:	/* WRMSR */
	case 0x31:	/* RDTSC */
	case 0x32:	/* RDMSR */
	case 0x33:	/* RDPMC */
	case 0xa2:	/* CPUID */
		insn->kind = INSN_PLAIN;
		break;
	case 0x21:
	case 0x23: {
		u8 modrm = next(c);

		insn->kind = op == 0x21 ? INSN_READ_DR : INSN_WRITE_DR;
		insn->dr = (modrm >> 3 & 7) | (p->rex & 4 ? 8 : 0);
		insn->reg = (modrm & 7) | (p->rex & 1 ? 8 : 0);
		break;
	}
	case 0xb6:
	case 0xb7:
	case 0xbe:
	case 0xbf:
		insn->size = op & 1 ? 2 : 1;
		insn->reg_size = operand_size(p);
		if (memory_operand(c, p, frame, 0, insn))
			insn->kind = op < 0xb8 ? INSN_LOAD_ZX : INSN_LOAD_SX;
		break;
	}
}

static void one_byte(struct cursor *c, const struct prefixes *p, const struct exception_frame *frame,
		     u8 op, struct insn *insn)
{
	u8 wide = op & 1 ? operand_size(p) : 1;
	u8 port_size = op & 1 ? (p->operand ? 2 : 4) : 1;

	insn->opcode = op;
	switch (op) {
	case 0xe4 ... 0xe7:
	case 0xec ... 0xef:
		insn->kind = op & 2 ? INSN_OUT : INSN_IN;
		insn->size = port_size;
		insn->port_dx = op & 8;
		if (!insn->port_dx)
			insn->port = next(c);
		break;
	case 0x63:	/* MOVSXD */
		insn->size = 4;
		insn->reg_size = operand_size(p);
		if (memory_operand(c, p, frame, 0, insn))
			insn->kind = INSN_LOAD_SX;
		break;
	case 0x6c ... 0x6f:
		if (!p->segment && !p->address)
			insn->kind = op & 2 ? INSN_OUTS : INSN_INS;
		insn->size = port_size;
		insn->rep = p->rep;
		break;
	case 0x88 ... 0x8b:
		insn->size = insn->reg_size = wide;
		if (memory_operand(c, p, frame, 0, insn))
			insn->kind = op & 2 ? INSN_LOAD : INSN_STORE;
		byte_register(insn, p);
		break;
	case 0xa0 ... 0xa3:
		insn->size = insn->reg_size = wide;
		if (!p->segment && !p->address)
			insn->kind = op & 2 ? INSN_STORE : INSN_LOAD;
		insn->address = next_signed(c, 8);
		break;
	case 0xa4:
	case 0xa5:
	case 0xaa:
	case 0xab:
		insn->size = wide;
		insn->rep = p->rep;
		if (!p->segment && !p->address)
			insn->kind = op & 8 ? INSN_STOS : INSN_MOVS;
		break;
	case 0xc6:
	case 0xc7: {
		u32 imm_size = wide == 8 ? 4 : wide;

		insn->size = wide;
		if (memory_operand(c, p, frame, imm_size, insn) && !(insn->reg & 7))
			insn->kind = INSN_STORE_IMM;
		insn->imm = next_signed(c, imm_size);
		break;
	}
	case 0xf4:	/* HLT */
		insn->kind = INSN_PLAIN;
		break;
	}
}

struct insn insn_decode(const struct exception_frame *frame)
{
	const volatile u8 *start = (const volatile u8 *)frame->rip;
	struct cursor c = { .at = start, .start = start };
	struct prefixes p = read_prefixes(&c);
	struct insn insn = { .kind = INSN_UNKNOWN };
	u8 op = next(&c);

	if (op == 0x0f)
		two_bytes(&c, &p, frame, &insn);
	else
		one_byte(&c, &p, frame, op, &insn);
	insn.length = c.at - c.start;
	if (p.lock || insn.length > MAX_LENGTH)
		insn.kind = INSN_UNKNOWN;
	return insn;
}
