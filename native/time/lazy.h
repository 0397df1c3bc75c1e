/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_TIME_LAZY_H
#define VMM_TIME_LAZY_H

#include "core/core.h"
#include "vmmlazy.h"

/* Stop the thread; pending faults resolve to zero pages. NULL is allowed. */
void vmm_lazy_destroy(struct vmm_lazy *lazy);

#endif
