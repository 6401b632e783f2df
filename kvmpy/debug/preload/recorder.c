/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A shared object for LD_PRELOAD: it stands before the C library's ioctl(), and before what makes, copies and closes
 * file descriptors and mappings, and tells `kvmpy trace` what passed. It changes nothing that a program can see but
 * its environment; errno is kept. It holds no file descriptor open.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "recorder.h"

#define EXPORT __attribute__((visibility("default")))
#define KVM_TYPE 0xae
#define DIRECTORY "KVMPY_TRACE_DIR"
#define PRELOAD "LD_PRELOAD"

extern char **environ;

static char own_preload[4096], own_directory[4096];
static bool ready;

#define NEXT(name) ((__typeof__(&name))next_symbol(#name))

/* Looked up once for each call site; dlsym() of a loaded object neither allocates nor locks for long. */
static void *next_symbol(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

#define REAL(name)                                                                            \
	({                                                                                    \
		static __typeof__(&name) _Atomic real;                                        \
		__typeof__(&name) found = atomic_load_explicit(&real, memory_order_relaxed);  \
		if (!found) {                                                                 \
			found = NEXT(name);                                                   \
			atomic_store_explicit(&real, found, memory_order_relaxed);            \
		}                                                                             \
		found;                                                                        \
	})

__attribute__((constructor)) static void start(void)
{
	const char *directory = getenv(DIRECTORY), *preload = getenv(PRELOAD);
	int saved = errno;

	if (directory && preload && strlen(preload) < sizeof own_preload && strlen(directory) < sizeof own_directory) {
		size_t first = strcspn(preload, ": ");

		memcpy(own_preload, preload, first);
		strcpy(own_directory, directory);
		ready = frames_start(directory);
		if (ready)
			objects_inherited();
	}
	errno = saved;
}

static bool watched(int fd, uint64_t request, struct object **object)
{
	*object = object_of(fd);
	if (!*object && (request >> 8 & 0xff) == KVM_TYPE && recording())
		*object = object_find(fd, false);
	return *object != NULL && recording();
}

/* A descriptor that is none of KVM's becomes an object when it is given to KVM first. */
static void name_descriptors(uint32_t request, uint64_t arg)
{
	int32_t fds[4];
	uint32_t number = kvmpy_foreign_fds(&this_process, request, arg, fds, ROWS(fds));

	for (uint32_t i = 0; i < number; i++)
		if (!object_of(fds[i]))
			object_find(fds[i], true);
}

static long watched_ioctl(int fd, uint32_t request, uint64_t arg, struct object *object)
{
	bool running = request == KVM_RUN && object->known.kind == KVMPY_REC_KIND_VCPU;
	struct object *vm = running ? vm_of(object) : NULL;
	struct kvmpy_capture capture;
	long result;

	if (vm)
		memory_before_run(vm);
	name_descriptors(request, arg);
	capture_begin(&capture, object, fd, request, arg);
	if (running)
		record_ioctl(&capture, KVMPY_REC_ENTER, 0, 0);
	result = raw(SYS_ioctl, fd, request, arg, 0);
	if (vm)
		memory_after_run(vm);
	record_ioctl(&capture, KVMPY_REC_IOCTL, result < 0 ? -1 : result, result < 0 ? (int)-result : 0);
	if (result >= 0)
		note_created(&capture, result);
	capture_finish(&capture);
	return result;
}

/* An ioctl of KVM's on what is none of its file descriptors, or on none at all. */
static long stray_ioctl(int fd, uint32_t request, uint64_t arg)
{
	struct kvmpy_capture capture = { .fd = fd, .request = request, .arg = arg, .start_ns = now_ns() };
	long result = raw(SYS_ioctl, fd, request, arg, 0);

	if ((result == -EBADF || result == -ENOTTY) && recording()) {
		capture.order = next_order();
		record_ioctl(&capture, KVMPY_REC_IOCTL, -1, (int)-result);
	}
	return result;
}

static long any_ioctl(int fd, uint64_t request, uint64_t arg)
{
	struct object *object;
	/* The kernel takes 32 bits of the request; so does glibc's prototype on other systems. */
	uint32_t number = (uint32_t)request;

	if (ready && watched(fd, number, &object))
		return watched_ioctl(fd, number, arg, object);
	if (ready && (number >> 8 & 0xff) == KVM_TYPE)
		return stray_ioctl(fd, number, arg);
	return raw(SYS_ioctl, fd, request, arg, 0);
}

static int finish(long result, int saved)
{
	errno = result < 0 ? (int)-result : saved;
	return result < 0 ? -1 : (int)result;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list list;

	va_start(list, request);
	uint64_t arg = va_arg(list, uint64_t);

	va_end(list);
	int saved = errno;

	return finish(any_ioctl(fd, request, arg), saved);
}

static long raw_exec(long call, const long *a);

EXPORT long syscall(long number, ...)
{
	va_list list;
	long a[6];
	int saved = errno;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (number == SYS_ioctl)
		return finish(any_ioctl((int)a[0], (uint64_t)a[1], (uint64_t)a[2]), saved);
	long result = number == SYS_execve || number == SYS_execveat ?
			      raw_exec(number, a) :
			      raw6(number, a[0], a[1], a[2], a[3], a[4], a[5]);

	if (result < 0 && result > -4096) {
		errno = (int)-result;
		return -1;
	}
	errno = saved;
	return result;
}

/* Opening. */

static int opened(int fd, const char *path)
{
	int saved = errno;

	if (ready)
		object_opened(fd, path);
	errno = saved;
	return fd;
}

#define TAKE_MODE(flags, mode)                                   \
	mode_t mode = 0;                                         \
	if ((flags) & (O_CREAT | __O_TMPFILE)) {                 \
		va_list list;                                    \
		va_start(list, flags);                           \
		mode = va_arg(list, mode_t);                     \
		va_end(list);                                    \
	}

EXPORT int open(const char *path, int flags, ...)
{
	TAKE_MODE(flags, mode)
	return opened(REAL(open)(path, flags, mode), path);
}

EXPORT int open64(const char *path, int flags, ...)
{
	TAKE_MODE(flags, mode)
	return opened(REAL(open64)(path, flags, mode), path);
}

EXPORT int openat(int directory, const char *path, int flags, ...)
{
	TAKE_MODE(flags, mode)
	return opened(REAL(openat)(directory, path, flags, mode), path);
}

EXPORT int openat64(int directory, const char *path, int flags, ...)
{
	TAKE_MODE(flags, mode)
	return opened(REAL(openat64)(directory, path, flags, mode), path);
}

/* What fortified programs call instead. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
int __openat64_2(int directory, const char *path, int flags);

EXPORT int __open_2(const char *path, int flags)
{
	return opened(REAL(__open_2)(path, flags), path);
}

EXPORT int __open64_2(const char *path, int flags)
{
	return opened(REAL(__open64_2)(path, flags), path);
}

EXPORT int __openat_2(int directory, const char *path, int flags)
{
	return opened(REAL(__openat_2)(directory, path, flags), path);
}

EXPORT int __openat64_2(int directory, const char *path, int flags)
{
	return opened(REAL(__openat64_2)(directory, path, flags), path);
}

/* Closing and copying. */

EXPORT int close(int fd)
{
	int saved = errno;

	/* Before: another thread may get the number at once. */
	if (ready)
		object_close(fd);
	errno = saved;
	return REAL(close)(fd);
}

EXPORT int close_range(unsigned int first, unsigned int last, int flags)
{
	for (unsigned int fd = first; ready && !(flags & 4 /* CLOSE_RANGE_CLOEXEC */) && fd <= last && fd < 65536; fd++)
		object_close((int)fd);
	return finish(raw(SYS_close_range, first, last, flags, 0), errno);
}

EXPORT void closefrom(int first)
{
	for (int fd = first < 0 ? 0 : first; ready && fd < 65536; fd++)
		object_close(fd);
	raw(SYS_close_range, first < 0 ? 0 : first, ~0U, 0, 0);
}

static int copied(int from, int to)
{
	int saved = errno;

	if (ready && to >= 0)
		object_dup(from, to);
	errno = saved;
	return to;
}

EXPORT int dup(int fd)
{
	return copied(fd, REAL(dup)(fd));
}

EXPORT int dup2(int fd, int to)
{
	return copied(fd, REAL(dup2)(fd, to));
}

EXPORT int dup3(int fd, int to, int flags)
{
	return copied(fd, REAL(dup3)(fd, to, flags));
}

EXPORT int fcntl(int fd, int operation, ...)
{
	va_list list;

	va_start(list, operation);
	void *arg = va_arg(list, void *);

	va_end(list);
	int result = REAL(fcntl)(fd, operation, arg);

	return operation == F_DUPFD || operation == F_DUPFD_CLOEXEC ? copied(fd, result) : result;
}

EXPORT int fcntl64(int fd, int operation, ...)
{
	va_list list;

	va_start(list, operation);
	void *arg = va_arg(list, void *);

	va_end(list);
	int result = REAL(fcntl64)(fd, operation, arg);

	return operation == F_DUPFD || operation == F_DUPFD_CLOEXEC ? copied(fd, result) : result;
}

/* Mappings. */

static void *mapped(void *address, size_t length, int flags, int fd, off_t offset)
{
	int saved = errno;

	if (ready && address != MAP_FAILED && fd >= 0)
		run_mapped(fd, address, length, (uint64_t)offset, flags);
	errno = saved;
	return address;
}

EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	long result = raw6(SYS_mmap, (long)address, (long)length, protection, flags, fd, offset);

	if (result < 0 && result > -4096) {
		errno = (int)-result;
		return MAP_FAILED;
	}
	return mapped((void *)result, length, flags, fd, offset);
}

EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
	return mmap(address, length, protection, flags, fd, offset);
}

EXPORT int munmap(void *address, size_t length)
{
	int saved = errno;

	if (ready)
		run_unmapped(address, length);
	return finish(raw(SYS_munmap, address, length, 0, 0), saved);
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t length)
{
	int result = REAL(fallocate)(fd, mode, offset, length), saved = errno;
	struct object *object = ready ? object_of(fd) : NULL;

	if (object && recording()) {
		struct kvmpy_rec_file payload = {
			.object = object->known.id,
			.call = KVMPY_REC_FILE_FALLOCATE,
			.mode = (uint64_t)mode,
			.offset = (uint64_t)offset,
			.length = (uint64_t)length,
			.result = result,
			.error = result < 0 ? (uint32_t)saved : 0,
		};

		frame_simple(KVMPY_REC_FILE, &payload, sizeof payload, NULL, 0);
	}
	errno = saved;
	return result;
}

EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

/* Programs that follow. */

static bool is_variable(const char *entry, const char *name)
{
	size_t length = strlen(name);

	return !strncmp(entry, name, length) && entry[length] == '=';
}

static void note_exec(const char *path)
{
	char text[4200] = "exec=";
	size_t length = strlen(path);

	if (!recording())
		return;
	if (length > sizeof text - 8)
		length = sizeof text - 8;
	memcpy(text + 5, path, length);
	text[5 + length] = '\n';
	frame_simple(KVMPY_REC_NOTE, text, 6 + length, NULL, 0);
}

