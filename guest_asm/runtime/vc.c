// SPDX-License-Identifier: Apache-2.0
/*
 * #VC: an instruction that the hypervisor would have intercepted. What it
 * needs to know goes into the GHCB, what it answers into the registers.
 */
#include <kvmpy/sev.h>
#include <kvmpy/string.h>

#include "insn.h"
#include "runtime.h"

#define IOIO_IN			(1u << 0)
#define IOIO_STRING		(1u << 2)
#define IOIO_REP		(1u << 3)
#define IOIO_SIZE(bytes)	((u32)(bytes) << 4)
#define IOIO_ADDRESS_64		(1u << 9)
#define IOIO_PORT(port)		((u32)(port) << 16)

#define RFLAGS_DF		(1ul << 10)
#define CR4_OSXSAVE		(1ul << 18)
#define INJECT_ERROR_CODE	(1u << 11)

enum vc_end {
	VC_DONE,		/* go on behind the instruction */
	VC_AGAIN,		/* the registers say how far it got: run it again */
	VC_RAISED,		/* an exception, which the frame holds */
	VC_UNKNOWN,
};

static enum vc_end end_of(struct exception_frame *frame, struct ghcb_answer answer)
{
	switch (answer.status) {
	case GHCB_OK:
		return VC_DONE;
	case GHCB_EXCEPTION:
		frame->vector = answer.info & 0xff;
		frame->error_code = answer.info & INJECT_ERROR_CODE ? answer.info >> 32 : 0;
		return VC_RAISED;
	default:
		return VC_UNKNOWN;
	}
}

/* The low @size bytes of a register; four clear the upper half. */
static void set_register(u64 *reg, u8 size, u64 value)
{
	if (size == 8)
		*reg = value;
	else if (size == 4)
		*reg = (u32)value;
	else if (size == 2)
		*reg = (*reg & ~0xfffful) | (u16)value;
	else
		*reg = (*reg & ~0xfful) | (u8)value;
}

static u64 mask_of(u8 size)
{
	return size == 8 ? ~0ul : (1ul << 8 * size) - 1;
}

static enum vc_end port(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	u16 number = insn->port_dx ? (u16)frame->rdx : insn->port;
	u64 info = IOIO_PORT(number) | IOIO_SIZE(insn->size) | IOIO_ADDRESS_64;
	struct ghcb_answer answer;

	if (insn->kind == INSN_IN)
		info |= IOIO_IN;
	else
		ghcb_put(ghcb, GHCB_RAX, frame->rax & mask_of(insn->size));
	answer = ghcb_call(ghcb, SVM_EXIT_IOIO, info, 0);
	if (answer.status && number == KVMPY_UCALL_PORT)
		ghcb_terminate(GHCB_TERM_SET_KVMPY, GHCB_TERM_UCALL);
	if (!answer.status && insn->kind == INSN_IN)
		set_register(&frame->rax, insn->size, ghcb_get(ghcb, GHCB_RAX));
	return end_of(frame, answer);
}

/* As much of a string as the shared buffer holds. */
static enum vc_end port_string(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	u8 *buffer = (u8 *)ghcb + GHCB_SHARED_BUFFER;
	bool in = insn->kind == INSN_INS;
	u64 left = insn->rep ? frame->rcx : 1;
	u64 count = left < GHCB_SHARED_BUFFER_SIZE / insn->size ? left : GHCB_SHARED_BUFFER_SIZE / insn->size;
	s64 step = frame->rflags & RFLAGS_DF ? -(s64)insn->size : insn->size;
	u64 *where = in ? &frame->rdi : &frame->rsi;
	u64 info = IOIO_PORT((u16)frame->rdx) | IOIO_SIZE(insn->size) | IOIO_ADDRESS_64 | IOIO_STRING;
	struct ghcb_answer answer;

	if (!left)
		return VC_DONE;
	if (in)
		info |= IOIO_IN;
	if (insn->rep)
		info |= IOIO_REP;
	for (u64 i = 0; !in && i < count; i++)
		memcpy(buffer + i * insn->size, (void *)(*where + i * step), insn->size);
	ghcb_put(ghcb, GHCB_SW_SCRATCH, guest_cpu()->ghcb_gpa + GHCB_SHARED_BUFFER);
	answer = ghcb_call(ghcb, SVM_EXIT_IOIO, info, count);
	if (answer.status)
		return end_of(frame, answer);
	for (u64 i = 0; in && i < count; i++)
		memcpy((void *)(*where + i * step), buffer + i * insn->size, insn->size);
	*where += count * step;
	if (!insn->rep)
		return VC_DONE;
	frame->rcx -= count;
	return frame->rcx ? VC_AGAIN : VC_DONE;
}

