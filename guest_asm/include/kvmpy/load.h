/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that keeps writing, reading and executing a region and checks what it
 * finds.  kvmpy/guest/load.py is the host's side, and says what the region holds.
 */
#ifndef KVMPY_LOAD_H
#define KVMPY_LOAD_H

#include <kvmpy/types.h>

#define GUEST_LOAD_CPUS		64

/* What a page may hold besides the generation that its writer left there. */
#define GUEST_LOAD_EXACT	0
#define GUEST_LOAD_ZERO		1	/* zeroes */
#define GUEST_LOAD_OLDER	2	/* zeroes or any older generation */

#define GUEST_LOAD_STOPPED	0
#define GUEST_LOAD_FAILED	1

/* One for each vCPU, where ring 3 and the host reach it. */
struct guest_load {
	/* Written by the host while the vCPU does not run, but for @stop. */
	u64 region;
	u64 first, step, count;		/* its own pages: @first, @first + @step, ...; none: it only reads */
	u64 stride;			/* from one to the next, modulo @count */
	u64 peer;			/* another vCPU's struct guest_load, whose pages it reads */
	u64 execute;			/* the pages are code, too */
	u64 loss;
	u64 pace;			/* rounds of a loop between two visits */
	u64 stop;
	/* Written by the guest. */
	u64 visits;			/* pages written (read where it has none) since the start */
	u64 index;			/* the next of its own pages */
	u64 peer_visit, peer_index;
	/* The first word that was wrong. */
	u64 executed, page, word, low, high, found;
} __aligned(256);

_Static_assert(sizeof(struct guest_load) == 256, "kvmpy/guest/load.py knows its size");

/* SYNC, then run the load of this vCPU in @ring, again and again; a SYNC tells how each run ended. */
__noreturn void guest_load(struct guest_load *loads, u64 ring);

#endif /* KVMPY_LOAD_H */
