// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/assert.h>
#include <kvmpy/printf.h>
#include <kvmpy/string.h>
#include <kvmpy/ucall.h>

/* Of the slot's text, for what failed; the file's name has the rest. */
#define TEXT_MAX	256

static void put_file(struct guest_ucall_slot *slot, size_t at, const char *file)
{
	size_t room = sizeof(slot->text) - at - 1;
	size_t len = strlen(file);

	/* The end of a path says more than its beginning. */
	if (len > room) {
		file += len - room;
		len = room;
	}
	memcpy(slot->text + at, file, len + 1);
}

static __noreturn void abort_from(void *caller, u32 kind, u64 got, u64 expected,
				  const char *text, const char *file, u32 line)
{
	struct guest_ucall_slot *slot = guest_ucall_current();
	size_t len = strnlen(text, TEXT_MAX - 1);

	memcpy(slot->text, text, len);
	slot->text[len] = '\0';
	put_file(slot, len + 1, file);
	slot->args[0] = got;
	slot->args[1] = expected;
	slot->args[2] = line;
	slot->args[3] = kind;
	slot->args[4] = (uintptr_t)caller;
	slot->cmd = KVMPY_UCALL_CMD_ABORT | 5 << KVMPY_UCALL_NARGS_SHIFT | KVMPY_UCALL_HAS_TEXT;
	for (;;)
		guest_ucall_send(slot);
}

__noreturn void guest_abort(u32 kind, u64 got, u64 expected,
			    const char *text, const char *file, u32 line)
{
	abort_from(__builtin_return_address(0), kind, got, expected, text, file, line);
}

__noreturn void guest_fail(const char *file, u32 line, const char *fmt, ...)
{
	char text[TEXT_MAX];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	abort_from(__builtin_return_address(0), KVMPY_ASSERT_FAIL, 0, 0, text, file, line);
}
