/* SPDX-License-Identifier: Apache-2.0 */
/* The entropy device (virtio 1.2, 5.4): every buffer is filled from the host's random number generator. */
#include "virtio/virtio.h"
#include "vmmrng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#define DEVICE_ID 4
#define QUEUE_SIZE 64
/* A guest that asks for more gets this much (5.4.6.1 allows less); a turn on the I/O thread ends where another would not fit. */
#define REQUEST_MAX 65536u
#define TURN (4 * REQUEST_MAX)

struct vmm_rng {
    struct vmm_virtio virtio;
    uint32_t turn; /* bytes left of it */
};

static uint32_t fill(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    struct vmm_rng *rng = opaque;
    uint32_t filled = 0;
    if (rng->turn < REQUEST_MAX) {
        vmm_virtqueue_ring(&rng->virtio.queues[queue]);
        return VMM_SERVE_LATER;
    }
    for (unsigned i = 0; i < chain->n_in && filled < REQUEST_MAX; i++) {
        const struct iovec *piece = &chain->iov[chain->n_out + i];
        size_t want = piece->iov_len < REQUEST_MAX - filled ? piece->iov_len : REQUEST_MAX - filled;
        ssize_t got = getrandom(piece->iov_base, want, 0); /* never fails once the host has booted */
        if (got < 0)
            break;
        filled += (uint32_t)got;
        if ((size_t)got < want)
            break;
    }
    rng->turn -= filled;
    return filled;
}

static void kick(void *opaque, uint32_t queue)
{
    struct vmm_rng *rng = opaque;
    rng->turn = TURN;
    vmm_virtio_serve(&rng->virtio, queue, fill);
}

int vmm_rng_create(vmm_vm *vm, const char *name, vmm_rng **out)
{
    static const vmm_virtio_ops ops = {.kick = kick};
    static const uint16_t sizes[] = {QUEUE_SIZE};
    struct vmm_rng *rng = calloc(1, sizeof(*rng));
    if (!rng)
        return vmm_error_set(-ENOMEM, "%s", name);
    int rc = vmm_virtio_init(&rng->virtio, vm, &ops, rng, DEVICE_ID, name, 0, 1, sizes, 0);
    if (rc < 0) {
        free(rng);
        return rc;
    }
    *out = rng;
    return 0;
}

vmm_virtio *vmm_rng_virtio(vmm_rng *rng)
{
    return &rng->virtio;
}

void vmm_rng_destroy(vmm_rng *rng)
{
    if (!rng)
        return;
    vmm_virtio_deinit(&rng->virtio);
    free(rng);
}
