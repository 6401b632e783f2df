size_t kvmpy_dirty_scan(const void *bitmap, uint64_t npages, uint32_t *out, size_t max);
uint64_t kvmpy_dirty_count(const void *bitmap, uint64_t npages);
uint32_t kvmpy_dirty_harvest(void *ring, uint32_t entries, uint32_t index, uint32_t *slots, uint32_t *offsets, uint32_t max);
