// SPDX-License-Identifier: Apache-2.0
/* What only SNP guests ask for: page states, further vCPUs, messages to the firmware. */
#include <kvmpy/hypercall.h>
#include <kvmpy/layout.h>
#include <kvmpy/sev.h>
#include <kvmpy/string.h>

struct psc_buffer {
	u16 cur_entry;
	u16 end_entry;
	u32 reserved;
	struct psc_entry entries[PSC_MAX_ENTRIES];
};

_Static_assert(sizeof(struct psc_entry) == 8, "struct psc_entry");
_Static_assert(sizeof(struct psc_buffer) == GHCB_SHARED_BUFFER_SIZE, "struct psc_buffer");

#define PSC_TOO_MANY		(~0ul)
#define PSC_NOT_VALIDATED	(~1ul)

u64 psc_call(const struct psc_entry *entries, u32 count)
{
	struct ghcb_use use;
	struct psc_buffer *buffer;
	struct ghcb_answer answer;

	if (!count || count > PSC_MAX_ENTRIES)
		return PSC_TOO_MANY;

	ghcb_begin(&use);
	buffer = (struct psc_buffer *)((u8 *)use.ghcb + GHCB_SHARED_BUFFER);
	memset(buffer, 0, 8);
	buffer->end_entry = count - 1;
	memcpy(buffer->entries, entries, count * sizeof(*entries));
	/* The hypervisor may stop on the way, and says in the header how far it got. */
	do {
		ghcb_put(use.ghcb, GHCB_SW_SCRATCH, guest_cpu()->ghcb_gpa + GHCB_SHARED_BUFFER);
		answer = ghcb_call(use.ghcb, GHCB_EXIT_PSC, 0, 0);
	} while (!answer.status && !answer.info && READ_ONCE(buffer->cur_entry) < count);
	ghcb_end(&use);
	return answer.status ? answer.status : answer.info;
}

u32 psc_msr_call(u64 gpa, u32 operation)
{
	u64 answer = ghcb_msr_call((gpa & ~0xffful) | (u64)operation << 52 | GHCB_MSR_PSC_REQ);

	return GHCB_MSR_INFO(answer) == GHCB_MSR_PSC_RESP ? answer >> 32 : ~0u;
}

static void set_entry(u8 *page, bool private)
{
	volatile u64 *entry = guest_table_entry(page, 1);
	u64 mask = guest_cpu()->encryption_mask;

	*entry = private ? *entry | mask : *entry & ~mask;
	invlpg(page);
}

/* One page at a time, as the pages of a range need not be contiguous for the hypervisor. */
static u64 set_page(u8 *page, bool private)
{
	u64 gpa = guest_translate(page, NULL);
	struct psc_entry entry = {
		.gfn = gpa >> 12,
		.operation = private ? PSC_PRIVATE : PSC_SHARED,
	};
	u64 error;

	if (!sev_snp_active()) {
		error = guest_map_gpa_range(gpa, 4096, private);
		if (!error)
			set_entry(page, private);
		return error;
	}
	if (!private && pvalidate(page, false, false).code)
		return PSC_NOT_VALIDATED;
	error = psc_call(&entry, 1);
	if (error)
		return error;
	set_entry(page, private);
	return private && pvalidate(page, false, true).code ? PSC_NOT_VALIDATED : 0;
}

u64 guest_set_private(void *gva, u64 size, bool private)
{
	for (u64 at = 0; at < size; at += 4096) {
		u64 error = set_page((u8 *)gva + at, private);

		if (error)
			return error;
	}
	return 0;
}

u64 snp_ap_create(u32 request, u32 apic_id, u64 vmsa_gpa, u64 sev_features)
{
	struct ghcb_answer answer;
	struct ghcb_use use;

	ghcb_begin(&use);
	ghcb_put(use.ghcb, GHCB_RAX, sev_features);
	answer = ghcb_call(use.ghcb, GHCB_EXIT_AP_CREATION, (u64)apic_id << 32 | request, vmsa_gpa);
	ghcb_end(&use);
	return answer.status ? (u64)answer.status << 32 | answer.info : 0;
}

/* A segment of the VM save area. */
struct segment {
	u16 selector;
	u16 attributes;
	u32 limit;
	u64 base;
};

#define VMSA_ES			0x000
#define VMSA_CS			0x010
#define VMSA_SS			0x020
#define VMSA_DS			0x030
#define VMSA_FS			0x040
#define VMSA_GS			0x050
#define VMSA_GDTR		0x060
#define VMSA_LDTR		0x070
#define VMSA_IDTR		0x080
#define VMSA_TR			0x090
#define VMSA_EFER		0x0d0
#define VMSA_CR4		0x148
#define VMSA_CR3		0x150
#define VMSA_CR0		0x158
#define VMSA_DR7		0x160
#define VMSA_DR6		0x168
#define VMSA_RFLAGS		0x170
#define VMSA_RIP		0x178
#define VMSA_RSP		0x1d8
#define VMSA_G_PAT		0x268
#define VMSA_RDI		0x338
#define VMSA_SEV_FEATURES	0x3b0
#define VMSA_XCR0		0x3e8
#define VMSA_MXCSR		0x408
#define VMSA_X87_FCW		0x410

