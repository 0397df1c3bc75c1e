/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_TIME_LAZY_H
#define VMM_TIME_LAZY_H

#include "core/core.h"
#include "vmmlazy.h"

/* Ends the thread; who waits for a page finds zeros. NULL is fine. */
void vmm_lazy_destroy(struct vmm_lazy *lazy);

#endif
