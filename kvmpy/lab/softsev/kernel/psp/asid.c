// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the ASIDs of all guests (SEV API, chapter 5). An ASID is allocated by ACTIVATE, in use once its guest
 * runs, dirty when such a guest has left it, and clean again after a DF_FLUSH.
 */
#include <linux/kernel.h>
#include "psp.h"

static struct {
	u64 owner;
	enum softsev_asid state;
} asids[SOFTSEV_ASID_MAX + 1];

/**
 * softsev_asid_take() - bind an ASID to a guest
 * @asid: what the hypervisor chose
 * @user: the guest
 *
 * The order of the checks is that of the firmware's mcmd_activate_common().
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_asid_take(u32 asid, const struct softsev_asid_user *user)
{
	if (!asid || asid > SOFTSEV_ASID_MAX)
		return SEV_RET_INVALID_ASID;
	if (asids[asid].state == ASID_ALLOCATED || asids[asid].state == ASID_IN_USE)
		return SEV_RET_ASID_OWNED;
	if (user->bound)
		return SEV_RET_ACTIVE;
	if (user->sent)
		return SEV_RET_INVALID_GUEST_STATE;
	if (asids[asid].state == ASID_DIRTY)
		return SEV_RET_DFFLUSH_REQUIRED;
	if (user->es != (asid < SOFTSEV_ASID_MIN_SEV))
		return SEV_RET_INVALID_ASID;
	asids[asid].owner = user->owner;
	asids[asid].state = user->running ? ASID_IN_USE : ASID_ALLOCATED;
	return SEV_RET_SUCCESS;
}

/**
 * softsev_asid_run() - the launch of the guest that has this ASID is over
 * @asid: its ASID, or 0 when it has none
 */
void softsev_asid_run(u32 asid)
{
	if (asid)
		asids[asid].state = ASID_IN_USE;
}

/**
 * softsev_asid_release() - take the ASID from its guest: dirty if the guest may have run with it
 * @asid: its ASID, or 0 when it has none
 * @owner: the guest
 */
void softsev_asid_release(u32 asid, u64 owner)
{
	if (!asid || asid > SOFTSEV_ASID_MAX || asids[asid].owner != owner)
		return;
	asids[asid].owner = 0;
	asids[asid].state = asids[asid].state == ASID_IN_USE ? ASID_DIRTY : ASID_CLEAN;
}

/**
 * softsev_asid_flush() - what DF_FLUSH does, after a WBINVD on every core
 */
void softsev_asid_flush(void)
{
	int i;

	for (i = 0; i <= SOFTSEV_ASID_MAX; i++)
		if (asids[i].state == ASID_DIRTY)
			asids[i].state = ASID_CLEAN;
}

/**
 * softsev_asid_reset() - nobody knows what the caches hold when the platform is initialised
 */
void softsev_asid_reset(void)
{
	memset(asids, 0, sizeof(asids));
}

/**
 * softsev_asid_all_clean() - whether no ASID is bound, or in need of a DF_FLUSH
 *
 * Return: true when SNP may be shut down.
 */
bool softsev_asid_all_clean(void)
{
	int i;

	for (i = 1; i <= SOFTSEV_ASID_MAX; i++)
		if (asids[i].state != ASID_CLEAN)
			return false;
	return true;
}
