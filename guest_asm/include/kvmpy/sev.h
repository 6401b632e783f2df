/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an SEV-ES or SEV-SNP guest can do that others cannot: talk to the
 * hypervisor through its GHCB, validate pages, change permissions of pages.
 *
 * None of this is needed to use ports, MSRs, CPUID or ucalls: the runtime's #VC
 * handler does that. Sources: AMD's GHCB specification (56421), APM volume 2
 * chapter 15.35 and 15.36.
 */
#ifndef KVMPY_SEV_H
#define KVMPY_SEV_H

#include <kvmpy/processor.h>
#include <kvmpy/vmcb.h>

#define MSR_SEV_ES_GHCB		0xc0010130
#define MSR_SEV_STATUS		0xc0010131

/* Fields of the GHCB by offset; those below GHCB_VALID_BITMAP have a bit in it. */
#define GHCB_CPL		0x0c8	/* in bits 24 to 31 */
#define GHCB_XSS		0x140
#define GHCB_DR7		0x160
#define GHCB_RIP		0x178
#define GHCB_RSP		0x1d8
#define GHCB_RAX		0x1f8
#define GHCB_RCX		0x308
#define GHCB_RDX		0x310
#define GHCB_RBX		0x318
#define GHCB_RBP		0x328
#define GHCB_RSI		0x330
#define GHCB_RDI		0x338
#define GHCB_R8			0x340
#define GHCB_SW_EXIT_CODE	0x390
#define GHCB_SW_EXIT_INFO_1	0x398
#define GHCB_SW_EXIT_INFO_2	0x3a0
#define GHCB_SW_SCRATCH		0x3a8
#define GHCB_XCR0		0x3e8
#define GHCB_VALID_BITMAP	0x3f0
#define GHCB_SHARED_BUFFER	0x800
#define GHCB_SHARED_BUFFER_SIZE	0x7f0
#define GHCB_PROTOCOL_VERSION	0xffa
#define GHCB_USAGE		0xffc

/* sw_exit_code: SVM's own numbers (kvmpy/vmcb.h), and those that only software knows. */
#define GHCB_EXIT_MMIO_READ	0x80000001
#define GHCB_EXIT_MMIO_WRITE	0x80000002
#define GHCB_EXIT_NMI_COMPLETE	0x80000003
#define GHCB_EXIT_AP_HLT_LOOP	0x80000004
#define GHCB_EXIT_AP_JUMP_TABLE	0x80000005
#define GHCB_EXIT_PSC		0x80000010
#define GHCB_EXIT_GUEST_REQUEST	0x80000011
#define GHCB_EXIT_EXT_REQUEST	0x80000012
#define GHCB_EXIT_AP_CREATION	0x80000013
#define GHCB_EXIT_HV_FEATURES	0x8000fffd
#define GHCB_EXIT_TERMINATE	0x8000fffe
#define GHCB_EXIT_UNSUPPORTED	0x8000ffff

/* Low half of sw_exit_info_1 afterwards. */
#define GHCB_OK			0
#define GHCB_EXCEPTION		1
#define GHCB_MALFORMED		2

/* sw_exit_info_2 of GHCB_MALFORMED, as far as the runtime tells them apart. */
#define GHCB_ERROR_REGISTERED	1

/* The MSR protocol: the low 12 bits say what the rest is. */
#define GHCB_MSR_SEV_INFO_RESP	0x001
#define GHCB_MSR_SEV_INFO_REQ	0x002
#define GHCB_MSR_CPUID_REQ	0x004
#define GHCB_MSR_CPUID_RESP	0x005
#define GHCB_MSR_PREF_GPA_REQ	0x010
#define GHCB_MSR_PREF_GPA_RESP	0x011
#define GHCB_MSR_REG_GPA_REQ	0x012
#define GHCB_MSR_REG_GPA_RESP	0x013
#define GHCB_MSR_PSC_REQ	0x014
#define GHCB_MSR_PSC_RESP	0x015
#define GHCB_MSR_HV_FT_REQ	0x080
#define GHCB_MSR_HV_FT_RESP	0x081
#define GHCB_MSR_TERM_REQ	0x100
#define GHCB_MSR_INFO(value)	((value) & 0xfff)

/* Termination: reason set 0 is the specification's, 5 is this runtime's. */
#define GHCB_TERM_GENERAL	0
#define GHCB_TERM_PROTOCOL	1
#define GHCB_TERM_SET_KVMPY	5
#define GHCB_TERM_REGISTER	1	/* the GHCB's GPA is refused, or is not the registered one */
#define GHCB_TERM_NOT_TAKEN	2	/* the hypervisor left the request where it is */
#define GHCB_TERM_UCALL		3	/* it refuses the port write of a ucall: nothing else can be said */

/* The GHCB protocol that the runtime speaks. */
#define GHCB_PROTOCOL_MIN	1
#define GHCB_PROTOCOL_MAX	2

static __always_inline void vmgexit(void)
{
	asm volatile("rep; vmmcall" : : : "memory");
}

static __always_inline u64 ghcb_get(const void *ghcb, u32 field)
{
	return *(const volatile u64 *)((const u8 *)ghcb + field);
}

/* Write a field and declare it valid. */
static __always_inline void ghcb_put(void *ghcb, u32 field, u64 value)
{
	*(volatile u64 *)((u8 *)ghcb + field) = value;
	*((volatile u8 *)ghcb + GHCB_VALID_BITMAP + field / 64) |= 1u << field / 8 % 8;
}

