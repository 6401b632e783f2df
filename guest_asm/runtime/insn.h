/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A decoder for the instructions that end in #VC. It knows those that the
 * runtime and compiled C use, in 64-bit mode, and nothing else.
 */
#ifndef KVMPY_INSN_H
#define KVMPY_INSN_H

#include <kvmpy/exception.h>

enum insn_kind {
	INSN_UNKNOWN,
	INSN_PLAIN,		/* no operands but fixed registers */
	INSN_IN,
	INSN_OUT,
	INSN_INS,
	INSN_OUTS,
	INSN_READ_DR,		/* @reg from debug register @dr */
	INSN_WRITE_DR,
	INSN_LOAD,		/* @size bytes from @address to @reg */
	INSN_LOAD_ZX,		/* the same, zero-extended to @reg_size */
	INSN_LOAD_SX,
	INSN_STORE,		/* @reg to @address */
	INSN_STORE_IMM,
	INSN_MOVS,
	INSN_STOS,
};

struct insn {
	enum insn_kind kind;
	u32 opcode;		/* with 0x0f or 0x0f01 in front of it */
	u8 length;
	u8 size;		/* of the access in bytes */
	u8 reg_size;
	u8 reg;			/* as encoded: 0 is RAX; with @high a byte in bits 8 to 15 */
	bool high;
	bool rep;
	u8 dr;
	u16 port;		/* of IN and OUT with an immediate */
	bool port_dx;
	u64 imm;
	u64 address;
};

/* Decode the instruction at frame->rip. */
struct insn insn_decode(const struct exception_frame *frame);

/* The register with this number, of 0 to 15. */
u64 *insn_register(struct exception_frame *frame, u32 reg);

#endif /* KVMPY_INSN_H */
