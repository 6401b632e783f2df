/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVMPY_STRING_H
#define KVMPY_STRING_H

#include <kvmpy/types.h>

void *memset(void *to, int c, size_t size);
void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *s);
size_t strnlen(const char *s, size_t size);
int strcmp(const char *a, const char *b);

#endif /* KVMPY_STRING_H */
