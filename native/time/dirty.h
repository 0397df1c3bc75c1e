/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_TIME_DIRTY_H
#define VMM_TIME_DIRTY_H

#include "core/core.h"

/*
 * Fetch, then call `copy_back` for every page that is dirty in this log, which has it clean from then on. To every other
 * log these pages were written. Returns how many. The machine is paused.
 */
int64_t vmm_dirty_undo(vmm_dirty *log, void (*copy_back)(void *opaque, uint32_t region, uint64_t page),
                       void *opaque);

#endif