static enum vc_end cpuid_leaf(struct exception_frame *frame, void *ghcb)
{
	struct ghcb_answer answer;

	ghcb_put(ghcb, GHCB_RAX, (u32)frame->rax);
	ghcb_put(ghcb, GHCB_RCX, (u32)frame->rcx);
	if ((u32)frame->rax == 0xd)
		ghcb_put(ghcb, GHCB_XCR0, read_cr4() & CR4_OSXSAVE ? xgetbv(0) : 1);
	answer = ghcb_call(ghcb, SVM_EXIT_CPUID, 0, 0);
	if (!answer.status) {
		frame->rax = (u32)ghcb_get(ghcb, GHCB_RAX);
		frame->rbx = (u32)ghcb_get(ghcb, GHCB_RBX);
		frame->rcx = (u32)ghcb_get(ghcb, GHCB_RCX);
		frame->rdx = (u32)ghcb_get(ghcb, GHCB_RDX);
	}
	return end_of(frame, answer);
}

static enum vc_end msr(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	bool write = insn->opcode == 0x0f30;
	struct ghcb_answer answer;

	ghcb_put(ghcb, GHCB_RCX, (u32)frame->rcx);
	if (write) {
		ghcb_put(ghcb, GHCB_RAX, (u32)frame->rax);
		ghcb_put(ghcb, GHCB_RDX, (u32)frame->rdx);
	}
	answer = ghcb_call(ghcb, SVM_EXIT_MSR, write, 0);
	if (!answer.status && !write) {
		frame->rax = (u32)ghcb_get(ghcb, GHCB_RAX);
		frame->rdx = (u32)ghcb_get(ghcb, GHCB_RDX);
	}
	return end_of(frame, answer);
}

static enum vc_end vmmcall(struct exception_frame *frame, void *ghcb)
{
	struct ghcb_answer answer;

	ghcb_put(ghcb, GHCB_RAX, frame->rax);
	ghcb_put(ghcb, GHCB_CPL, (frame->cs & 3) << 24);
	ghcb_put(ghcb, GHCB_RBX, frame->rbx);
	ghcb_put(ghcb, GHCB_RCX, frame->rcx);
	ghcb_put(ghcb, GHCB_RDX, frame->rdx);
	ghcb_put(ghcb, GHCB_RSI, frame->rsi);
	answer = ghcb_call(ghcb, SVM_EXIT_VMMCALL, 0, 0);
	if (!answer.status)
		frame->rax = ghcb_get(ghcb, GHCB_RAX);
	return end_of(frame, answer);
}

/* RDTSC, RDTSCP and RDPMC: a number in EDX:EAX. */
static enum vc_end counter(struct exception_frame *frame, void *ghcb)
{
	struct ghcb_answer answer;

	if (frame->error_code == SVM_EXIT_RDPMC)
		ghcb_put(ghcb, GHCB_RCX, (u32)frame->rcx);
	answer = ghcb_call(ghcb, frame->error_code, 0, 0);
	if (!answer.status) {
		frame->rax = (u32)ghcb_get(ghcb, GHCB_RAX);
		frame->rdx = (u32)ghcb_get(ghcb, GHCB_RDX);
		if (frame->error_code == SVM_EXIT_RDTSCP)
			frame->rcx = (u32)ghcb_get(ghcb, GHCB_RCX);
	}
	return end_of(frame, answer);
}

