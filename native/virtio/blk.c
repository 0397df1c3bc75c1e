/* SPDX-License-Identifier: Apache-2.0 */
/* The block device (virtio 1.2, 5.2): requests, on the I/O thread, and the life of the device. */
#include "virtio/blk_device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define DEVICE_ID 2
#define QUEUE_SIZE 256
#define POOL VMM_HOST_IO_DEPTH /* requests under way; the others wait in their rings */

/* A turn on the I/O thread: so many requests, or bytes (a millisecond from the page cache); then others have theirs. */
#define TURN_REQUESTS 1024
#define TURN_BYTES (32u << 20)
#define TURN_POLLS 64
/* The driver sees what is done after so many requests or bytes of a turn, and can work on it meanwhile. */
#define SHOWN_REQUESTS 8
#define SHOWN_BYTES (128u << 10)

enum {
    F_SEG_MAX = 2,
    F_RO = 5,
    F_BLK_SIZE = 6,
    F_FLUSH = 9,
    F_TOPOLOGY = 10,
    F_CONFIG_WCE = 11,
    F_MQ = 12,
    F_DISCARD = 13,
    F_WRITE_ZEROES = 14,
};
#define BIT(feature) (1ull << (feature))

/* ---- requests ---- */

static struct vmm_blk_job *take_free(struct vmm_blk *blk)
{
    struct vmm_blk_job *r = blk->free;
    if (r)
        blk->free = r->next_free;
    else if (blk->n_used < POOL)
        r = &blk->pool[blk->n_used++];
    return r;
}

static void give_back(struct vmm_blk *blk, struct vmm_blk_job *r)
{
    r->next_free = blk->free;
    blk->free = r;
}

/*
 * For dirty logs, all that may have been filled: the status lies beyond what `written` counts if data are missing
 * before it, and so do the bytes of a read that failed on the way.
 */
static void filled(const struct vmm_blk_job *r)
{
    for (unsigned i = 0; i < r->chain.n_in; i++) {
        const struct iovec *piece = &r->chain.iov[r->chain.n_out + i];
        vmm_vm_wrote(r->blk->virtio.vm, piece->iov_base, piece->iov_len);
    }
}

/* The driver's part is over: what the used ring is to say was written, and what happened, counted. */
static void answer(struct vmm_blk_job *r, enum vmm_blk_status status, uint64_t data_in)
{
    struct vmm_blk *blk = r->blk;
    vmm_blk_stats *stats = &blk->stats[r->queue];
    *r->status = (uint8_t)status;
    filled(r);
    if (status != VMM_BLK_OK)
        (*(status == VMM_BLK_UNSUPP ? &stats->unsupported : &stats->errors))++;
    /* `written` counts from the first byte on: the status is a part of it only if everything before it is. */
    const uint32_t written = (uint32_t)(data_in == r->chain.in_size - 1 ? data_in + 1 : data_in);
    vmm_queue_push(&blk->virtio.queues[r->queue].ring, &r->chain, written);
    blk->pushed |= 1u << r->queue;
    give_back(blk, r);
}

static void count(struct vmm_blk_job *r)
{
    vmm_blk_stats *stats = &r->blk->stats[r->queue];
    switch (r->parsed.type) {
    case VMM_BLK_IN:
        stats->reads++;
        stats->bytes_read += r->io.finished;
        break;
    case VMM_BLK_OUT:
        stats->writes++;
        stats->bytes_written += r->io.finished;
        break;
    case VMM_BLK_FLUSH:
        stats->flushes++;
        break;
    case VMM_BLK_DISCARD:
        stats->discards++;
        break;
    case VMM_BLK_WRITE_ZEROES:
        stats->zeroings++;
        break;
    case VMM_BLK_GET_ID:
        break;
    }
}

