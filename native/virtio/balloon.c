/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory balloon (virtio 1.2, 5.5).
 *
 * No request is kept between two calls: a buffer that takes longer than a turn is given back to its ring with
 * `progress` saying how far it is, and the statistics buffer stays in its ring, parsed, until it is asked for.
 */
#include "vmmballoon.h"

#include "base/thread.h"
#include "virtio/virtio.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_SHIFT 12
#define PAGE (1u << PAGE_SHIFT)

enum { QUEUES = 5, QUEUE_SIZE = 128 };
enum { F_STATS_VQ = 1, F_DEFLATE_ON_OOM = 2, F_PAGE_REPORTING = 5 };

/*
 * Work of one turn on the I/O thread: a chain may hold a thousand million page numbers, at a microsecond or more each,
 * and the machine's other devices must not wait for that. Linux sends 256 at a time, and reports 128 MiB.
 */
#define TURN_NUMBERS 2048u
#define TURN_REPORTED (256ull << 20)

/* virtio 1.2, 5.5.4 */
struct config {
    uint32_t num_pages, actual, free_page_hint_cmd_id, poison_val;
};
_Static_assert(sizeof(struct config) == 16, "virtio 1.2, 5.5.4");

struct statistic { /* virtio 1.2, 5.5.6.3 */
    uint16_t tag;
    uint64_t value;
} __attribute__((packed));
enum { STATISTICS = 16, STATISTICS_MAX = 64 }; /* tags known here; entries looked at, should tags repeat */

struct vmm_balloon {
    struct vmm_virtio virtio;
    vmm_balloon_info info;
    uint64_t progress[QUEUES];
    uint32_t turn_numbers;
    uint64_t turn_reported;
    vmm_balloon_memory memory;
    pthread_cond_t answered; /* with the device's lock */
};

static void look_again(struct vmm_balloon *balloon, unsigned queue)
{
    vmm_virtqueue_ring(&balloon->virtio.queues[queue]);
}

/* ---- giving memory back ---- */

/* The region whose bytes may be punched out, as the guest may write them; NULL: there is none at that place. */
static const struct vmm_region *ram_at(const struct vmm_vm *vm, const uint8_t *host)
{
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        const struct vmm_region *r = &vm->regions[i];
        if (host >= r->host && (size_t)(host - r->host) < r->size)
            return r->flags & VMM_MEMORY_READONLY ? NULL : r;
    }
    return NULL;
}

static bool is_ram(const struct vmm_vm *vm, const uint8_t *host)
{
    return ram_at(vm, host) != NULL;
}

/* Whole pages of RAM. Of private memory our own pages go, and what is found next is the file's. */
static void release(struct vmm_balloon *balloon, uint8_t *host, size_t size)
{
    const struct vmm_region *r = ram_at(balloon->virtio.vm, host);
    const int how = r && r->flags & VMM_MEMORY_PRIVATE ? MADV_DONTNEED : MADV_REMOVE;
    if (madvise(host, size, how) == 0)
        balloon->info.released += size >> PAGE_SHIFT;
    else
        balloon->info.refused += size >> PAGE_SHIFT;
    vmm_vm_wrote(balloon->virtio.vm, host, size); /* it has other content now */
}

struct run {
    uint8_t *first;
    size_t size;
};

/* Numbers come from a free list, often in a row, upwards or downwards: one call into the host for a row. */
static bool extend(struct run *run, uint8_t *page)
{
    if (page == run->first + run->size) {
        run->size += PAGE;
        return true;
    }
    if (run->size && page + PAGE == run->first) {
        run->first = page;
        run->size += PAGE;
        return true;
    }
    return false;
}

static void release_numbers(struct vmm_balloon *balloon, const uint32_t *numbers, size_t n)
{
    struct run run = {0};
    for (size_t i = 0; i < n; i++) {
        uint8_t *page = vmm_vm_gpa(balloon->virtio.vm, (uint64_t)le32toh(numbers[i]) << PAGE_SHIFT, PAGE);
        if (!page || !is_ram(balloon->virtio.vm, page)) {
            balloon->info.refused++;
            continue;
        }
        if (run.size && extend(&run, page))
            continue;
        if (run.size)
            release(balloon, run.first, run.size);
        run = (struct run){page, PAGE};
    }
    if (run.size)
        release(balloon, run.first, run.size);
}

