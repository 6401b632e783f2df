struct kvmpy_trail {
	uint32_t exit_reason;
	uint32_t what;
	uint64_t data[6];
};

struct kvmpy_vcpu {
	int32_t fd;
	int32_t err;
	struct kvm_run *run;
	uint64_t ucall_hva;
	uint32_t ucall_first;
	uint32_t ucall_count;
	uint32_t ucall_slot;
	uint32_t kick;
	uint32_t busy;
	int32_t tid;
	uint64_t deadline_ns;
	uint64_t armed_ns;
	uint64_t exits;
	uint64_t ucalls;
	int32_t timer_tid;
	uint32_t trail_next;
	struct kvmpy_trail trail[16];
};

/* What became of one KVM_RUN: whether it was issued at all, and then what it returned. */
struct kvmpy_ran {
	int32_t issued;
	int32_t result;
	int32_t error;
};

#define KVMPY_RUN_EXIT 0
#define KVMPY_RUN_UCALL 1
#define KVMPY_RUN_KICKED 2
#define KVMPY_RUN_DEADLINE 3
#define KVMPY_RUN_EINTR 4
#define KVMPY_RUN_BUSY 5
#define KVMPY_RUN_STOPPED 6
#define KVMPY_RUN_CLOSED 7
#define KVMPY_RUN_NO_TIMER 8
#define KVMPY_RUN_ERROR -1

struct kvmpy_vcpu *kvmpy_vcpu_new(int fd, void *run);
void kvmpy_vcpu_free(struct kvmpy_vcpu *v);
int kvmpy_vcpu_close(struct kvmpy_vcpu *v);
void kvmpy_vcpu_stop(struct kvmpy_vcpu *v);
int kvmpy_vcpu_run(struct kvmpy_vcpu *v, struct kvmpy_ran *ran);
void kvmpy_vcpu_deadline(struct kvmpy_vcpu *v, uint64_t timeout_ns);
int kvmpy_vcpu_kick(struct kvmpy_vcpu *v);
int kvmpy_run_init(void);
int kvmpy_kick_signal(void);
uint64_t kvmpy_monotonic_ns(void);
int kvmpy_fallocate(int fd, int mode, int64_t offset, int64_t length);
int kvmpy_map_over(void *place, uint64_t size, int fd, int64_t offset);
int kvmpy_map_keep(void *place, uint64_t size);
