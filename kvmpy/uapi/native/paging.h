/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk edits of x86 page tables through host mappings. Needs <stdint.h>; paging.c is the other half. */
#define KVMPY_PT_ABI 1

#define KVMPY_PT_OK 0
#define KVMPY_PT_OUTSIDE -1
#define KVMPY_PT_HIDDEN -2
#define KVMPY_PT_NO_TABLE -3
#define KVMPY_PT_NO_ROOM -4

#define KVMPY_PT_FILL 0
#define KVMPY_PT_CLEAR 1
#define KVMPY_PT_UPDATE 2
#define KVMPY_PT_RETARGET 3
#define KVMPY_PT_SPLIT 4

/* Where guest-physical memory is mapped; sorted by gpa, an hva of 0 means that the host has no view. */
struct kvmpy_pt_segment {
	uint64_t gpa;
	uint64_t size;
	uint64_t shared_hva;
	uint64_t private_hva;
};

/* A run of zeroed pages that become tables; freed tables return to the pool. */
struct kvmpy_pt_run {
	uint64_t gpa;
	uint64_t pages;
};

/*
 * A piece of work. gva is linear (no sign extension). Leaves get the bits of set, lose those of clear, and keep the
 * others, but for FILL, which knows no old value. gpa counts for FILL and RETARGET, level (1 = 4 KiB) for FILL and SPLIT.
 */
struct kvmpy_pt_chunk {
	uint64_t gva;
	uint64_t size;
	uint64_t gpa;
	uint64_t set;
	uint64_t clear;
	uint64_t level;
};

/* What is there now, and what the work would need. */
struct kvmpy_pt_survey {
	uint64_t mapped;
	uint64_t tables;
	uint64_t missing;
	uint64_t found;
	uint64_t found_gva;
	uint64_t found_entry;
	uint64_t found_level;
	uint64_t holes;
	uint64_t hole_gva;
	uint64_t last[6];
};

/* Leaves of one level and one set of flags that follow one another in both address spaces. */
struct kvmpy_pt_mapping {
	uint64_t gva;
	uint64_t size;
	uint64_t entry;
	uint64_t level;
};

struct kvmpy_pt_step {
	uint64_t table;
	uint64_t index;
	uint64_t entry;
	uint64_t level;
};

struct kvmpy_pt {
	uint64_t root;
	uint64_t levels;
	uint64_t enc_mask;
	uint64_t enc_private;
	uint64_t tables_private;
	struct kvmpy_pt_segment *segments;
	uint64_t nsegments;
	uint64_t hint;
	struct kvmpy_pt_run *pool;
	uint64_t npool;
	uint64_t pool_max;
	uint64_t pool_pages;
	uint64_t cursor;
	uint64_t fault_gpa;
	uint64_t fault_private;
};

int kvmpy_pt_survey(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count, int op,
		    struct kvmpy_pt_survey *out);
int kvmpy_pt_fill(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count);
int kvmpy_pt_edit(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count, int op);
int64_t kvmpy_pt_collect(struct kvmpy_pt *pt, uint64_t gva, uint64_t size, uint64_t ignore,
			 struct kvmpy_pt_mapping *out, uint64_t max);
int kvmpy_pt_walk(struct kvmpy_pt *pt, uint64_t gva, struct kvmpy_pt_step *steps);
