/* A record being written; pid, fd and the first number of order are set by whoever makes it. */
struct kvmpy_record {
	int32_t fd;
	uint32_t pid;
	uint32_t flags; /* of ioctls */
	uint64_t order;
	uint64_t frames;
	uint64_t lost;
};

#define KVMPY_RECORD_SMALL 4096

uint64_t kvmpy_record_order(struct kvmpy_record *r);
int kvmpy_record_frame(struct kvmpy_record *r, uint32_t type, uint32_t flags, uint32_t tid, uint64_t order,
		       uint64_t time_ns, const void *payload, uint32_t length);
void kvmpy_record_enter(struct kvmpy_capture *c, struct kvmpy_object *object, int fd, uint32_t request,
			const void *place, uint64_t number);
void kvmpy_record_ioctl(struct kvmpy_capture *c, uint32_t type, int64_t result, int error);
