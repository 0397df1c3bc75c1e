/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a device may ask of a console beyond vmmcore.h.
 *
 * A serial device owns two small FIFOs that its driver can see. Neither is kept apart from the console's
 * queues: bytes a transmit FIFO still holds are in the log already (put_late), and bytes that leave a receive
 * FIFO unread go back to the head of the input (unget). So a device's state never contains bytes that only it
 * has.
 */
#ifndef VMM_DEVICES_CONSOLE_H
#define VMM_DEVICES_CONSOLE_H

#include "vmmcore.h"

/* The deepest FIFO of any device here: put_late and unget go this far beyond the console's own limits. */
#define VMM_CONSOLE_SLACK 16u

/* put and get, many bytes at a time; both answer how many. Fewer written than given: on_room will be called. */
size_t vmm_console_write(vmm_console *console, const uint8_t *bytes, size_t n);
size_t vmm_console_take(vmm_console *console, uint8_t *bytes, size_t n);

/* Log a byte that put refused: the device's FIFO had taken it. The caller bounds these to SLACK until
 * on_room. */
void vmm_console_put_late(vmm_console *console, uint8_t byte);

/* Would put succeed? If not, on_room will be called when it would. */
int vmm_console_ready(vmm_console *console);

/* Give back the newest n <= SLACK bytes that get answered; they will be got again, before all others. */
void vmm_console_unget(vmm_console *console, const uint8_t *bytes, size_t n);

#endif
