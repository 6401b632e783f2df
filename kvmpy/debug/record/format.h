/* SPDX-License-Identifier: Apache-2.0 */
/* Written by `python -m kvmpy.gen`: do not edit. From kvmpy.debug.record.format and kvmpy.debug.record.events; docs/record.md says what the fields mean. */
#ifndef KVMPY_RECORD_FORMAT_H
#define KVMPY_RECORD_FORMAT_H

#include <stdint.h>

#define KVMPY_REC_MAJOR 1
#define KVMPY_REC_MINOR 0
#define KVMPY_REC_X86_64 62
#define KVMPY_REC_PAGE_SIZE 4096
#define KVMPY_REC_FRAME_MAGIC 0x524d564b
#define KVMPY_REC_MAX_PAYLOAD 67108864

#define KVMPY_REC_CHECKED_FROM 8

#define KVMPY_REC_SYNTHETIC 1
#define KVMPY_REC_CUT 1
#define KVMPY_REC_MAP_SHARED 1
#define KVMPY_REC_MAP_HUGETLB 2
#define KVMPY_REC_MAP_THP 4
#define KVMPY_REC_MAP_NO_THP 8
#define KVMPY_REC_MAP_NO_READ 16
#define KVMPY_REC_MAP_NO_WRITE 32
#define KVMPY_REC_MEMORY_INITIAL 1
#define KVMPY_REC_KICK_IMMEDIATE_EXIT 1
#define KVMPY_REC_KICK_SIGNAL 2
#define KVMPY_REC_FILE_FALLOCATE 1
#define KVMPY_REC_FILE_FTRUNCATE 2
#define KVMPY_REC_FILE_MADVISE 3
#define KVMPY_REC_EVENT_WRITTEN 1
#define KVMPY_REC_EVENT_READ 2
#define KVMPY_REC_CODEC_RAW 0
#define KVMPY_REC_CODEC_ZLIB 1

#define KVMPY_REC_HOST 1
#define KVMPY_REC_THREAD 2
#define KVMPY_REC_OBJECT 3
#define KVMPY_REC_CLOSE 4
#define KVMPY_REC_IOCTL 5
#define KVMPY_REC_ENTER 6
#define KVMPY_REC_MAP 7
#define KVMPY_REC_UNMAP 8
#define KVMPY_REC_PAGES 9
#define KVMPY_REC_MEMORY 10
#define KVMPY_REC_WRITE 11
#define KVMPY_REC_KICK 12
#define KVMPY_REC_DEADLINE 13
#define KVMPY_REC_FILE 14
#define KVMPY_REC_EVENT 15
#define KVMPY_REC_NOTE 16
#define KVMPY_REC_END 17
#define KVMPY_REC_LOST 18

#define KVMPY_REC_KIND_SYSTEM 1
#define KVMPY_REC_KIND_VM 2
#define KVMPY_REC_KIND_VCPU 3
#define KVMPY_REC_KIND_DEVICE 4
#define KVMPY_REC_KIND_GMEM 5
#define KVMPY_REC_KIND_STATS 6
#define KVMPY_REC_KIND_SEV 7
#define KVMPY_REC_KIND_UFFD 8
#define KVMPY_REC_KIND_EVENTFD 9
#define KVMPY_REC_KIND_MEMFD 10
#define KVMPY_REC_KIND_OTHER 11

#define KVMPY_REC_WHEN_IN 1
#define KVMPY_REC_WHEN_OUT 2
#define KVMPY_REC_WHEN_BOTH 3

#define KVMPY_REC_WHAT_ARGUMENT 0
#define KVMPY_REC_WHAT_NESTED 1
#define KVMPY_REC_WHAT_RUN 2

struct kvmpy_rec_file_header {
	uint8_t magic[8];
	uint16_t major;
	uint16_t minor;
	uint32_t arch;
	uint32_t page_size;
	uint32_t flags;
	uint32_t reserved;
	uint32_t crc;
};

struct kvmpy_rec_frame {
	uint32_t magic;
	uint32_t crc;
	uint32_t length;
	uint16_t type;
	uint16_t flags;
	uint32_t tid;
	uint32_t pid;
	uint64_t order;
	uint64_t time_ns;
};

struct kvmpy_rec_thread {
	uint32_t tid;
	uint32_t pid;
	uint32_t ppid;
	uint32_t reserved;
};

struct kvmpy_rec_object {
	uint32_t id;
	uint32_t parent;
	int32_t fd;
	uint32_t kind;
	uint64_t made_by;
};

struct kvmpy_rec_close {
	uint32_t object;
	uint32_t reserved;
};

struct kvmpy_rec_ioctl {
	uint32_t object;
	int32_t fd;
	uint64_t request;
	uint64_t arg;
	int64_t result;
	uint32_t error;
	uint16_t chunks;
	uint16_t reserved;
	uint64_t end_order;
	uint64_t end_ns;
};

struct kvmpy_rec_chunk {
	uint64_t address;
	uint32_t length;
	uint8_t when;
	uint8_t what;
	uint16_t flags;
};

struct kvmpy_rec_map {
	uint64_t address;
	uint64_t length;
	uint64_t offset;
	uint32_t object;
	uint32_t flags;
};

struct kvmpy_rec_pages {
	uint32_t first;
	uint32_t count;
	uint32_t codec;
	uint32_t stored;
};

struct kvmpy_rec_memory {
	uint64_t address;
	uint32_t count;
	uint32_t flags;
};

struct kvmpy_rec_write {
	uint64_t address;
};

struct kvmpy_rec_kick {
	uint32_t object;
	uint32_t how;
	uint32_t signal;
	uint32_t tid;
};

struct kvmpy_rec_deadline {
	uint32_t object;
	uint32_t reserved;
	uint64_t ns;
};

struct kvmpy_rec_file {
	uint32_t object;
	uint32_t call;
	uint64_t mode;
	uint64_t offset;
	uint64_t length;
	int64_t result;
	uint32_t error;
	uint32_t reserved;
};

struct kvmpy_rec_event {
	uint32_t object;
	uint32_t what;
	uint64_t value;
};

struct kvmpy_rec_end {
	uint64_t frames;
};

struct kvmpy_rec_lost {
	uint64_t frames;
};

#endif