static void tell_failure(struct vmm_blk_job *r)
{
    struct vmm_blk *blk = r->blk;
    if (blk->failed)
        return;
    blk->failed = true;
    static const char *const acts[] = {[VMM_DISK_READ] = "reading",
                                       [VMM_DISK_WRITE] = "writing",
                                       [VMM_DISK_FLUSH] = "flushing",
                                       [VMM_DISK_DISCARD] = "discarding",
                                       [VMM_DISK_ZERO] = "zeroing"};
    vmm_vm_say(blk->virtio.vm, "%s: %s %s failed at byte %llu: %s; the guest gets an I/O error",
               blk->virtio.name, r->io.unkept ? "keeping for a checkpoint what is in" : acts[r->io.op],
               blk->label, (unsigned long long)(r->io.at + r->io.finished),
               r->io.error == -ENODATA ? "the file ends before it" : strerror(-r->io.error));
}

/* The next range of the request, until one takes time. true: it is answered. */
static bool go_on(struct vmm_blk_job *r)
{
    do {
        if (r->io.error) {
            tell_failure(r);
            answer(r, VMM_BLK_IOERR, r->io.op == VMM_DISK_READ ? r->io.finished : 0);
            return true;
        }
        if (r->range == r->parsed.n_ranges) {
            count(r);
            answer(r, VMM_BLK_OK, r->io.op == VMM_DISK_READ ? r->io.finished : 0);
            return true;
        }
        const struct vmm_blk_range *range = &r->parsed.ranges[r->range++];
        r->io.at = range->at;
        r->io.size = range->size;
        r->io.unmap = range->unmap;
    } while (vmm_disk_start(r->blk->disk, &r->io));
    return false;
}

static void io_done(struct vmm_disk_io *io)
{
    struct vmm_blk_job *r = (void *)((uint8_t *)io - offsetof(struct vmm_blk_job, io));
    if (r->blk->virtio.running) {
        go_on(r);
        return;
    }
    filled(r);
    give_back(r->blk, r); /* stopped: the rings are the driver's again */
}

static void answer_id(struct vmm_blk_job *r)
{
    const uint64_t room = r->chain.in_size - 1;
    const uint64_t n = room < VMM_BLK_ID ? room : VMM_BLK_ID;
    vmm_chain_write(&r->chain, 0, r->blk->serial, n);
    answer(r, VMM_BLK_OK, n);
}

/* The chain's buffers without header and status: what the data are read from or written to. */
static void set_buffers(struct vmm_blk_job *r)
{
    const struct vmm_chain *chain = &r->chain;
    const struct iovec *last = &chain->iov[chain->n_out + chain->n_in - 1];
    const bool in = r->parsed.type == VMM_BLK_IN;
    r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
    r->io.iov = r->data;
    r->io.n_iov =
        in ? vmm_chain_slice(chain, true, 0, chain->in_size - 1, r->data)
           : vmm_chain_slice(chain, false, VMM_BLK_HEADER, chain->out_size - VMM_BLK_HEADER, r->data);
}

static enum vmm_disk_op op_of(enum vmm_blk_type type)
{
    switch (type) {
    case VMM_BLK_OUT:
        return VMM_DISK_WRITE;
    case VMM_BLK_FLUSH:
        return VMM_DISK_FLUSH;
    case VMM_BLK_DISCARD:
        return VMM_DISK_DISCARD;
    case VMM_BLK_WRITE_ZEROES:
        return VMM_DISK_ZERO;
    default:
        return VMM_DISK_READ;
    }
}

/* What the rate limit counts: bytes that are moved, or may have to be. */
static uint64_t bytes_of(const struct vmm_blk_job *r)
{
    uint64_t bytes = 0;
    for (unsigned i = 0; i < r->parsed.n_ranges && r->parsed.type != VMM_BLK_DISCARD; i++)
        bytes += r->parsed.ranges[i].size;
    return bytes;
}

