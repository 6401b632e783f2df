// SPDX-License-Identifier: Apache-2.0
/* The way to the hypervisor and back: one GHCB for each vCPU, and the MSR protocol. */
#include <kvmpy/sev.h>
#include <kvmpy/string.h>

#define MSR_UNKNOWN		1	/* no GPA: not page aligned, and no request either */
#define RFLAGS_IF		(1ul << 9)
#define CR4_LA57		(1ul << 12)

static void set_msr(struct guest_cpu *cpu, u64 value)
{
	/* Noted first: what an NMI finds noted is then never what is not there yet. */
	cpu->ghcb_msr = MSR_UNKNOWN;
	barrier();
	wrmsr(MSR_SEV_ES_GHCB, value);
	barrier();
	cpu->ghcb_msr = value;
}

u64 ghcb_msr_call(u64 value)
{
	struct guest_cpu *cpu = guest_cpu();
	u64 flags = read_rflags();
	u64 answer;

	cli();
	cpu->ghcb_depth++;
	/* 0 stays: the vCPU is not set up yet. */
	if (cpu->ghcb_msr)
		cpu->ghcb_msr = MSR_UNKNOWN;
	barrier();
	wrmsr(MSR_SEV_ES_GHCB, value);
	vmgexit();
	answer = rdmsr(MSR_SEV_ES_GHCB);
	barrier();
	cpu->ghcb_depth--;
	if (flags & RFLAGS_IF)
		sti();
	return answer;
}

__noreturn void ghcb_terminate(u32 set, u32 code)
{
	for (;;)
		ghcb_msr_call(GHCB_MSR_TERM_REQ | set << 12 | code << 16);
}

/* Before a vCPU's first call: agree on a protocol, and tell an SNP host where the GHCB is. */
static void set_up(struct guest_cpu *cpu)
{
	u64 answer = ghcb_msr_call(GHCB_MSR_SEV_INFO_REQ);
	u16 highest = answer >> 48, lowest = answer >> 32;
	u16 *version = (u16 *)((u8 *)cpu->ghcb + GHCB_PROTOCOL_VERSION);

	if (GHCB_MSR_INFO(answer) != GHCB_MSR_SEV_INFO_RESP || highest < GHCB_PROTOCOL_MIN ||
	    lowest > GHCB_PROTOCOL_MAX)
		ghcb_terminate(0, GHCB_TERM_PROTOCOL);
	if (cpu->sev & KVMPY_SEV_SNP) {
		answer = ghcb_msr_call(cpu->ghcb_gpa | GHCB_MSR_REG_GPA_REQ);
		if (answer != (cpu->ghcb_gpa | GHCB_MSR_REG_GPA_RESP))
			ghcb_terminate(GHCB_TERM_SET_KVMPY, GHCB_TERM_REGISTER);
	}
	*version = highest < GHCB_PROTOCOL_MAX ? highest : GHCB_PROTOCOL_MAX;
	set_msr(cpu, cpu->ghcb_gpa);
}

void ghcb_begin(struct ghcb_use *use)
{
	struct guest_cpu *cpu = guest_cpu();
	u64 *valid = (u64 *)((u8 *)cpu->ghcb + GHCB_VALID_BITMAP);

	use->ghcb = cpu->ghcb;
	use->rflags = read_rflags();
	cli();
	use->nested = cpu->ghcb_depth++;
	if (use->nested) {
		use->msr = rdmsr(MSR_SEV_ES_GHCB);
		memcpy(use->fields, cpu->ghcb, sizeof(use->fields));
		memcpy(use->buffer, (u8 *)cpu->ghcb + GHCB_SHARED_BUFFER, sizeof(use->buffer));
	}
	if (!cpu->ghcb_msr)
		set_up(cpu);
	valid[0] = 0;
	valid[1] = 0;
}

void ghcb_end(struct ghcb_use *use)
{
	struct guest_cpu *cpu = guest_cpu();

	if (use->nested) {
		memcpy(cpu->ghcb, use->fields, sizeof(use->fields));
		memcpy((u8 *)cpu->ghcb + GHCB_SHARED_BUFFER, use->buffer, sizeof(use->buffer));
		set_msr(cpu, use->msr);
	}
	cpu->ghcb_depth--;
	if (use->rflags & RFLAGS_IF)
		sti();
}

/* Whether the bitmap still declares the exit code: a hypervisor clears it when it takes a request. */
static bool left_alone(const void *ghcb)
{
	return *((const volatile u8 *)ghcb + GHCB_VALID_BITMAP + GHCB_SW_EXIT_CODE / 64) &
	       1u << GHCB_SW_EXIT_CODE / 8 % 8;
}

struct ghcb_answer ghcb_call(void *ghcb, u64 exit_code, u64 info_1, u64 info_2)
{
	struct guest_cpu *cpu = guest_cpu();
	struct ghcb_answer answer;

	ghcb_put(ghcb, GHCB_SW_EXIT_CODE, exit_code);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_1, info_1);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_2, info_2);
	if (cpu->ghcb_msr != cpu->ghcb_gpa)
		set_msr(cpu, cpu->ghcb_gpa);
	vmgexit();
	answer.status = ghcb_get(ghcb, GHCB_SW_EXIT_INFO_1);
	answer.info = ghcb_get(ghcb, GHCB_SW_EXIT_INFO_2);
	/* A page that the hypervisor does not read will not do for a ucall either. */
	if (left_alone(ghcb))
		ghcb_terminate(GHCB_TERM_SET_KVMPY, GHCB_TERM_NOT_TAKEN);
	if (answer.status == GHCB_MALFORMED && answer.info == GHCB_ERROR_REGISTERED)
		ghcb_terminate(GHCB_TERM_SET_KVMPY, GHCB_TERM_REGISTER);
	return answer;
}

/* The tables map themselves: the entry for @gva at @level (1: page) of a tree of @levels. */
static volatile u64 *entry_of(u64 gva, int level, int levels)
{
	u64 address = gva;

	for (int i = 0; i < level; i++) {
		address = address >> 9 & ((1ul << (9 * levels + 3)) - 8);
		address |= (u64)KVMPY_SELF_MAP_SLOT << (9 * levels + 3);
	}
	/* Sign-extended, as every linear address. */
	address = (u64)((s64)(address << (52 - 9 * levels)) >> (52 - 9 * levels));
	return (volatile u64 *)address;
}

static int table_levels(void)
{
	return read_cr4() & CR4_LA57 ? 5 : 4;
}

volatile u64 *guest_table_entry(const volatile void *gva, int level)
{
	return entry_of((u64)gva, level, table_levels());
}

u64 guest_translate(const volatile void *gva, bool *private)
{
	struct guest_cpu *cpu = guest_cpu();
	u64 address = (u64)gva;
	int levels = table_levels();

	for (int level = levels; level; level--) {
		u64 entry = *entry_of(address, level, levels);
		int shift = 3 + 9 * level;

		if (!(entry & 1))
			return ~0ul;
		if (level == 1 || (level <= 3 && entry & 1ul << 7)) {
			u64 mask = (1ul << shift) - 1;
			u64 base = entry & 0x000ffffffffff000ul & ~cpu->encryption_mask & ~mask;

			if (private)
				*private = entry & cpu->encryption_mask;
			return base | (address & mask);
		}
	}
	return ~0ul;
}

u64 ghcb_hv_features(void)
{
	struct ghcb_answer answer;
	struct ghcb_use use;

	ghcb_begin(&use);
	answer = ghcb_call(use.ghcb, GHCB_EXIT_HV_FEATURES, 0, 0);
	ghcb_end(&use);
	return answer.status ? 0 : answer.info;
}
