/* SPDX-License-Identifier: Apache-2.0 */
/* Written by `python -m kvmpy.gen`: do not edit. From kvmpy.debug.preload.shared and kvmpy.debug.preload.plan. */
#ifndef KVMPY_PRELOAD_RING_H
#define KVMPY_PRELOAD_RING_H

#include <stdatomic.h>
#include <stdint.h>

#define KVMPY_CONTROL_SIZE 4096
#define KVMPY_RING_HEADER 4096
#define KVMPY_RING_MAGIC 0x676e69725652564b
/* Copy guest memory before the first KVM_RUN of a VM, and before later ones what the program changed. */
#define KVMPY_FLAG_MEMORY 1
#define KVMPY_FLAG_WRITES 2
/* A frame type of its own, never in a file: MEMORY of the record format with its pages in place of their ids. */
#define KVMPY_RING_DUMP 0xff00
/* The word of a robust mutex: the holder's number, marked by the kernel when the holder died. */
#define KVMPY_HOLDER_TID 0x3fffffff
#define KVMPY_HOLDER_DIED 0x40000000
/* Numbers below are free for frames that kvmpy adds. */
#define KVMPY_FIRST_ORDER 4294967296

#define KVMPY_PLAN_MAGIC 0x6e616c705652564b
#define KVMPY_PLAN_NO_FIELD 0xffffffff
#define KVMPY_PLAN_IN 1
#define KVMPY_PLAN_OUT 2
/* Flags of a node: the count is a field of the buffer itself; it is guest memory. */
#define KVMPY_PLAN_OWN 1
#define KVMPY_PLAN_GUEST 2
#define KVMPY_PLAN_SLOT_BITMAP 1
#define KVMPY_PLAN_XSAVE 2
#define KVMPY_PLAN_ONE_REG 3

struct kvmpy_control {
	_Atomic uint64_t order;
	_Atomic uint32_t objects;
	_Atomic uint32_t vms;
	_Atomic uint32_t rings;
	_Atomic uint32_t refused;
	uint32_t flags;
	uint32_t reserved;
	uint64_t ring_size;
	_Alignas(64) _Atomic uint32_t holder;
	uint8_t mutex[60];
};

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

struct kvmpy_plan_node {
	uint32_t pointer;
	uint32_t direction;
	uint32_t flags;
	uint32_t special;
	uint32_t base;
	uint32_t count;
	uint32_t count_size;
	uint32_t unit;
	uint32_t per;
	uint32_t least;
	uint32_t round;
	uint32_t reads;
	uint32_t when;
	uint32_t select;
	uint32_t children;
	uint32_t nr_children;
	uint32_t cases;
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
	uint32_t nr_roots;
	uint32_t nr_nodes;
	uint32_t nr_cases;
	uint32_t tdx_node;
};

#endif
