/* SPDX-License-Identifier: Apache-2.0 */
/* %d %i %u %x %X %p %s %c %%, with l, ll, h, hh and z, width, precision, -, 0, + and #. */
#ifndef KVMPY_PRINTF_H
#define KVMPY_PRINTF_H

#include <kvmpy/types.h>

__printf(1, 2) void guest_printf(const char *fmt, ...);

/* As in C: return the length that the whole text has. */
__printf(3, 4) int snprintf(char *buf, size_t size, const char *fmt, ...);
__printf(3, 0) int vsnprintf(char *buf, size_t size, const char *fmt, va_list args);

/* Call @put with each character; return how many there were. */
__printf(3, 0)
int guest_format(void (*put)(void *to, char c), void *to, const char *fmt, va_list args);

/* Print on the host, in vm.console. */
#define GUEST_PRINTF(fmt, ...)	guest_printf(fmt, ##__VA_ARGS__)

#endif /* KVMPY_PRINTF_H */
