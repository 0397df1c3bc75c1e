/* SPDX-License-Identifier: Apache-2.0 */
/* The console: bytes between a guest's serial device and its readers on the host. */
#ifndef VMM_API_CONSOLE_H
#define VMM_API_CONSOLE_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/*
 * Two queues. Output is a log: the guest appends, host readers keep positions of their own and nothing is lost
 * while they are within `log_limit` bytes of the end. A reader that must not lose bytes registers as the pump
 * (vmm_console_set_pump): then the guest sees its transmitter busy while the pump is `high_water` behind. Input is
 * bounded: send takes what there is room for.
 */
typedef struct vmm_console vmm_console;
int vmm_console_create(size_t input_limit, size_t log_limit, size_t high_water, vmm_console **out);
void vmm_console_destroy(vmm_console *console); /* after every device that uses it */

/* Host side. Input: bytes taken. */
size_t vmm_console_send(vmm_console *console, const uint8_t *bytes, size_t n);
size_t vmm_console_input_room(vmm_console *console);
/* Output: copy from absolute position *position; if that is gone already, *position moves to the oldest kept. */
size_t vmm_console_read(vmm_console *console, uint64_t *position, uint8_t *bytes, size_t n);
uint64_t vmm_console_end(vmm_console *console); /* bytes ever written by the guest */
/* Wait until end() > position, closed, or the time is up (ms; -1: for ever). 1: there is more; 0: there is not. */
int vmm_console_wait(vmm_console *console, uint64_t position, int timeout_ms);
/* The same for event loops: an eventfd that turns readable once end() > position, or closed. One waiter: each call
 * forgets the one before. */
int vmm_console_await(vmm_console *console, uint64_t position);
/* The pump's position: everything before it has been written out. UINT64_MAX: no pump. */
void vmm_console_set_pump(vmm_console *console, uint64_t position);
/* eventfds: readable when output arrived past the pump's position; when input room opened after send took less. */
int vmm_console_output_fd(vmm_console *console);
int vmm_console_room_fd(vmm_console *console);
/* No more output will come: waiters return. Until it is opened again, for a machine that goes on. */
void vmm_console_close(vmm_console *console);
void vmm_console_reopen(vmm_console *console);
int vmm_console_closed(vmm_console *console);

/* Device side. put: 0 when the pump is too far behind (try again after on_room). get: -1 when there is none. */
int vmm_console_put(vmm_console *console, uint8_t byte);
int vmm_console_get(vmm_console *console);
/* Called (from the host's threads, outside locks) when input arrives, and when put would succeed again. */
void vmm_console_listen(vmm_console *console, void (*on_input)(void *opaque), void (*on_room)(void *opaque),
                        void *opaque);

/* cdef: end */

#endif