/* ---- the queues ---- */

/* The buffer is worked off, or this turn is over: then the next one is asked for, and goes on where this ended. */
static uint32_t finish(struct vmm_balloon *balloon, unsigned queue, uint64_t size)
{
    if (balloon->progress[queue] < size) {
        look_again(balloon, queue);
        return VMM_SERVE_LATER;
    }
    balloon->progress[queue] = 0;
    return 0;
}

static uint32_t inflate(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    struct vmm_balloon *balloon = opaque;
    uint32_t numbers[256];
    /* Where no whole number begins any more; a loaded position may be odd, and four bytes from it must be there. */
    const uint64_t size = chain->out_size > 3 ? chain->out_size - 3 : 0;
    uint64_t *at = &balloon->progress[queue];
    while (*at < size && balloon->turn_numbers > 0) {
        size_t n = sizeof numbers / 4 < balloon->turn_numbers ? sizeof numbers / 4 : balloon->turn_numbers;
        n = vmm_chain_read(chain, *at, numbers, n * 4) / 4;
        release_numbers(balloon, numbers, n);
        *at += n * 4;
        balloon->turn_numbers -= (uint32_t)n;
        balloon->info.inflated += n;
    }
    return finish(balloon, queue, size);
}

/* F_MUST_TELL_HOST is not offered: the guest may be using these pages already, and nothing is left to do. */
static uint32_t deflate(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    struct vmm_balloon *balloon = opaque;
    (void)queue;
    balloon->info.deflated += chain->out_size / 4;
    return 0;
}

/* Free page reporting (virtio 1.2, 5.5.6.7): the device-writable part is the free memory itself. */
static uint32_t report(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    struct vmm_balloon *balloon = opaque;
    struct iovec pieces[VMM_CHAIN_PIECES];
    uint64_t *at = &balloon->progress[queue];
    const unsigned n = vmm_chain_slice(chain, true, *at, balloon->turn_reported, pieces);
    for (unsigned i = 0; i < n; i++) {
        const uintptr_t from = (uintptr_t)pieces[i].iov_base, to = from + pieces[i].iov_len;
        const uintptr_t first = (from + PAGE - 1) & ~(uintptr_t)(PAGE - 1),
                        last = to & ~(uintptr_t)(PAGE - 1);
        if (first < last && is_ram(balloon->virtio.vm, (uint8_t *)first)) /* part of a page may be in use */
            release(balloon, (uint8_t *)first, last - first);
        balloon->info.reported += pieces[i].iov_len >> PAGE_SHIFT;
        *at += pieces[i].iov_len;
        balloon->turn_reported -= pieces[i].iov_len;
    }
    return finish(balloon, queue, chain->in_size);
}

/*
 * The driver offers one buffer and fills another when that comes back (virtio 1.2, 5.5.6.3): it is read here and
 * returned by vmm_balloon_ask.
 */
static void read_statistics(struct vmm_balloon *balloon, unsigned queue)
{
    struct vmm_queue *ring = &balloon->virtio.queues[queue].ring;
    const struct vmm_queue_mark mark = vmm_queue_mark(ring);
    struct vmm_chain chain;
    if (vmm_virtio_pop(&balloon->virtio, queue, &chain) != 1)
        return;
    struct statistic entries[STATISTICS_MAX];
    const size_t n = vmm_chain_read(&chain, 0, entries, sizeof entries) / sizeof entries[0];
    balloon->memory.present = 0;
    for (size_t i = 0; i < n; i++) {
        const uint16_t tag = le16toh(entries[i].tag);
        if (tag < STATISTICS) {
            balloon->memory.value[tag] = le64toh(entries[i].value);
            balloon->memory.present |= 1u << tag;
        }
    }
    balloon->memory.updates++;
    vmm_queue_rewind(ring, mark);
    pthread_cond_broadcast(&balloon->answered);
}