/* How the hypervisor answered: GHCB_OK and a value, an exception to raise, or an error number. */
struct ghcb_answer {
	u32 status;		/* low half of sw_exit_info_1 */
	u64 info;		/* sw_exit_info_2 */
};

/*
 * Between these two the vCPU's GHCB is the caller's, with interrupts off. They
 * nest: an NMI may come while the interrupted code uses the GHCB, and leaves it
 * as it was.
 */
struct ghcb_use {
	void *ghcb;
	u64 rflags;
	u64 msr;		/* of the interrupted use, like the rest */
	bool nested;
	u8 fields[0x400];
	u8 buffer[GHCB_SHARED_BUFFER_SIZE];
};

void ghcb_begin(struct ghcb_use *use);
void ghcb_end(struct ghcb_use *use);

/* Leave for the hypervisor with what was put into the GHCB since ghcb_begin(). */
struct ghcb_answer ghcb_call(void *ghcb, u64 exit_code, u64 info_1, u64 info_2);

/* Leave for the hypervisor with @value in the GHCB MSR, and return what is there afterwards. */
u64 ghcb_msr_call(u64 value);

/* Ask the hypervisor to end the guest; code 0 to 255, set 0 to 15. */
__noreturn void ghcb_terminate(u32 set, u32 code);

/* The features of the hypervisor (event HV_FEATURES). */
u64 ghcb_hv_features(void);

/* The guest-physical address behind @gva, ~0 where there is none; @private may be NULL. */
u64 guest_translate(const volatile void *gva, bool *private);

/*
 * The entry of @gva at @level (1: of its 4 KiB page), through the tables' own
 * mapping; the entries above it must be present.
 */
volatile u64 *guest_table_entry(const volatile void *gva, int level);

/*
 * Make whole 4 KiB pages private or shared: tell the hypervisor, change the
 * entries, and accept or give up the pages under SNP. Returns 0 or the
 * hypervisor's error. The content is lost under encryption.
 */
u64 guest_set_private(void *gva, u64 size, bool private);

/* Page state changes: SNP only. */
#define PSC_PRIVATE		1
#define PSC_SHARED		2
#define PSC_MAX_ENTRIES		253

struct psc_entry {
	u64 cur_page : 12;
	u64 gfn : 40;
	u64 operation : 4;
	u64 pagesize : 1;	/* 1: 2 MiB */
	u64 reserved : 7;
};

/*
 * Hand @count entries to the hypervisor; 0, or sw_exit_info_2 of the failure.
 * Private pages are to be validated afterwards, shared ones to be rescinded
 * before.
 */
u64 psc_call(const struct psc_entry *entries, u32 count);

/* One page by the MSR protocol; 0 or the error. */
u32 psc_msr_call(u64 gpa, u32 operation);

#define PVALIDATE_SUCCESS	0
#define PVALIDATE_FAIL_INPUT	1
#define PVALIDATE_FAIL_SIZEMISMATCH	6

struct pvalidate_result {
	u32 code;
	bool unchanged;		/* CF: the page was in this state already */
};

/* Validate (or rescind) the page at @gva; @huge: 2 MiB. */
static __always_inline struct pvalidate_result pvalidate(void *gva, bool huge, bool validate)
{
	struct pvalidate_result result;

	asm volatile(".byte 0xf2, 0x0f, 0x01, 0xff"
		     : "=a"(result.code), "=@ccc"(result.unchanged)
		     : "a"(gva), "c"((u32)huge), "d"((u32)validate) : "memory");
	return result;
}

#define RMPADJUST_VMSA		(1ul << 16)
#define RMPADJUST_READ		(1ul << 8)
#define RMPADJUST_WRITE		(1ul << 9)

/* Give VMPL @attributes[7:0] the permissions [15:8] of a page; bit 16: it is a VMSA. Result code in EAX. */
static __always_inline u32 rmpadjust(void *gva, bool huge, u64 attributes)
{
	u64 code = (u64)gva;

	asm volatile(".byte 0xf3, 0x0f, 0x01, 0xfe"
		     : "+a"(code) : "c"((u64)huge), "d"(attributes) : "memory", "cc");
	return code;
}

/* AP creation: SNP only. */
#define AP_CREATE_ON_INIT	0
#define AP_CREATE		1
#define AP_DESTROY		2

/* @vmsa_gpa: a page with the VMSA bit; 0 or the hypervisor's error. */
u64 snp_ap_create(u32 request, u32 apic_id, u64 vmsa_gpa, u64 sev_features);

/*
 * Fill a page with the state of a vCPU that starts at @rip with @rsp, RDI @rdi
 * and GS base @gs, and otherwise as this one runs now.
 */
void snp_vmsa_init(void *vmsa, u64 rip, u64 rsp, u64 rdi, u64 gs, u64 sev_features);

/* A message for the firmware: both pages shared with the host. Returns sw_exit_info_2: 0, or the firmware's error. */
u64 snp_guest_request(u64 request_gpa, u64 response_gpa);

/* The same with room for certificates; *@pages is how many are needed when there were too few. */
u64 snp_extended_request(u64 request_gpa, u64 response_gpa, u64 data_gpa, u64 *pages);

static __always_inline bool sev_es_active(void)
{
	return guest_cpu()->sev & KVMPY_SEV_ES;
}

static __always_inline bool sev_snp_active(void)
{
	return guest_cpu()->sev & KVMPY_SEV_SNP;
}

#endif /* KVMPY_SEV_H */
