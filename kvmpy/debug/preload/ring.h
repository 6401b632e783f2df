/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a recorded process and kvmpy share: a control page for all processes, a ring of frames for each, and the
 * plan, which says what memory an ioctl reads and writes. kvmpy/debug/preload/shared.py reads the same layouts.
 */
#ifndef KVMPY_PRELOAD_RING_H
#define KVMPY_PRELOAD_RING_H

#include <stdatomic.h>
#include <stdint.h>

#define KVMPY_RING_MAGIC 0x676e69725652564bULL
#define KVMPY_PLAN_MAGIC 0x6e616c705652564bULL
#define KVMPY_RING_HEADER 4096
#define KVMPY_FLAG_MEMORY 1u /* copy guest memory before the first KVM_RUN of a VM */
#define KVMPY_FLAG_WRITES 2u /* and before later ones what the program changed */

/* A frame type of its own, never in a file: u64 address, u32 count, u32 flags of the frame MEMORY, then as many pages. */
#define KVMPY_RING_DUMP 0xff00

struct kvmpy_control {
	_Atomic uint64_t order;
	_Atomic uint32_t objects;
	_Atomic uint32_t vms;
	_Atomic uint32_t rings; /* numbers given out */
	_Atomic uint32_t refused; /* processes that found no room for a ring */
	uint32_t flags;
	uint32_t reserved;
	uint64_t ring_size; /* a power of two, a multiple of the page size */
	/* A robust mutex that kvmpy holds: the holder's number, marked by the kernel when the holder died. */
	_Alignas(64) _Atomic uint32_t holder;
	uint8_t mutex[60];
};

#define KVMPY_HOLDER_TID 0x3fffffffu
#define KVMPY_HOLDER_DIED 0x40000000u

struct kvmpy_ring {
	uint64_t magic;
	uint64_t size;
	uint32_t pid;
	uint32_t ppid;
	char name[40];
	_Alignas(64) _Atomic uint64_t head;
	_Alignas(64) _Atomic uint64_t tail;
	_Alignas(64) _Atomic uint64_t lost;
};

#define KVMPY_PLAN_IN 1u
#define KVMPY_PLAN_OUT 2u
#define KVMPY_PLAN_OWN 1u
#define KVMPY_PLAN_GUEST 2u
#define KVMPY_PLAN_SLOT_BITMAP 1u
#define KVMPY_PLAN_XSAVE 2u
#define KVMPY_PLAN_ONE_REG 3u
#define KVMPY_PLAN_NO_FIELD 0xffffffffu

struct kvmpy_plan_node {
	uint32_t pointer; /* offset in the parent */
	uint32_t direction;
	uint32_t flags;
	uint32_t special;
	uint32_t base;
	uint32_t count; /* offset of the count, KVMPY_PLAN_NO_FIELD for none */
	uint32_t count_size;
	uint32_t unit;
	uint32_t per;
	uint32_t least;
	uint32_t round;
	uint32_t reads;
	uint32_t when; /* offset of a byte without which the pointer is ignored */
	uint32_t select; /* offset of 32 bits that choose a case */
	uint32_t children; /* index of the first, the others follow */
	uint32_t nr_children;
	uint32_t cases; /* index of the first case */
	uint32_t nr_cases;
};

struct kvmpy_plan_case {
	uint32_t value;
	uint32_t children;
	uint32_t nr_children;
	uint32_t reserved;
};

struct kvmpy_plan_root {
	uint32_t request;
	uint32_t node;
};

struct kvmpy_plan {
	uint64_t magic;
	uint32_t nr_roots; /* sorted by request */
	uint32_t nr_nodes;
	uint32_t nr_cases;
	uint32_t tdx_node; /* of KVM_MEMORY_ENCRYPT_OP on TDX VMs */
	/* roots, nodes, cases follow */
};

#endif
