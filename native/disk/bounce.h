/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Buffers of the monitor's own for long O_DIRECT transfers.
 *
 * Guest memory is pages of 4 KiB that lie anywhere in the host's, so 1 MiB of it is up to 256 pieces for the host's
 * disk. Measured on a virtio disk, reads of 1 MiB: 0.8 GB/s into scattered pages, 2.0 into the same number of pages in a
 * row, 2.6 into a huge page, and 2.4 into a huge page with a copy from there; in CPU time the copy is no dearer than
 * the pieces.
 */
#ifndef VMM_DISK_BOUNCE_H
#define VMM_DISK_BOUNCE_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VMM_BOUNCE_LONG (256u << 10) /* bytes: shorter transfers are not worth it */
#define VMM_BOUNCE_SIZE (1u << 20)   /* of a buffer */
#define VMM_BOUNCE_BUFFERS 8u        /* of a disk: 8 MiB, once there was a long transfer */

struct vmm_bounce {
    bool off;         /* guest memory is in huge pages itself */
    uint8_t *buffers; /* NULL: none yet */
    unsigned taken;   /* bit by buffer */
};

/* For a transfer of `size` bytes, of which VMM_BOUNCE_SIZE fit. NULL: it goes straight; all are taken, say. */
uint8_t *vmm_bounce_take(struct vmm_bounce *bounce, uint64_t size);
void vmm_bounce_give_back(struct vmm_bounce *bounce, uint8_t *buffer); /* NULL is fine */
void vmm_bounce_deinit(struct vmm_bounce *bounce);                     /* none is taken */

#endif
