/* userfaultfd(2): struct kvmpy_uffd_event is a struct uffd_msg as this file needs it. */
struct kvmpy_uffd_event {
	uint32_t event;
	uint32_t thread_id;
	uint64_t flags;
	uint64_t address;
	uint64_t end;
};

struct kvmpy_uffd_watch;

int kvmpy_uffd_open(int flags);
int kvmpy_uffd_open_dev(const char *path, int flags);
int kvmpy_uffd_api(int fd, uint64_t features, uint64_t *offered);
int kvmpy_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
int kvmpy_uffd_unregister(int fd, uint64_t start, uint64_t len);
int kvmpy_uffd_wake(int fd, uint64_t start, uint64_t len);
int64_t kvmpy_uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode);
int64_t kvmpy_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t kvmpy_uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode);
int64_t kvmpy_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode);
int kvmpy_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int kvmpy_uffd_read(int fd, struct kvmpy_uffd_event *out, int max);
void kvmpy_touch(uint64_t start, uint64_t len, uint64_t step, int write);

struct kvmpy_uffd_watch *kvmpy_uffd_watch_new(int fd, uint64_t patience_ns);
int kvmpy_uffd_watch_add(struct kvmpy_uffd_watch *w, uint64_t start, uint64_t len);
void kvmpy_uffd_watch_beat(struct kvmpy_uffd_watch *w);
int kvmpy_uffd_watch_stop(struct kvmpy_uffd_watch *w);