/*
 * Which queue is which. virtio 1.2, 5.5.2 numbers them inflate, deflate, statistics, free page hints, reporting; Linux
 * leaves no gaps for features that were not agreed. Hints never are, so that 4 is reporting for the one, 3 or 2 for
 * the other.
 */
enum role { INFLATE, DEFLATE, MEMORY, REPORT };
static enum role role_of(const struct vmm_balloon *balloon, uint32_t queue)
{
    if (queue < 2)
        return queue == 0 ? INFLATE : DEFLATE;
    return queue == 2 && vmm_virtio_has(&balloon->virtio, F_STATS_VQ) ? MEMORY : REPORT;
}

static void kick(void *opaque, uint32_t queue)
{
    struct vmm_balloon *balloon = opaque;
    balloon->turn_numbers = TURN_NUMBERS;
    balloon->turn_reported = TURN_REPORTED;
    switch (role_of(balloon, queue)) {
    case INFLATE:
        return vmm_virtio_serve(&balloon->virtio, queue, inflate);
    case DEFLATE:
        return vmm_virtio_serve(&balloon->virtio, queue, deflate);
    case MEMORY:
        return read_statistics(balloon, queue);
    case REPORT:
        if (vmm_virtio_has(&balloon->virtio, F_PAGE_REPORTING))
            vmm_virtio_serve(&balloon->virtio, queue, report);
    }
}

static void stop(void *opaque)
{
    struct vmm_balloon *balloon = opaque;
    memset(balloon->progress, 0, sizeof balloon->progress);
    balloon->memory = (vmm_balloon_memory){.updates = balloon->memory.updates};
    pthread_cond_broadcast(&balloon->answered);
}

static void forget(void *opaque, uint32_t queue)
{
    ((struct vmm_balloon *)opaque)->progress[queue] = 0;
}

/* The target, and how far the oldest buffer of each queue is worked off, in bytes. */
enum own { OWN_TARGET, OWN_PROGRESS, OWN_END = OWN_PROGRESS + QUEUES };
_Static_assert((int)OWN_END <= (int)VMM_VIRTIO_OWN, "all of it is saved");

static void save(void *opaque, uint64_t *own)
{
    const struct vmm_balloon *balloon = opaque;
    own[OWN_TARGET] = balloon->info.target;
    memcpy(own + OWN_PROGRESS, balloon->progress, sizeof balloon->progress);
}

static int load(void *opaque, const uint64_t *own)
{
    struct vmm_balloon *balloon = opaque;
    for (unsigned i = 0; i < QUEUES; i++)
        if (own[OWN_PROGRESS + i] > UINT32_MAX) /* a chain is shorter */
            return vmm_error_set(-EINVAL, "%s: %llu bytes into a buffer", balloon->virtio.name,
                                 (unsigned long long)own[OWN_PROGRESS + i]);
    const int rc = vmm_balloon_set_target(balloon, own[OWN_TARGET] < UINT32_MAX ? (uint32_t)own[OWN_TARGET]
                                                                                : UINT32_MAX);
    if (rc == 0)
        memcpy(balloon->progress, own + OWN_PROGRESS, sizeof balloon->progress);
    return rc;
}

static const vmm_virtio_ops ops = {.kick = kick, .stop = stop, .forget = forget, .save = save, .load = load};

/* ---- the host's side ---- */

