/* SPDX-License-Identifier: Apache-2.0 */
/* Hyper-V's hypercalls, and tables of accesses and calls that the host asks for. */
#ifndef SELFTESTS_HYPERV_H
#define SELFTESTS_HYPERV_H

#include "../irq/interrupts.h"
#include <kvmpy/hyperv_numbers.h>

#define HV_ROWS		96
/* What a call wrote in place of a result when it faulted: the vector is in bits 7:0. */
#define HV_FAULT	(1ull << 63)

struct hv_xmm {
	u64 words[12];
};

/* Make a call in the 64-bit convention; @xmm loads XMM0 to XMM5 unless it is NULL. */
static inline u64 hv_call(u64 control, u64 input, u64 output, const struct hv_xmm *xmm)
{
	register u64 r8 asm("r8") = output;
	u64 result = 0;
	struct guest_fault fault;

	if (xmm)
		asm volatile("movups (%0), %%xmm0\n"
			     "movups 16(%0), %%xmm1\n"
			     "movups 32(%0), %%xmm2\n"
			     "movups 48(%0), %%xmm3\n"
			     "movups 64(%0), %%xmm4\n"
			     "movups 80(%0), %%xmm5\n" : : "r"(xmm) : "memory");
	if (guest_has_vmmcall())
		fault = GUEST_TRY("vmmcall", : "+a"(result), "+c"(control), "+d"(input), "+r"(r8) : : "memory");
	else
		fault = GUEST_TRY("vmcall", : "+a"(result), "+c"(control), "+d"(input), "+r"(r8) : : "memory");
	return fault.faulted ? HV_FAULT | fault.vector : result;
}

struct hv_access {
	u64 msr, write, value;		/* the host's question */
	u64 faulted, vector, got;
};

struct hv_access hv_accesses[HV_ROWS] GUEST_SHARED;

/* One table of RDMSR and WRMSR after the other, as long as the host has one. */
void hv_walk_msrs(void)
{
	for (;;) {
		for (u32 row = 0; row < HV_ROWS; row++) {
			struct hv_access *access = &hv_accesses[row];
			struct guest_fault fault;

			if (!access->msr)
				break;
			if (access->write)
				fault = wrmsr_safe(access->msr, access->value);
			else
				fault = rdmsr_safe(access->msr, &access->got);
			access->faulted = fault.faulted;
			access->vector = fault.faulted ? fault.vector : 0;
		}
		GUEST_SYNC('m');
	}
}

struct hv_request {
	u64 control, input, output, with_xmm;	/* the host's question */
	struct hv_xmm xmm;
	u64 result;
};

struct hv_request hv_requests[HV_ROWS] GUEST_SHARED;

static void hv_do(struct hv_request *request)
{
	request->result = hv_call(request->control, request->input, request->output,
				  request->with_xmm ? &request->xmm : NULL);
}

void hv_one_call(void)
{
	hv_do(&hv_requests[0]);
}

void hv_walk_calls(void)
{
	for (;;) {
		for (u32 row = 0; row < HV_ROWS; row++) {
			if (!hv_requests[row].control)
				break;
			hv_do(&hv_requests[row]);
		}
		GUEST_SYNC('c');
	}
}

/* What an agent of a vCPU is asked for: interrupts of @vector so far, and to wait for @count of them. */
u64 hv_counted(u64 vector)
{
	irq_window();
	return irq_count(vector);
}

u64 hv_await(u64 vector, u64 count)
{
	irq_wait(vector, count);
	return irq_count(vector);
}

static void hv_no_eoi(struct exception_frame *frame)
{
	interrupts[guest_cpu_index()][frame->vector]++;
}

/* Count interrupts of @vector, with an EOI each, or without. */
void hv_install(u64 vector, u64 eoi)
{
	guest_exception_install(vector, eoi ? irq_counter : hv_no_eoi);
}

void hv_eoi(void)
{
	apic_eoi();
}

u64 hv_in_service(u64 vector)
{
	return apic_test_vector(APIC_ISR, vector);
}

/* Keep the CPU for @ticks of the reference counter, 100 ns each, with interrupts on. */
void hv_spin(u64 ticks)
{
	u64 end = rdmsr(HV_X64_MSR_TIME_REF_COUNT) + ticks;

	sti();
	while (rdmsr(HV_X64_MSR_TIME_REF_COUNT) < end)
		cpu_relax();
	cli();
}

#endif /* SELFTESTS_HYPERV_H */