#define ATTR_CODE64		0xa9b
#define ATTR_DATA		0xc93
#define ATTR_LDT		0x082
#define ATTR_TSS		0x08b

#define MSR_EFER		0xc0000080
#define MSR_PAT			0x277
#define EFER_SVME		(1ul << 12)
#define CR4_OSXSAVE		(1ul << 18)

struct __attribute__((packed)) table_register {
	u16 limit;
	u64 base;
};

static void put_segment(void *vmsa, u32 at, u16 selector, u16 attributes, u32 limit, u64 base)
{
	*(struct segment *)((u8 *)vmsa + at) = (struct segment){ selector, attributes, limit, base };
}

static void put(void *vmsa, u32 at, u64 value)
{
	*(u64 *)((u8 *)vmsa + at) = value;
}

void snp_vmsa_init(void *vmsa, u64 rip, u64 rsp, u64 rdi, u64 gs, u64 sev_features)
{
	struct table_register gdtr, idtr;

	asm volatile("sgdt %0" : "=m"(gdtr));
	asm volatile("sidt %0" : "=m"(idtr));
	memset(vmsa, 0, 4096);
	put_segment(vmsa, VMSA_CS, KVMPY_KERNEL_CS, ATTR_CODE64, ~0u, 0);
	put_segment(vmsa, VMSA_SS, KVMPY_KERNEL_DS, ATTR_DATA, ~0u, 0);
	put_segment(vmsa, VMSA_DS, KVMPY_KERNEL_DS, ATTR_DATA, ~0u, 0);
	put_segment(vmsa, VMSA_ES, KVMPY_KERNEL_DS, ATTR_DATA, ~0u, 0);
	put_segment(vmsa, VMSA_FS, KVMPY_KERNEL_DS, ATTR_DATA, ~0u, 0);
	put_segment(vmsa, VMSA_GS, KVMPY_KERNEL_DS, ATTR_DATA, ~0u, gs);
	put_segment(vmsa, VMSA_GDTR, 0, 0, gdtr.limit, gdtr.base);
	put_segment(vmsa, VMSA_IDTR, 0, 0, idtr.limit, idtr.base);
	put_segment(vmsa, VMSA_LDTR, 0, ATTR_LDT, 0, 0);
	/* The selector is not used again: the base is what interrupts go by. */
	put_segment(vmsa, VMSA_TR, 0x30, ATTR_TSS, 0x67, gs + KVMPY_PERCPU_TSS);
	put(vmsa, VMSA_EFER, rdmsr(MSR_EFER) | EFER_SVME);
	put(vmsa, VMSA_CR0, read_cr0());
	put(vmsa, VMSA_CR3, read_cr3());
	put(vmsa, VMSA_CR4, read_cr4());
	put(vmsa, VMSA_DR6, 0xffff0ff0);
	put(vmsa, VMSA_DR7, 0x400);
	put(vmsa, VMSA_RFLAGS, 2);
	put(vmsa, VMSA_RIP, rip);
	put(vmsa, VMSA_RSP, rsp);
	put(vmsa, VMSA_RDI, rdi);
	put(vmsa, VMSA_G_PAT, rdmsr(MSR_PAT));
	put(vmsa, VMSA_SEV_FEATURES, sev_features);
	put(vmsa, VMSA_XCR0, read_cr4() & CR4_OSXSAVE ? xgetbv(0) : 1);
	*(u32 *)((u8 *)vmsa + VMSA_MXCSR) = 0x1f80;
	*(u16 *)((u8 *)vmsa + VMSA_X87_FCW) = 0x37f;
}

static u64 result_of(struct ghcb_answer answer)
{
	return answer.status ? (u64)answer.status << 56 | answer.info : answer.info;
}

u64 snp_guest_request(u64 request_gpa, u64 response_gpa)
{
	struct ghcb_answer answer;
	struct ghcb_use use;

	ghcb_begin(&use);
	answer = ghcb_call(use.ghcb, GHCB_EXIT_GUEST_REQUEST, request_gpa, response_gpa);
	ghcb_end(&use);
	return result_of(answer);
}

u64 snp_extended_request(u64 request_gpa, u64 response_gpa, u64 data_gpa, u64 *pages)
{
	struct ghcb_answer answer;
	struct ghcb_use use;

	ghcb_begin(&use);
	ghcb_put(use.ghcb, GHCB_RAX, data_gpa);
	ghcb_put(use.ghcb, GHCB_RBX, *pages);
	answer = ghcb_call(use.ghcb, GHCB_EXIT_EXT_REQUEST, request_gpa, response_gpa);
	*pages = ghcb_get(use.ghcb, GHCB_RBX);
	ghcb_end(&use);
	return result_of(answer);
}
