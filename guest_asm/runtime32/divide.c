// SPDX-License-Identifier: Apache-2.0
/* Division of 64 bits, which gcc leaves to a library that a 32-bit toolchain may lack. */
#include <kvmpy/types.h>

u64 __udivmoddi4(u64 n, u64 d, u64 *rest);
u64 __udivdi3(u64 n, u64 d);
u64 __umoddi3(u64 n, u64 d);
s64 __divdi3(s64 n, s64 d);
s64 __moddi3(s64 n, s64 d);

u64 __udivmoddi4(u64 n, u64 d, u64 *rest)
{
	u64 quotient = 0, left = 0;

	if (!d)
		asm volatile("divl %0" : : "r"(0) : "eax", "edx");	/* #DE, as one instruction would */
	for (int bit = 63; bit >= 0; bit--) {
		bool carry = left >> 63;

		left = left << 1 | (n >> bit & 1);
		if (carry || left >= d) {
			left -= d;
			quotient |= 1ull << bit;
		}
	}
	if (rest)
		*rest = left;
	return quotient;
}

u64 __udivdi3(u64 n, u64 d)
{
	return __udivmoddi4(n, d, NULL);
}

u64 __umoddi3(u64 n, u64 d)
{
	u64 rest;

	__udivmoddi4(n, d, &rest);
	return rest;
}

static u64 magnitude(s64 value)
{
	return value < 0 ? -(u64)value : (u64)value;
}

s64 __divdi3(s64 n, s64 d)
{
	u64 quotient = __udivdi3(magnitude(n), magnitude(d));

	return (n < 0) != (d < 0) ? -quotient : quotient;
}

s64 __moddi3(s64 n, s64 d)
{
	u64 rest = __umoddi3(magnitude(n), magnitude(d));

	return n < 0 ? -rest : rest;
}
