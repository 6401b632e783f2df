/* SPDX-License-Identifier: Apache-2.0 */
/* Ports and memory-mapped registers: one instruction each, of the size in its name. */
#ifndef KVMPY_IO_H
#define KVMPY_IO_H

#include <kvmpy/types.h>

#define __KVMPY_PORT(size, type, reg)						\
static __always_inline type in##size(u16 port)					\
{										\
	type value;								\
										\
	asm volatile("in" #size " %w1, %" reg "0" : "=a"(value) : "Nd"(port) : "memory"); \
	return value;								\
}										\
										\
static __always_inline void out##size(u16 port, type value)			\
{										\
	asm volatile("out" #size " %" reg "0, %w1" : : "a"(value), "Nd"(port) : "memory"); \
}										\
										\
/* REP string forms; @count is in elements. */					\
static __always_inline void ins##size(u16 port, void *to, unsigned long count)		\
{										\
	asm volatile("rep ins" #size						\
		     : "+D"(to), "+c"(count) : "d"(port) : "memory");		\
}										\
										\
static __always_inline void outs##size(u16 port, const void *from, unsigned long count)	\
{										\
	asm volatile("rep outs" #size						\
		     : "+S"(from), "+c"(count) : "d"(port) : "memory");		\
}

__KVMPY_PORT(b, u8, "b")
__KVMPY_PORT(w, u16, "w")
__KVMPY_PORT(l, u32, "k")
#undef __KVMPY_PORT

#define __KVMPY_MMIO(bits, suffix, constraint)					\
static __always_inline u##bits mmio_read##bits(const volatile void *address)	\
{										\
	u##bits value;								\
										\
	asm volatile("mov" #suffix " %1, %0"					\
		     : "=" constraint(value)					\
		     : "m"(*(const volatile u##bits *)address) : "memory");	\
	return value;								\
}										\
										\
static __always_inline void mmio_write##bits(volatile void *address, u##bits value) \
{										\
	asm volatile("mov" #suffix " %1, %0"					\
		     : "=m"(*(volatile u##bits *)address)			\
		     : constraint(value) : "memory");				\
}

__KVMPY_MMIO(8, b, "q")
__KVMPY_MMIO(16, w, "r")
__KVMPY_MMIO(32, l, "r")
#ifdef __x86_64__
__KVMPY_MMIO(64, q, "r")
#endif
#undef __KVMPY_MMIO

#endif /* KVMPY_IO_H */
