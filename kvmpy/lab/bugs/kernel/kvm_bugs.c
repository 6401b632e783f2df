// SPDX-License-Identifier: GPL-2.0-only
/* kvm.bugs: the numbers of the bugs that are switched on, such as 3 or 3,17-19; 0 for none. */
#include <linux/bitmap.h>
#include <linux/export.h>
#include <linux/kvm_types.h>
#include <linux/kvm_bugs.h>
#include <linux/moduleparam.h>

unsigned long kvm_bugs[KVM_BUGS / BITS_PER_LONG] __read_mostly;
#ifdef EXPORT_SYMBOL_FOR_KVM_INTERNAL
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_bugs);
#endif

static int kvm_bugs_set(const char *text, const struct kernel_param *parameter)
{
	DECLARE_BITMAP(wanted, KVM_BUGS);
	int i, error = bitmap_parselist(text, wanted, KVM_BUGS);

	if (error)
		return error;
	__clear_bit(0, wanted);
	for (i = 0; i < BITS_TO_LONGS(KVM_BUGS); i++)
		WRITE_ONCE(kvm_bugs[i], wanted[i]);
	return 0;
}

static int kvm_bugs_get(char *text, const struct kernel_param *parameter)
{
	if (bitmap_empty(kvm_bugs, KVM_BUGS))
		return sysfs_emit(text, "0\n");
	return sysfs_emit(text, "%*pbl\n", KVM_BUGS, kvm_bugs);
}

static const struct kernel_param_ops kvm_bugs_ops = {
	.set = kvm_bugs_set,
	.get = kvm_bugs_get,
};
module_param_cb(bugs, &kvm_bugs_ops, NULL, 0644);
