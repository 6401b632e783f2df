/* A buffer of the plan: Buffer and Size of kvmpy/uapi/buffer_type.py. */
struct kvmpy_plan_node {
	uint32_t pointer; /* where the parent holds its address */
	uint32_t direction;
	uint32_t flags;
	uint32_t special;
	uint32_t base;
	uint32_t count; /* offset of a field, as are when and select; or KVMPY_PLAN_NO_FIELD */
	uint32_t count_size;
	uint32_t unit;
	uint32_t per;
	uint32_t least;
	uint32_t round;
	uint32_t reads;
	uint32_t when;
	uint32_t select;
	uint32_t children; /* the first of nr_children nodes; so are cases */
	uint32_t nr_children;
	uint32_t cases;
	uint32_t nr_cases;
};

struct kvmpy_slot {
	uint64_t hva;
	uint64_t size; /* 0: there is none */
};

#define KVMPY_RUN_HEAD 288 /* the part of struct kvm_run that every exit may have written */

/* What is remembered of an object of KVM's from one ioctl to the next. */
struct kvmpy_object {
	uint32_t id;
	uint32_t kind;
	struct kvmpy_object *vm; /* what made it, but for a VM */
	uint32_t vm_type;
	uint32_t made; /* objects that were numbered by their count */
	uint64_t xsave_size;
	struct kvmpy_slot *slots; /* of a VM */
	uint32_t nr_slots; /* none was ever used at or beyond this index */
	uint32_t entered; /* of a VM: vCPUs that are in KVM_RUN */
	uint64_t coalesced; /* of a VM: the ends of its ring as the last KVM_RUN left them */
	uint64_t run; /* of a vCPU: where its run area is mapped, 0 unknown */
	uint64_t run_length;
	uint64_t valid_regs; /* which registers the host asks for with KVM_RUN */
	uint8_t shadow[KVMPY_RUN_HEAD]; /* the run area as the last KVM_RUN left it */
	char name[48];
};

/* An object that an ioctl made. */
struct kvmpy_made {
	uint32_t kind;
	int32_t fd;
	char name[80];
};

struct kvmpy_range {
	uint64_t address;
	uint64_t size;
};

/* Where memory is read: in this process, or through a descriptor of /proc/PID/mem. */
struct kvmpy_source {
	int32_t fd; /* -1: this process */
	uint32_t nr_held;
	const struct kvmpy_range *held; /* what pointers lead to here is in the record by other means */
};

struct kvmpy_piece {
	const struct kvmpy_plan_node *node;
	uint64_t address;
	uint64_t length;
	uint32_t what;
};

#define KVMPY_MOST_PIECES 24
#define KVMPY_CAPTURE_MOST 1048576 /* bytes of one chunk; what is longer is cut */

/* One ioctl: between kvmpy_capture_enter() and kvmpy_capture_end(). Source and scratch are its owner's, and where
 * the frame goes (record.c): the record and the thread.
 */
struct kvmpy_capture {
	const struct kvmpy_source *source;
	uint8_t *scratch;
	uint64_t scratch_size;
	struct kvmpy_record *record;
	uint32_t tid;
	uint64_t order;
	uint64_t start_ns;
	struct kvmpy_object *object;
	int32_t fd;
	uint32_t request;
	uint64_t arg;
	uint64_t sure; /* bytes of the argument that can be read, 0 unknown */
	uint8_t *data; /* chunks as they stand in a frame */
	uint64_t length;
	uint64_t room;
	uint64_t mapped; /* bytes of data that were mapped for this call alone */
	uint32_t count;
	uint32_t nr_out;
	uint32_t done;
	struct kvmpy_piece out[KVMPY_MOST_PIECES];
	struct kvmpy_plan_node guess;
	struct kvmpy_object *entered;
};

uint64_t kvmpy_source_read(const struct kvmpy_source *source, void *to, uint64_t address, uint64_t length);
struct kvmpy_object *kvmpy_object_owner(struct kvmpy_object *object);
uint64_t kvmpy_slot_pages(const struct kvmpy_object *vm, uint32_t id);
void kvmpy_object_init(struct kvmpy_object *object, uint32_t id, uint32_t kind, struct kvmpy_object *maker,
		       uint32_t vm_type, const char *name);
void kvmpy_object_end(struct kvmpy_object *object);
void kvmpy_capture_enter(struct kvmpy_capture *c, struct kvmpy_object *object, int fd, uint32_t request,
			 const void *place, uint64_t number);
void kvmpy_capture_exit(struct kvmpy_capture *c, int64_t result);
void kvmpy_capture_end(struct kvmpy_capture *c);
uint64_t kvmpy_capture_size(const struct kvmpy_capture *c);
uint64_t kvmpy_capture_fill(const struct kvmpy_capture *c, uint8_t *place, int64_t result, int error,
			    uint64_t end_order, uint64_t end_ns);
int kvmpy_capture_made(const struct kvmpy_capture *c, int64_t result, uint32_t *vms, struct kvmpy_made *made);
uint32_t kvmpy_foreign_fds(const struct kvmpy_source *source, uint32_t request, uint64_t arg, int32_t *fds,
			   uint32_t most);