int vmm_balloon_create(vmm_vm *vm, const char *name, uint32_t flags, vmm_balloon **out)
{
    for (uint32_t i = 0; i < vm->n_regions; i++)
        if (vm->regions[i].flags & VMM_MEMORY_HUGE_2M)
            return vmm_error_set(-ENOTSUP, "%s: memory in pages of 2 MiB", name);
    struct vmm_balloon *balloon = calloc(1, sizeof *balloon);
    if (!balloon)
        return vmm_error_set(-ENOMEM, "%s", name);
    const uint64_t features = (flags & VMM_BALLOON_STATISTICS ? 1u << F_STATS_VQ : 0) |
                              (flags & VMM_BALLOON_DEFLATE_ON_OOM ? 1u << F_DEFLATE_ON_OOM : 0) |
                              (flags & VMM_BALLOON_REPORTING ? 1u << F_PAGE_REPORTING : 0);
    const uint16_t sizes[QUEUES] = {QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE};
    const int rc = vmm_virtio_init(&balloon->virtio, vm, &ops, balloon, 5, name, features, QUEUES, sizes,
                                   sizeof(struct config));
    if (rc < 0) {
        free(balloon);
        return rc;
    }
    balloon->virtio.writable_at = offsetof(struct config, actual);
    balloon->virtio.writable_size = sizeof(uint32_t);
    vmm_cond_init(&balloon->answered);
    *out = balloon;
    return 0;
}

void vmm_balloon_destroy(vmm_balloon *balloon)
{
    if (!balloon)
        return;
    vmm_virtio_deinit(&balloon->virtio);
    pthread_cond_destroy(&balloon->answered);
    free(balloon);
}

vmm_virtio *vmm_balloon_virtio(vmm_balloon *balloon)
{
    return &balloon->virtio;
}

int vmm_balloon_set_target(vmm_balloon *balloon, uint32_t pages)
{
    VMM_VIRTIO_LOCKED(&balloon->virtio);
    const struct vmm_vm *vm = balloon->virtio.vm;
    uint64_t ram = 0;
    for (uint32_t i = 0; i < vm->n_regions; i++)
        ram += vm->regions[i].flags & VMM_MEMORY_READONLY ? 0 : vm->regions[i].size >> PAGE_SHIFT;
    if (pages > ram)
        return vmm_error_set(-EINVAL, "%s: %u pages of %llu", balloon->virtio.name, pages,
                             (unsigned long long)ram);
    balloon->info.target = pages;
    const uint32_t num_pages = htole32(pages);
    vmm_virtio_set_config(&balloon->virtio, offsetof(struct config, num_pages), &num_pages, sizeof num_pages);
    return 0;
}

void vmm_balloon_get_info(vmm_balloon *balloon, vmm_balloon_info *info)
{
    VMM_VIRTIO_LOCKED(&balloon->virtio);
    uint32_t actual;
    memcpy(&actual, balloon->virtio.config + offsetof(struct config, actual), sizeof actual);
    *info = balloon->info;
    info->actual = le32toh(actual);
}

int vmm_balloon_ask(vmm_balloon *balloon, uint32_t timeout_ms, vmm_balloon_memory *memory)
{
    struct vmm_virtio *dev = &balloon->virtio;
    const unsigned queue = 2;
    const struct timespec deadline = vmm_deadline(timeout_ms > INT_MAX ? INT_MAX : (int)timeout_ms);
    VMM_VIRTIO_LOCKED(dev);
    const uint64_t before = balloon->memory.updates;
    struct vmm_chain chain;
    if (dev->running && vmm_virtio_has(dev, F_STATS_VQ) && vmm_virtio_pop(dev, queue, &chain) == 1) {
        vmm_queue_push(&dev->queues[queue].ring, &chain, 0);
        vmm_virtio_publish(dev, queue);
        if (vmm_queue_arm(&dev->queues[queue].ring))
            read_statistics(balloon, queue);
    }
    int error = 0;
    while (dev->running && vmm_virtio_has(dev, F_STATS_VQ) && balloon->memory.updates == before && error == 0)
        error = pthread_cond_timedwait(&balloon->answered, &dev->lock, &deadline);
    *memory = balloon->memory;
    if (balloon->memory.updates != before)
        return 0;
    return error ? vmm_error_set(-ETIMEDOUT, "%s: no statistics from the guest", dev->name)
                 : vmm_error_set(-ENOTSUP, "%s: no driver that gives statistics", dev->name);
}
