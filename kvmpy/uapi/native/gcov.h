int64_t kvmpy_gcov_collect(const char *const *paths, uint32_t count, void *buffer, uint64_t size, void *out, uint64_t max);
