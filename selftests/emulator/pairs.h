/* SPDX-License-Identifier: Apache-2.0 */
/* The format of pairs of runs; kvmpy/x86/pairs.py has the host's side. */
#ifndef PAIRS_H
#define PAIRS_H

/* Offsets in struct exception_frame, which is also what a run starts from. */
#define FRAME_VECTOR	120
#define FRAME_SIZE	176

/* CPU entry of TSS and IDT that the runs use. */
#define RUN_IST		3

#ifndef __ASSEMBLER__
#include <kvmpy/guest.h>

#define REGISTERS	15
#define WINDOW		16	/* words of memory that a run sees */
#define IMAGE		6	/* words around the instruction */
#define POOL		1024
#define CASES		512
#define VECTOR_WORDS	64	/* XMM or YMM registers, behind the memory */
#define SHOWN		8

enum { NO_MEMORY, MEMORY };
/* What else a case is about: vector registers, or segment registers, which it may change. */
enum { NO_VECTORS, XMM, YMM, SEGMENTS };
/* How the second run reaches the emulator. */
enum { BY_PREFIX, BY_RING, BY_MMIO };

/* An instruction, and how its operands are made. */
struct pair_case {
	u64 base[REGISTERS + 1];	/* in the order of struct exception_frame; the last is RSP */
	u64 mask[REGISTERS + 1];	/* the bits that come from the pool, by XOR */
	u64 rflags, flags_mask;
	u64 undefined;			/* bits of RFLAGS that are not compared */
	u64 rip;
	u64 image_at;			/* where the image goes, in the kernel's view of the code */
	u64 image[IMAGE];
	u64 window;			/* the kernel's view of the memory, 0 for none */
	u64 given;			/* take the memory from here, not from the pool */
	u64 memory[WINDOW + VECTOR_WORDS];
	u64 cs, ss;			/* of ring 3, or of both runs */
	u64 vectors;
	u64 pairs;			/* how many */
};

struct pair_state {
	u64 registers[REGISTERS];
	u64 vector, error_code, rip, cs, rflags, rsp, ss;
	u64 cr2;
	u64 memory[WINDOW];
	u64 vectors[VECTOR_WORDS];
};

struct pair_difference {
	u64 number;			/* of the case */
	struct pair_state before, plain, emulated;
};

/* enter.S */
void pairs_enter(const struct exception_frame *start);
void pairs_leave(void);
extern const u8 pairs_stubs[];
void pairs_load_xmm(const void *from);
void pairs_save_xmm(void *to);
void pairs_load_ymm(const void *from);
void pairs_save_ymm(void *to);
#endif

#endif /* PAIRS_H */
