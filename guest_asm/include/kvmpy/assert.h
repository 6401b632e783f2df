/* SPDX-License-Identifier: Apache-2.0 */
/* Assertions: the host gets both values, the text, the file and the line. */
#ifndef KVMPY_ASSERT_H
#define KVMPY_ASSERT_H

#include <kvmpy/cpu.h>

__cold __noreturn __noinline
void guest_abort(u32 kind, u64 got, u64 expected, const char *text, const char *file, u32 line);

__cold __noreturn __noinline __printf(3, 4)
void guest_fail(const char *file, u32 line, const char *fmt, ...);

#define __GUEST_SIGNED(x, flag)							\
	_Generic((x), signed char: (flag), short: (flag), int: (flag),		\
		 long: (flag), long long: (flag), default: 0)

#define __GUEST_ASSERT(kind, a, op, b, text)					\
do {										\
	__auto_type __got = (a);						\
	__auto_type __expected = (b);						\
										\
	if (unlikely(!(__got op __expected)))					\
		guest_abort((kind) |						\
			    __GUEST_SIGNED(__got, KVMPY_ASSERT_GOT_SIGNED) |	\
			    __GUEST_SIGNED(__expected, KVMPY_ASSERT_EXPECTED_SIGNED), \
			    (u64)__got, (u64)__expected, text, __FILE__, __LINE__); \
} while (0)

#define GUEST_ASSERT(cond)							\
do {										\
	if (unlikely(!(cond)))							\
		guest_abort(KVMPY_ASSERT_TRUE, 0, 1, #cond, __FILE__, __LINE__); \
} while (0)

/* The value that the test got comes first, the one that it expects second. */
#define GUEST_ASSERT_EQ(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_EQ, a, ==, b, #a " == " #b)
#define GUEST_ASSERT_NE(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_NE, a, !=, b, #a " != " #b)
#define GUEST_ASSERT_LT(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_LT, a, <, b, #a " < " #b)
#define GUEST_ASSERT_LE(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_LE, a, <=, b, #a " <= " #b)
#define GUEST_ASSERT_GT(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_GT, a, >, b, #a " > " #b)
#define GUEST_ASSERT_GE(a, b)	__GUEST_ASSERT(KVMPY_ASSERT_GE, a, >=, b, #a " >= " #b)

#define GUEST_FAIL(fmt, ...)	guest_fail(__FILE__, __LINE__, fmt, ##__VA_ARGS__)

#endif /* KVMPY_ASSERT_H */
