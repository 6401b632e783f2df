struct kvmpy_note {
	uint64_t gpa;
	uint64_t size;
	uint64_t there;
};

struct kvmpy_notes {
	uint32_t lock;
	uint32_t count;
	struct kvmpy_note note[256];
};

struct kvmpy_conversions;

#define KVMPY_NOTES_MANY 192
#define KVMPY_CONVERT_ELSEWHERE 1

void kvmpy_note(struct kvmpy_notes *n, uint64_t gpa, uint64_t size, int there);
void kvmpy_notes_drop(struct kvmpy_notes *n, uint32_t count);
struct kvmpy_conversions *kvmpy_conversions_new(void);
void kvmpy_conversions_free(struct kvmpy_conversions *c);
int kvmpy_conversions_acquire(struct kvmpy_conversions *c, int blocking);
void kvmpy_conversions_release(struct kvmpy_conversions *c);
void kvmpy_conversions_allow(struct kvmpy_conversions *c, uint64_t start, uint64_t end);
int kvmpy_convert(struct kvmpy_conversions *c, int fd, unsigned long request, uint64_t gpa, uint64_t size, uint64_t attributes, struct kvmpy_notes *accepted, struct kvmpy_notes *frames);
