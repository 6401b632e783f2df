// SPDX-License-Identifier: Apache-2.0
/* String instructions rather than loops: hosts that emulate ring 0 do those in one go. */
#include <kvmpy/string.h>

void *memset(void *to, int c, size_t size)
{
	void *p = to;

	asm volatile("rep stosb" : "+D"(p), "+c"(size) : "a"(c) : "memory");
	return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
	size_t words = size / sizeof(long);
	void *p = to;

#ifdef __x86_64__
	asm volatile("rep movsq" : "+D"(p), "+S"(from), "+c"(words) : : "memory");
#else
	asm volatile("rep movsl" : "+D"(p), "+S"(from), "+c"(words) : : "memory");
#endif
	size %= sizeof(long);
	asm volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(size) : : "memory");
	return to;
}

void *memmove(void *to, const void *from, size_t size)
{
	char *d = to;
	const char *s = from;

	if ((uintptr_t)to - (uintptr_t)from >= size)
		return memcpy(to, from, size);

	d += size - 1;
	s += size - 1;
	asm volatile("std; rep movsb; cld" : "+D"(d), "+S"(s), "+c"(size) : : "memory");
	return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
	const u8 *x = a, *y = b;

	for (; size; size--, x++, y++) {
		if (*x != *y)
			return *x - *y;
	}
	return 0;
}

size_t strnlen(const char *s, size_t size)
{
	size_t len = 0;

	while (len < size && s[len])
		len++;
	return len;
}

size_t strlen(const char *s)
{
	return strnlen(s, SIZE_MAX);
}

int strcmp(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return (u8)*a - (u8)*b;
}