static size_t count_of(char *const *list)
{
	size_t number = 0;

	while (list && list[number])
		number++;
	return number;
}

/* Call with an environment in which the recorder is loaded, whatever the program made of it. No memory is allocated:
 * this may be the child of a vfork(). */
#define WITH_ENVIRONMENT(envp, call)                                                                     \
	({                                                                                               \
		size_t number = count_of(envp);                                                          \
		char *changed[number + 3];                                                               \
		char preload[sizeof own_preload * 2 + sizeof PRELOAD + 2];                               \
		char directory[sizeof own_directory + sizeof DIRECTORY + 1];                             \
		char *const *environment = complete(envp, number, changed, preload, sizeof preload, directory); \
		call;                                                                                    \
	})

static char *const *complete(char *const *envp, size_t number, char **changed, char *preload, size_t room,
			     char *directory)
{
	size_t used = 0;
	bool has_preload = false;

	if (!ready)
		return envp;
	for (size_t i = 0; i < number; i++) {
		if (is_variable(envp[i], DIRECTORY))
			continue;
		if (is_variable(envp[i], PRELOAD)) {
			const char *others = envp[i] + sizeof PRELOAD;

			has_preload = true;
			if (!strstr(others, own_preload) &&
			    strlen(others) + strlen(own_preload) + sizeof PRELOAD + 2 < room) {
				strcpy(preload, PRELOAD "=");
				strcat(preload, own_preload);
				strcat(preload, ":");
				strcat(preload, others);
				changed[used++] = preload;
				continue;
			}
		}
		changed[used++] = envp[i];
	}
	if (!has_preload) {
		strcpy(preload, PRELOAD "=");
		strcat(preload, own_preload);
		changed[used++] = preload;
	}
	strcpy(directory, DIRECTORY "=");
	strcat(directory, own_directory);
	changed[used++] = directory;
	changed[used] = NULL;
	return changed;
}

