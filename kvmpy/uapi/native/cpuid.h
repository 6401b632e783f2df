void kvmpy_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *out);