static enum vc_end monitor(struct exception_frame *frame, void *ghcb)
{
	ghcb_put(ghcb, GHCB_RAX, frame->error_code == SVM_EXIT_MONITOR
		 ? guest_translate((void *)frame->rax, NULL) : frame->rax);
	ghcb_put(ghcb, GHCB_RCX, frame->rcx);
	ghcb_put(ghcb, GHCB_RDX, frame->rdx);
	return end_of(frame, ghcb_call(ghcb, frame->error_code, 0, 0));
}

static enum vc_end debug_register(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	struct guest_cpu *cpu = guest_cpu();
	u64 *reg = insn_register(frame, insn->reg);
	struct ghcb_answer answer;

	if (insn->dr != 7)
		return VC_UNKNOWN;
	if (insn->kind == INSN_READ_DR) {
		/* The hypervisor does not know it: what was written last is kept here. */
		*reg = cpu->dr7 ? cpu->dr7 : 0x400;
		return VC_DONE;
	}
	if (*reg >> 32) {
		frame->vector = GP_VECTOR;
		frame->error_code = 0;
		return VC_RAISED;
	}
	ghcb_put(ghcb, GHCB_RAX, *reg | 0x400);
	answer = ghcb_call(ghcb, SVM_EXIT_WRITE_DR7, 0, 0);
	if (!answer.status)
		cpu->dr7 = *reg | 0x400;
	return end_of(frame, answer);
}

static struct ghcb_answer mmio_access(void *ghcb, u64 gpa, u8 size, bool write, u64 *value)
{
	u8 *buffer = (u8 *)ghcb + GHCB_SHARED_BUFFER;
	struct ghcb_answer answer;

	if (write)
		memcpy(buffer, value, size);
	ghcb_put(ghcb, GHCB_SW_SCRATCH, guest_cpu()->ghcb_gpa + GHCB_SHARED_BUFFER);
	answer = ghcb_call(ghcb, write ? GHCB_EXIT_MMIO_WRITE : GHCB_EXIT_MMIO_READ, gpa, size);
	if (!write && !answer.status) {
		*value = 0;
		memcpy(value, buffer, size);
	}
	return answer;
}

/* Which operand faulted is not known here: the destination is taken for MMIO, the source for memory. */
static enum vc_end mmio_string(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	s64 step = frame->rflags & RFLAGS_DF ? -(s64)insn->size : insn->size;
	struct ghcb_answer answer;
	u64 value = frame->rax;
	u64 gpa;

	if (insn->rep && !frame->rcx)
		return VC_DONE;
	if (insn->kind == INSN_MOVS)
		memcpy(&value, (void *)frame->rsi, insn->size);
	gpa = guest_translate((void *)frame->rdi, NULL);
	if (gpa == ~0ul)
		return VC_UNKNOWN;
	answer = mmio_access(ghcb, gpa, insn->size, true, &value);
	if (answer.status)
		return end_of(frame, answer);
	frame->rdi += step;
	if (insn->kind == INSN_MOVS)
		frame->rsi += step;
	if (!insn->rep)
		return VC_DONE;
	return --frame->rcx ? VC_AGAIN : VC_DONE;
}

static u64 sign_extend(u64 value, u8 size)
{
	return (u64)((s64)(value << (64 - 8 * size)) >> (64 - 8 * size));
}