/* The environment is the third argument of one call, the fourth of the other. */
static long raw_exec(long call, const long *a)
{
	int at = call == SYS_execve ? 2 : 3;
	const char *path = (const char *)a[at - 2];

	if (ready)
		note_exec(string_readable(path) ? path : "(bad address)");
	return WITH_ENVIRONMENT((char *const *)a[at],
				at == 2 ? raw(call, a[0], a[1], environment, 0) :
					  raw6(call, a[0], a[1], a[2], (long)environment, a[4], 0));
}

EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
	if (ready)
		note_exec(path);
	return WITH_ENVIRONMENT(envp, REAL(execve)(path, argv, environment));
}

EXPORT int execv(const char *path, char *const argv[])
{
	return execve(path, argv, environ);
}

EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
	if (ready)
		note_exec(file);
	return WITH_ENVIRONMENT(envp, REAL(execvpe)(file, argv, environment));
}

EXPORT int execvp(const char *file, char *const argv[])
{
	return execvpe(file, argv, environ);
}

EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
	if (ready)
		note_exec("(file descriptor)");
	return WITH_ENVIRONMENT(envp, REAL(fexecve)(fd, argv, environment));
}

#define LIST_ARGUMENTS(first, argv)                                   \
	va_list list;                                                 \
	size_t number = 1;                                            \
	va_start(list, first);                                        \
	while (va_arg(list, char *))                                  \
		number++;                                             \
	va_end(list);                                                 \
	char *argv[number + 1];                                       \
	va_start(list, first);                                        \
	argv[0] = (char *)first;                                      \
	for (size_t i = 1; i <= number; i++)                          \
		argv[i] = va_arg(list, char *);

EXPORT int execl(const char *path, const char *first, ...)
{
	LIST_ARGUMENTS(first, argv)
	va_end(list);
	return execve(path, argv, environ);
}

EXPORT int execlp(const char *file, const char *first, ...)
{
	LIST_ARGUMENTS(first, argv)
	va_end(list);
	return execvpe(file, argv, environ);
}

EXPORT int execle(const char *path, const char *first, ...)
{
	LIST_ARGUMENTS(first, argv)
	char *const *envp = va_arg(list, char *const *);

	va_end(list);
	return execve(path, argv, envp);
}

EXPORT int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
		       const posix_spawnattr_t *attributes, char *const argv[], char *const envp[])
{
	if (ready)
		note_exec(path);
	return WITH_ENVIRONMENT(envp, REAL(posix_spawn)(pid, path, actions, attributes, argv, environment));
}

EXPORT int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
			const posix_spawnattr_t *attributes, char *const argv[], char *const envp[])
{
	if (ready)
		note_exec(file);
	return WITH_ENVIRONMENT(envp, REAL(posix_spawnp)(pid, file, actions, attributes, argv, environment));
}
