/* A record being written; pid, fd and the first number of order are set by whoever makes it. */
struct kvmpy_record {
	int32_t fd;
	uint32_t pid;
	uint64_t order;
	uint64_t frames;
	uint64_t lost;
};

#define KVMPY_RECORD_SMALL 4096

uint64_t kvmpy_record_order(struct kvmpy_record *r);
int kvmpy_record_frame(struct kvmpy_record *r, uint32_t type, uint32_t flags, uint32_t tid, uint64_t order,
		       uint64_t time_ns, const void *payload, uint32_t length);
int kvmpy_record_ioctl(struct kvmpy_record *r, uint32_t object, uint32_t tid, int fd, unsigned long request,
		       void *arg, uint32_t size, uint32_t when);
