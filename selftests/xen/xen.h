/* SPDX-License-Identifier: Apache-2.0 */
/* A guest of Xen's event channels, 2-level, in the 64-bit layout. */
#ifndef SELFTESTS_XEN_H
#define SELFTESTS_XEN_H

#include "../irq/interrupts.h"
#include "../time/pvclock.h"
#include <kvmpy/xen_numbers.h>

#define XEN_PORTS	4096

/* Upcalls, and events by port, that the handler took. */
u64 upcalls GUEST_SHARED;
u16 events[XEN_PORTS] GUEST_SHARED;
/* Where the host put the pages, and whether the vector is one of the local APIC. */
u64 shared_info, vcpu_info, by_apic;

static void take_events(struct exception_frame *frame)
{
	u64 *pending = (u64 *)(shared_info + XEN_SHINFO_EVTCHN_PENDING);
	u64 words;

	upcalls++;
	*(volatile u8 *)(vcpu_info + XEN_VCPU_UPCALL_PENDING) = 0;
	words = __atomic_exchange_n((u64 *)(vcpu_info + XEN_VCPU_PENDING_SEL), 0, __ATOMIC_SEQ_CST);
	for (u32 word = 0; word < 64; word++) {
		u64 bits;

		if (!(words & BIT(word)))
			continue;
		bits = __atomic_exchange_n(&pending[word], 0, __ATOMIC_SEQ_CST);
		for (u32 bit = 0; bit < 64; bit++)
			if (bits & BIT(bit))
				events[64 * word + bit]++;
	}
	if (by_apic)
		apic_eoi();
}

static inline u64 xen_call(u64 number, u64 a0, u64 a1, u64 a2)
{
	u64 result;

	if (guest_has_vmmcall())
		asm volatile("vmmcall" : "=a"(result) : "a"(number), "D"(a0), "S"(a1), "d"(a2) : "memory");
	else
		asm volatile("vmcall" : "=a"(result) : "a"(number), "D"(a0), "S"(a1), "d"(a2) : "memory");
	return result;
}

void xen_handler(u64 vector)
{
	guest_exception_install(vector, take_events);
}

/* Disable or enable the local APIC by software. */
u64 xen_apic(u64 on)
{
	u32 spiv = apic_read(APIC_SPIV);

	apic_write(APIC_SPIV, on ? spiv | APIC_SPIV_ENABLE : spiv & ~APIC_SPIV_ENABLE);
	return 0;
}

u64 xen_upcalls(void)
{
	irq_window();
	return upcalls;
}

/* Halt until there were @count upcalls. */
u64 xen_await(u64 count)
{
	cli();
	while (*(volatile u64 *)&upcalls < count) {
		sti_hlt();
		cli();
	}
	return upcalls;
}

u64 xen_send(u64 port)
{
	u32 send = port;

	return xen_call(XEN_HYPERCALL_EVENT_CHANNEL_OP, XEN_EVTCHNOP_SEND, (u64)&send, 0);
}

u64 xen_time(u64 gva)
{
	return pvclock_read((void *)gva, NULL);
}

u64 xen_set_timer(u64 when)
{
	return xen_call(XEN_HYPERCALL_SET_TIMER_OP, when, 0, 0);
}

u64 xen_set_singleshot(u64 vcpu, u64 when)
{
	struct { u64 when; u32 flags, pad; } timer = { .when = when };

	return xen_call(XEN_HYPERCALL_VCPU_OP, XEN_VCPUOP_SET_SINGLESHOT_TIMER, vcpu, (u64)&timer);
}

u64 xen_stop_singleshot(u64 vcpu)
{
	return xen_call(XEN_HYPERCALL_VCPU_OP, XEN_VCPUOP_STOP_SINGLESHOT_TIMER, vcpu, 0);
}

/* Wait for one of two ports, or for @timeout in ns of the guest's time. */
u64 xen_poll(u64 first, u64 second, u64 count, u64 timeout)
{
	u32 ports[2] = { first, second };
	struct { u32 *ports; u32 count, pad; u64 timeout; } poll = { ports, count, 0, timeout };

	return xen_call(XEN_HYPERCALL_SCHED_OP, XEN_SCHEDOP_POLL, (u64)&poll, 0);
}

/* Keep the CPU for @ns by the clock at @gva. */
void xen_spin(u64 gva, u64 ns)
{
	u64 end = xen_time(gva) + ns;

	while (xen_time(gva) < end)
		cpu_relax();
}

#endif /* SELFTESTS_XEN_H */
