/* SPDX-License-Identifier: Apache-2.0 */
/* userfaultfd: demand paging of guest memory by user space. */
struct uffdio_range {
	uint64_t start;
	uint64_t len;
};

struct uffdio_api {
	uint64_t api;
	uint64_t features;
	uint64_t ioctls;
};

struct uffdio_register {
	struct uffdio_range range;
	uint64_t mode;
	uint64_t ioctls;
};

struct uffdio_copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t copy;
};

struct uffdio_zeropage {
	struct uffdio_range range;
	uint64_t mode;
	int64_t zeropage;
};

struct uffdio_writeprotect {
	struct uffdio_range range;
	uint64_t mode;
};

struct uffdio_continue {
	struct uffdio_range range;
	uint64_t mode;
	int64_t mapped;
};

struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};

struct uffdio_move {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t move;
};

struct uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union uffd_msg__arg {
		struct uffd_msg__arg__pagefault {
			uint64_t flags;
			uint64_t address;
			union uffd_msg__arg__pagefault__feat {
				uint32_t ptid;
			} feat;
		} pagefault;
		struct uffd_msg__arg__fork {
			uint32_t ufd;
		} fork;
		struct uffd_msg__arg__remap {
			uint64_t from;
			uint64_t to;
			uint64_t len;
		} remap;
		struct uffd_msg__arg__remove {
			uint64_t start;
			uint64_t end;
		} remove;
		struct uffd_msg__arg__reserved {
			uint64_t reserved1;
			uint64_t reserved2;
			uint64_t reserved3;
		} reserved;
	} arg;
};