/* 5.2.6.2: a write is stable when it completes if the driver did not agree to flush, or switched the cache off. */
static bool writes_through(const struct vmm_blk *blk)
{
    const struct vmm_blk_config *config = (const void *)blk->virtio.config;
    return vmm_virtio_has(&blk->virtio, F_CONFIG_WCE) ? !config->writeback
                                                      : !vmm_virtio_has(&blk->virtio, F_FLUSH);
}

/* A chain as it was taken from its ring. Returns the bytes it moves. */
static uint64_t begin(struct vmm_blk *blk, struct vmm_blk_job *r, unsigned queue)
{
    uint8_t head[VMM_BLK_HEADER + VMM_BLK_RANGES_MAX * VMM_BLK_RANGE];
    const size_t n_head = vmm_chain_read(&r->chain, 0, head, sizeof(head));
    r->blk = blk;
    r->queue = (uint16_t)queue;
    r->range = 0;
    const enum vmm_blk_status status =
        vmm_blk_parse(&blk->limits, head, (uint32_t)n_head, r->chain.out_size, r->chain.in_size, &r->parsed);
    set_buffers(r);
    if (status != VMM_BLK_OK) {
        answer(r, status, 0);
        return 0;
    }
    if (r->parsed.type == VMM_BLK_GET_ID) {
        answer_id(r);
        return 0;
    }
    const uint64_t bytes = bytes_of(r);
    r->io.op = op_of(r->parsed.type);
    r->io.error = 0;
    r->io.through = writes_through(blk);
    r->io.done = io_done;
    go_on(r);
    return bytes;
}

/* ---- queues ---- */

static void publish(struct vmm_blk *blk)
{
    for (; blk->pushed; blk->pushed &= blk->pushed - 1)
        vmm_virtio_publish(&blk->virtio, (unsigned)__builtin_ctz(blk->pushed));
}

/* Take one request, if there is one and it may go. */
static bool take(struct vmm_blk *blk, unsigned queue, uint64_t *bytes)
{
    struct vmm_blk_job *r = vmm_limiter_open(&blk->limiter) ? take_free(blk) : NULL;
    if (!r) {
        blk->held |= 1u << queue;
        return false;
    }
    if (!vmm_virtio_pop(&blk->virtio, queue, &r->chain)) {
        give_back(blk, r);
        return false;
    }
    if (r->chain.out_size < VMM_BLK_HEADER || !r->chain.in_size) {
        vmm_virtio_broken(&blk->virtio,
                          "queue %u: a request of %llu bytes to read and %llu to write has no room for "
                          "its header and its status",
                          queue, (unsigned long long)r->chain.out_size, (unsigned long long)r->chain.in_size);
        give_back(blk, r);
        return false;
    }
    *bytes = begin(blk, r, queue);
    vmm_limiter_charge(&blk->limiter, *bytes);
    return true;
}

/* Requests are free, and no completion will say so. */
static void ring_held(struct vmm_blk *blk)
{
    for (uint32_t held = blk->held; held; held &= held - 1)
        vmm_virtqueue_ring(&blk->virtio.queues[__builtin_ctz(held)]);
}

/* A turn: everything that waits in the ring, within bounds. A queue that is held rings no doorbell. */
static void serve(struct vmm_blk *blk, unsigned queue)
{
    struct vmm_virtqueue *q = &blk->virtio.queues[queue];
    uint64_t bytes = 0, shown = 0, n;
    unsigned requests = 0, polls = 0;
    blk->held &= ~(1u << queue);
    do {
        if (!blk->virtio.running || !q->enabled)
            return;
        vmm_queue_suppress(&q->ring);
        while (requests < TURN_REQUESTS && bytes < TURN_BYTES && take(blk, queue, &n)) {
            bytes += n;
            if (++requests % SHOWN_REQUESTS == 0 || bytes - shown >= SHOWN_BYTES) {
                shown = bytes;
                publish(blk);
            }
        }
        if (!blk->virtio.running) /* broken on the way: nothing is under way any more */
            return;
        if (vmm_disk_turn(blk->disk)) /* what it completed on the spot gives no second wake-up */
            ring_held(blk);
        publish(blk);
        if (requests >= TURN_REQUESTS || bytes >= TURN_BYTES || polls == TURN_POLLS) {
            vmm_virtqueue_ring(q);
            return;
        }
        /* With requests under way their completions come next, and the eventfd tells of them. */
    } while (!(blk->held >> queue & 1) &&
             ((!blk->disk->under_way && ++polls && vmm_virtqueue_poll(q)) || vmm_queue_arm(&q->ring)));
}

