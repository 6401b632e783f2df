/* SPDX-License-Identifier: Apache-2.0 */
/* What the CPU itself says, where KVM leaves it out. */
#include <cpuid.h>

/* Write EAX, EBX, ECX and EDX to out. */
void kvmpy_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *out)
{
	__cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
}
