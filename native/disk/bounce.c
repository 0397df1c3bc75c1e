/* SPDX-License-Identifier: Apache-2.0 */
#include "disk/bounce.h"

#include <sys/mman.h>

#define HUGE_PAGE (2u << 20)
#define POOL_SIZE (VMM_BOUNCE_BUFFERS * VMM_BOUNCE_SIZE)

/* Pages are the process's when they are first written; a host that gives no huge ones gives what it has. */
static bool map_buffers(struct vmm_bounce *bounce)
{
    uint8_t *map = mmap(NULL, POOL_SIZE + HUGE_PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED)
        return false;
    const size_t before = -(uintptr_t)map % HUGE_PAGE;
    if (before)
        munmap(map, before);
    munmap(map + before + POOL_SIZE, HUGE_PAGE - before); /* never nothing: before is less than a huge page */
    bounce->buffers = map + before;
    madvise(bounce->buffers, POOL_SIZE, MADV_HUGEPAGE);
    return true;
}

uint8_t *vmm_bounce_take(struct vmm_bounce *bounce, uint64_t size)
{
    const unsigned left = ~bounce->taken & ((1u << VMM_BOUNCE_BUFFERS) - 1);
    if (bounce->off || size < VMM_BOUNCE_LONG || !left || (!bounce->buffers && !map_buffers(bounce)))
        return NULL;
    const unsigned number = (unsigned)__builtin_ctz(left);
    bounce->taken |= 1u << number;
    return bounce->buffers + (size_t)number * VMM_BOUNCE_SIZE;
}

void vmm_bounce_give_back(struct vmm_bounce *bounce, uint8_t *buffer)
{
    if (buffer)
        bounce->taken &= ~(1u << ((size_t)(buffer - bounce->buffers) / VMM_BOUNCE_SIZE));
}

void vmm_bounce_deinit(struct vmm_bounce *bounce)
{
    if (bounce->buffers)
        munmap(bounce->buffers, POOL_SIZE);
    bounce->buffers = NULL;
}
