/* SPDX-License-Identifier: Apache-2.0 */
/* Errors: what the last failing call on a thread was doing. */
#ifndef VMM_API_ERROR_H
#define VMM_API_ERROR_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* What the last failing call on this thread was doing, e.g. "KVM_CREATE_VM". Never NULL; valid until the next. */
const char *vmm_error_text(void);

/*
 * Where the -errno that the last failing call on this thread returned comes from: the same number is the host's answer
 * to a system call in one case (-ENOSPC: a full disk) and the library's own refusal in another (-ENOSPC: a limit).
 * UNTOLD: that call returned another number, and its text is not about `code`.
 */
enum vmm_error_source { VMM_ERROR_UNTOLD = 0, VMM_ERROR_REFUSED = 1, VMM_ERROR_HOST = 2 };
int vmm_error_source(int code);

/* cdef: end */

#endif