static enum vc_end mmio(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	bool write = insn->kind == INSN_STORE || insn->kind == INSN_STORE_IMM;
	struct ghcb_answer answer;
	bool private = false;
	u64 value = 0;
	u64 *reg;
	u64 gpa;

	if (insn->kind == INSN_MOVS || insn->kind == INSN_STOS)
		return mmio_string(frame, insn, ghcb);
	if (insn->kind < INSN_LOAD || insn->kind > INSN_STORE_IMM)
		return VC_UNKNOWN;
	gpa = guest_translate((void *)insn->address, &private);
	if (gpa == ~0ul || private || (gpa & 0xfff) + insn->size > 0x1000)
		return VC_UNKNOWN;

	reg = insn_register(frame, insn->reg);
	if (insn->kind == INSN_STORE_IMM)
		value = insn->imm;
	else if (write)
		value = insn->high ? *reg >> 8 : *reg;
	answer = mmio_access(ghcb, gpa, insn->size, write, &value);
	if (answer.status || write)
		return end_of(frame, answer);

	if (insn->kind == INSN_LOAD_SX)
		value = sign_extend(value, insn->size);
	if (insn->high)
		*reg = (*reg & ~0xff00ul) | (value & 0xff) << 8;
	else
		set_register(reg, insn->reg_size, value);
	return VC_DONE;
}

static enum vc_end emulate(struct exception_frame *frame, const struct insn *insn, void *ghcb)
{
	switch (frame->error_code) {
	case SVM_EXIT_IOIO:
		if (insn->kind == INSN_IN || insn->kind == INSN_OUT)
			return port(frame, insn, ghcb);
		if (insn->kind == INSN_INS || insn->kind == INSN_OUTS)
			return port_string(frame, insn, ghcb);
		return VC_UNKNOWN;
	case SVM_EXIT_NPF:
		return mmio(frame, insn, ghcb);
	case SVM_EXIT_READ_DR7:
	case SVM_EXIT_WRITE_DR7:
		if (insn->kind == INSN_READ_DR || insn->kind == INSN_WRITE_DR)
			return debug_register(frame, insn, ghcb);
		return VC_UNKNOWN;
	}
	if (insn->kind != INSN_PLAIN)
		return VC_UNKNOWN;
	switch (frame->error_code) {
	case SVM_EXIT_CPUID:
		return cpuid_leaf(frame, ghcb);
	case SVM_EXIT_MSR:
		return msr(frame, insn, ghcb);
	case SVM_EXIT_VMMCALL:
		return vmmcall(frame, ghcb);
	case SVM_EXIT_RDTSC:
	case SVM_EXIT_RDTSCP:
	case SVM_EXIT_RDPMC:
		return counter(frame, ghcb);
	case SVM_EXIT_MONITOR:
	case SVM_EXIT_MWAIT:
		return monitor(frame, ghcb);
	case SVM_EXIT_INVD:
	case SVM_EXIT_WBINVD:
		return end_of(frame, ghcb_call(ghcb, frame->error_code, 0, 0));
	default:
		return VC_UNKNOWN;
	}
}

/* Apart, for its struct takes most of the stack that NMIs have on other VMs. */
static __attribute__((noinline)) void nmi_complete(void)
{
	struct ghcb_use use;

	ghcb_begin(&use);
	ghcb_call(use.ghcb, GHCB_EXIT_NMI_COMPLETE, 0, 0);
	ghcb_end(&use);
}

/*
 * Called by the stub of vector 2. A hypervisor cannot see the IRET of an SEV-ES
 * guest, so it is told that the next NMI may come; that one comes at once, on
 * this stack.
 */
void guest_nmi(struct exception_frame *frame)
{
	guest_exception(frame);
	if (guest_cpu()->ghcb)
		nmi_complete();
}

/* Carry the instruction out; false where the frame holds an exception for the test. */
static __attribute__((noinline)) bool carry_out(struct exception_frame *frame)
{
	struct insn insn = insn_decode(frame);
	struct ghcb_use use;
	enum vc_end end;

	ghcb_begin(&use);
	end = emulate(frame, &insn, use.ghcb);
	ghcb_end(&use);
	if (end == VC_DONE)
		frame->rip += insn.length;
	return end == VC_DONE || end == VC_AGAIN;
}

/* Called by the stub of vector 29, on every kind of VM. */
void guest_vc(struct exception_frame *frame)
{
	/* #VC of page states and of what is not known here is for the test. */
	if (!guest_cpu()->ghcb || frame->error_code == SVM_EXIT_NOT_VALIDATED || !carry_out(frame))
		guest_exception(frame);
}
