/* SPDX-License-Identifier: Apache-2.0 */
/* Record why a call failed, per thread, for vmm_error_text() and vmm_error_source(). Each returns `rc`. */
#ifndef VMM_BASE_ERROR_H
#define VMM_BASE_ERROR_H

/* The library's own refusal. */
int vmm_error_set(int rc, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A system call's failure; vmm_error_errno: with -errno. */
int vmm_error_host(int rc, const char *format, ...) __attribute__((format(printf, 2, 3)));
int vmm_error_errno(const char *what);

#endif
