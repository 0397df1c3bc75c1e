/* SPDX-License-Identifier: Apache-2.0 */
/* The 16550A. */
#ifndef VMM_API_UART_H
#define VMM_API_UART_H

#include "vmm/bus.h"
#include "vmm/console.h"
#include "vmm/line.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

typedef struct vmm_uart vmm_uart;
/* Eight byte-wide registers. line and console stay the caller's and outlive the uart. */
int vmm_uart_create(const vmm_line *line, vmm_console *console, vmm_uart **out);
void vmm_uart_destroy(vmm_uart *uart);
void vmm_uart_reset(vmm_uart *uart);
const vmm_device_ops *vmm_uart_ops(void); /* opaque is the vmm_uart */

/* Everything a 16550A remembers, as plain numbers. */
typedef struct vmm_uart_state {
    uint8_t ier, iir, fcr, lcr, mcr, lsr, msr, scr, dll, dlm;
    uint8_t thr_empty_pending, timeout_pending, rx_count, rx_trigger;
    uint8_t rx[16];
} vmm_uart_state;
void vmm_uart_save(vmm_uart *uart, vmm_uart_state *state);
int vmm_uart_load(vmm_uart *uart, const vmm_uart_state *state); /* -EINVAL: not a state a uart can be in */

/* cdef: end */

#endif
