/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVMPY_TYPES_H
#define KVMPY_TYPES_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef long long s64;

#ifndef __always_inline
#define __always_inline		inline __attribute__((__always_inline__))
#endif
#define __noinline		__attribute__((__noinline__))
#define __cold			__attribute__((__cold__))
#define __noreturn		__attribute__((__noreturn__))
#define __packed		__attribute__((__packed__))
#define __aligned(n)		__attribute__((__aligned__(n)))
#define __section(name)		__attribute__((__section__(name)))
#define __printf(fmt, first)	__attribute__((__format__(__printf__, fmt, first)))

/* Data that the host may read under every protection. */
#define GUEST_SHARED		__section(".shared")
/* Code and data that ring 3 may reach; such code may call such code only. */
#define GUEST_USER		__section(".user.text") __noinline
#define GUEST_USER_DATA		__section(".user.data")

#define likely(x)		__builtin_expect(!!(x), 1)
#define unlikely(x)		__builtin_expect(!!(x), 0)
#define barrier()		asm volatile("" : : : "memory")

#define READ_ONCE(x)		(*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v)	(*(volatile __typeof__(x) *)&(x) = (v))

/* A pointer in a structure that the host knows: 8 bytes, also in 32-bit programs. */
#define GUEST_POINTER(type, name)	union { type *name; u64 __##name; }

#define BIT(n)			(1ull << (n))
#define GENMASK(high, low)	((~0ull >> (63 - (high))) & (~0ull << (low)))
#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))
#define PAGE_SIZE		4096ul

#endif /* KVMPY_TYPES_H */