/* Queues that were held look again, each beginning where the last turn of all ended. */
static void serve_held(struct vmm_blk *blk)
{
    const uint32_t held = blk->held;
    const unsigned n = blk->virtio.n_queues, first = blk->first_held++ % n;
    for (unsigned i = 0; i < n; i++)
        if (held >> (first + i) % n & 1)
            serve(blk, (first + i) % n);
}

static void kick(void *opaque, uint32_t queue)
{
    serve(opaque, queue);
}

static void completed(struct vmm_source *source, uint32_t events)
{
    struct vmm_blk *blk = source->opaque;
    (void)events;
    VMM_VIRTIO_LOCKED(&blk->virtio);
    if (!blk->virtio.running)
        return;
    vmm_disk_turn(blk->disk);
    publish(blk);
    if (blk->held)
        serve_held(blk);
}

static void limiter_opened(void *opaque)
{
    struct vmm_blk *blk = opaque;
    VMM_VIRTIO_LOCKED(&blk->virtio);
    if (blk->virtio.running)
        serve_held(blk);
}

/* ---- life cycle, as the driver drives it ---- */

static void start(void *opaque)
{
    struct vmm_blk *blk = opaque;
    if (vmm_disk_fd(blk->disk) >= 0 && vmm_loop_add(blk->virtio.loop, &blk->completions, EPOLLIN) < 0)
        vmm_virtio_broken(&blk->virtio, "its completions cannot be watched: %s", vmm_error_text());
}

static void stop(void *opaque)
{
    struct vmm_blk *blk = opaque;
    vmm_loop_remove(blk->virtio.loop, &blk->completions);
    vmm_disk_drain(blk->disk, true);
    blk->held = blk->pushed = 0;
    ((struct vmm_blk_config *)blk->virtio.config)->writeback = 1;
}

void vmm_blk_quiesce(void *opaque)
{
    struct vmm_blk *blk = opaque;
    vmm_disk_drain(blk->disk, false);
    publish(blk);
    ring_held(blk);
}

static void save(void *opaque, uint64_t *own)
{
    own[0] = ((struct vmm_blk *)opaque)->limits.size;
}

static int load(void *opaque, const uint64_t *own)
{
    const struct vmm_blk *blk = opaque;
    return own[0] == blk->limits.size
               ? 0
               : vmm_error_set(-EINVAL, "%s: the saved disk has %llu bytes, this one %llu", blk->virtio.name,
                               (unsigned long long)own[0], (unsigned long long)blk->limits.size);
}

/* ---- life ---- */

static int check(const char *name, vmm_disk *disk, const vmm_blk_options *options)
{
    if (options->sector != 512 && options->sector != 4096)
        return vmm_error_set(-EINVAL, "%s: sectors of %u bytes", name, options->sector);
    if (!options->queues || options->queues > VMM_BLK_QUEUES_MAX)
        return vmm_error_set(-EINVAL, "%s: %u queues", name, options->queues);
    if (vmm_disk_size(disk) % options->sector || !vmm_disk_size(disk))
        return vmm_error_set(-EINVAL, "%s: %llu bytes are not whole sectors", name,
                             (unsigned long long)vmm_disk_size(disk));
    if (options->sector % disk->alignment)
        return vmm_error_set(-EINVAL, "%s: O_DIRECT needs sectors of %u bytes", name, disk->alignment);
    return 0;
}

