#define KVMPY_CALLS 64
#define KVMPY_CALL_RUN 0xffffffff

/*
 * One of the last ioctls. size bytes of its argument follow in what kvmpy_calls_read() writes, padded to 8;
 * without a struct (kind 0) the argument is value. KVM_RUNs in a row that ended for one reason are one call
 * (kind KVMPY_CALL_RUN, the begin of the last one's kvm_run).
 */
struct kvmpy_call {
	uint64_t ns;
	uint64_t thread;
	uint64_t request;
	uint64_t value;
	int32_t result;
	int32_t error;
	uint32_t kind;
	uint32_t size;
	uint32_t times;
	char label[76];
};

int kvmpy_ioctl(const char *label, int fd, unsigned long request, uintptr_t value);
int kvmpy_ioctl_ptr(const char *label, int fd, unsigned long request, void *arg, uint32_t size, uint32_t kind);
void kvmpy_call_note(const char *label, unsigned long request, uint64_t value, void *arg, uint32_t size,
		     uint32_t kind, int result, int error);
size_t kvmpy_calls_read(void *buffer, size_t room);
void kvmpy_calls_clear(void);
int kvmpy_inspect(int change);