static void fill_config(struct vmm_blk *blk, const vmm_blk_options *options)
{
    const struct vmm_blk_config config = {
        .capacity = blk->limits.size / VMM_BLK_UNIT,
        .seg_max = QUEUE_SIZE - 2, /* header and status take one each */
        .blk_size = options->sector,
        .physical_block_exp = options->block_exponent,
        .min_io_size = 1,
        .writeback = 1,
        .num_queues = (uint16_t)options->queues,
        .max_discard_sectors = VMM_BLK_DISCARD_MAX,
        .max_discard_seg = VMM_BLK_RANGES_MAX,
        .discard_sector_alignment = (options->sector << options->block_exponent) / VMM_BLK_UNIT,
        .max_write_zeroes_sectors = VMM_BLK_ZERO_MAX,
        .max_write_zeroes_seg = VMM_BLK_RANGES_MAX,
        .write_zeroes_may_unmap = 1,
    };
    memcpy(blk->virtio.config, &config, sizeof(config));
    blk->virtio.writable_at = offsetof(struct vmm_blk_config, writeback);
    blk->virtio.writable_size = 1;
}

int vmm_blk_create(vmm_vm *vm, const char *name, const char *label, vmm_disk *disk,
                   const vmm_blk_options *options, vmm_blk **out)
{
    static const vmm_virtio_ops ops = {
        .start = start, .kick = kick, .stop = stop, .quiesce = vmm_blk_quiesce, .save = save, .load = load};
    int rc = check(name, disk, options);
    if (rc < 0)
        return rc;
    struct vmm_blk *blk = calloc(1, sizeof(*blk));
    if (!blk)
        return vmm_error_set(-ENOMEM, "%s", name);
    blk->pool = calloc(POOL, sizeof(*blk->pool));
    blk->label = strdup(label);
    blk->limits = (struct vmm_blk_limits){
        .size = vmm_disk_size(disk), .sector = options->sector, .readonly = options->readonly};
    memcpy(blk->serial, options->serial, sizeof(blk->serial));
    uint16_t sizes[VMM_BLK_QUEUES_MAX];
    for (unsigned i = 0; i < VMM_BLK_QUEUES_MAX; i++)
        sizes[i] = QUEUE_SIZE;
    const uint64_t features = BIT(F_SEG_MAX) | BIT(F_BLK_SIZE) | BIT(F_FLUSH) | BIT(F_TOPOLOGY) |
                              BIT(F_CONFIG_WCE) | (options->queues > 1 ? BIT(F_MQ) : 0) |
                              (options->readonly ? BIT(F_RO) : BIT(F_DISCARD) | BIT(F_WRITE_ZEROES));
    rc = blk->pool && blk->label ? vmm_virtio_init(&blk->virtio, vm, &ops, blk, DEVICE_ID, name, features,
                                                   options->queues, sizes, sizeof(struct vmm_blk_config))
                                 : vmm_error_set(-ENOMEM, "%s", name);
    if (!rc)
        rc = vmm_limiter_init(&blk->limiter, blk->virtio.loop, options->bytes_per_second,
                              options->operations_per_second, limiter_opened, blk);
    if (rc < 0) {
        vmm_blk_destroy(blk);
        return rc;
    }
    fill_config(blk, options);
    blk->disk = disk;
    for (uint32_t i = 0; i < vm->n_regions; i++)
        disk->bounce.off |= vm->regions[i].flags & VMM_MEMORY_HUGE_2M;
    blk->completions = (struct vmm_source){.fd = vmm_disk_fd(disk), .ready = completed, .opaque = blk};
    *out = blk;
    return 0;
}

void vmm_blk_destroy(vmm_blk *blk)
{
    if (!blk)
        return;
    vmm_disk_destroy(blk->disk);
    vmm_limiter_deinit(&blk->limiter);
    vmm_virtio_deinit(&blk->virtio);
    free(blk->pool);
    free(blk->label);
    free(blk);
}

vmm_virtio *vmm_blk_virtio(vmm_blk *blk)
{
    return &blk->virtio;
}
