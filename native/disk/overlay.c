/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copy on write: a base that is only read, and a file that holds every cluster written since (docs/disk-overlay.md).
 * The base may itself be an overlay over a base, and so on, all of them only read.
 *
 * Byte n of the disk is byte data_at + n of the file if its cluster's bit in the bitmap is set, else byte n of the
 * base, else zero. Bits are only ever set. The bit in memory is set when the cluster's data have been written; the
 * bit in the file when those data are stable. So the file describes a whole disk at any moment, whatever order the
 * host writes its sectors in: a torn bitmap is a bitmap with fewer bits.
 *
 * A cluster that is written in part for the first time is copied from the base first, on the spot, and settled at
 * once: nothing changes for any reader. If a write of the whole cluster is under way, the partial one waits for it, lest
 * the copy land on top of it.
 */
#include "disk/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CLUSTER                                                                                              \
    4096ull /* the guests' page and file-system block: partial writes are rare. 32 KiB of bitmap a GiB */
#define BLOCK 4096ull /* the bitmap is recorded in such blocks */
#define BLOCK_BITS (BLOCK * 8)

struct note {
    uint64_t block;
    const uint8_t *bits; /* as they were when the flush began */
};

/* A file that is only read, for what has no bit above it. */
struct layer {
    int fd;
    uint64_t size, data_at; /* bytes of its disk, zeros after them; where they begin in fd */
    uint64_t *bits;         /* NULL: everything is there */
    uint64_t bitmap_size;
};

struct vmm_overlay {
    struct layer *below; /* the nearest first; the last has no bitmap */
    uint32_t n_below;
    uint64_t bitmap_at, bitmap_size;
    uint64_t *bits; /* bitmap_size bytes */
    uint8_t *dirty; /* a byte for each block of the bitmap */
    uint64_t n_dirty;
    struct note *notes;
    uint8_t *noted;
    uint64_t n_notes;
    _Alignas(4096) uint8_t cluster[CLUSTER];
};

static bool has(const uint64_t *bits, uint64_t cluster)
{
    return bits[cluster / 64] >> (cluster % 64) & 1;
}

static bool is_set(const struct vmm_overlay *o, uint64_t cluster)
{
    return has(o->bits, cluster);
}

/* Clusters from `first` up to `end` that are like the first: set, or not. */
static uint64_t run_of(const uint64_t *bits, uint64_t first, uint64_t end)
{
    const uint64_t whole = has(bits, first) ? UINT64_MAX : 0;
    uint64_t c = first;
    while (c < end) {
        const uint64_t other = (bits[c / 64] ^ whole) >> (c % 64);
        if (other) {
            c += (uint64_t)__builtin_ctzll(other);
            break;
        }
        c += 64 - c % 64;
    }
    return (c < end ? c : end) - first;
}

static void set(struct vmm_overlay *o, uint64_t first, uint64_t end)
{
    for (uint64_t c = first; c < end; c++) {
        if (is_set(o, c))
            continue;
        o->bits[c / 64] |= 1ull << (c % 64);
        o->n_dirty += !o->dirty[c / BLOCK_BITS];
        o->dirty[c / BLOCK_BITS] = 1;
    }
}

/* ---- reading ---- */

/* Does [at, at + *size) begin in this bitmap? *size is cut to the bytes of which the answer is true. */
static bool begins_in(const uint64_t *bits, uint64_t at, uint64_t *size)
{
    const uint64_t first = at / CLUSTER, end = (at + *size - 1) / CLUSTER + 1;
    const uint64_t run = (first + run_of(bits, first, end)) * CLUSTER - at;
    if (run < *size)
        *size = run;
    return has(bits, first);
}

static struct vmm_extent overlay_map(struct vmm_disk *disk, uint64_t at, uint64_t size)
{
    const struct vmm_overlay *o = disk->overlay;
    if (begins_in(o->bits, at, &size))
        return (struct vmm_extent){.fd = disk->fd, .at = disk->data_at + at, .size = size};
    for (const struct layer *l = o->below; l < o->below + o->n_below && at < l->size; l++) {
        if (l->size - at < size)
            size = l->size - at;
        if (!l->bits || begins_in(l->bits, at, &size))
            return (struct vmm_extent){.fd = l->fd, .at = l->data_at + at, .size = size};
    }
    return (struct vmm_extent){.fd = -1, .size = size};
}

/* ---- writing ---- */

/* Bring a cluster over from below. It blocks, for one page, once for a cluster that is not written whole. */
static int copy_up(struct vmm_disk *disk, uint64_t cluster)
{
    struct vmm_overlay *o = disk->overlay;
    int rc = vmm_disk_read_now(disk, cluster * CLUSTER, CLUSTER, o->cluster);
    if (!rc)
        rc = vmm_disk_write_whole(disk->fd, o->cluster, CLUSTER, disk->data_at + cluster * CLUSTER);
    if (!rc)
        set(o, cluster, cluster + 1);
    return rc;
}

static bool being_settled(const struct vmm_disk *disk, uint64_t cluster)
{
    for (const struct vmm_disk_io *io = disk->allocating; io; io = io->next_allocating)
        if (io->at < (cluster + 1) * CLUSTER && cluster * CLUSTER < io->at + io->size)
            return true;
    return false;
}

static int overlay_prepare(struct vmm_disk *disk, struct vmm_disk_io *io, uint64_t at, uint64_t size)
{
    struct vmm_overlay *o = disk->overlay;
    const uint64_t end = at + size;
    /* The clusters at both ends, if they are not written whole: up to the disk's end is whole. */
    const uint64_t edges[2] = {at / CLUSTER, end / CLUSTER};
    const bool partial[2] = {at % CLUSTER != 0, end % CLUSTER != 0 && end != disk->size};
    for (int i = 0; i < 2; i++)
        if (partial[i] && !is_set(o, edges[i]) && being_settled(disk, edges[i]))
            return VMM_DISK_WAIT;
    for (int i = 0; i < 2; i++) {
        const int rc = partial[i] && !is_set(o, edges[i]) ? copy_up(disk, edges[i]) : 0;
        if (rc)
            return rc;
    }
    const uint64_t first = at / CLUSTER, last = (end - 1) / CLUSTER;
    if (!is_set(o, first) || run_of(o->bits, first, last + 1) <= last - first) {
        io->next_allocating = disk->allocating;
        if (disk->allocating)
            disk->allocating->allocating = &io->next_allocating;
        disk->allocating = io;
        io->allocating = &disk->allocating;
    }
    return 0;
}

static uint64_t overlay_written(struct vmm_disk *disk, uint64_t at, uint64_t n, uint64_t size)
{
    struct vmm_overlay *o = disk->overlay;
    uint64_t end = at + n;
    /* A cluster of which only the beginning was written is not there: what is missing lies in the base. */
    if (n < size && end % CLUSTER && !is_set(o, end / CLUSTER))
        end -= end % CLUSTER;
    if (end <= at)
        return 0;
    set(o, at / CLUSTER, (end - 1) / CLUSTER + 1); /* those at the ends were whole, or set by prepare */
    return end - at;
}

/* ---- flushing: data, then the bits that were set when it began, then it is over ---- */

static int overlay_begin_flush(struct vmm_disk *disk)
{
    struct vmm_overlay *o = disk->overlay;
    if (!o->n_dirty)
        return 0;
    o->notes = malloc(o->n_dirty * sizeof(*o->notes));
    if (!o->notes || posix_memalign((void **)&o->noted, BLOCK, o->n_dirty * BLOCK)) {
        free(o->notes);
        o->notes = NULL;
        return vmm_error_set(-ENOMEM, "the bitmap of an overlay");
    }
    for (uint64_t block = 0; o->n_dirty; block++) {
        if (!o->dirty[block])
            continue;
        uint8_t *bits = o->noted + o->n_notes * BLOCK;
        memcpy(bits, (const uint8_t *)o->bits + block * BLOCK, BLOCK);
        o->notes[o->n_notes++] = (struct note){block, bits};
        o->dirty[block] = 0;
        o->n_dirty--;
    }
    return 0;
}

static int overlay_record(struct vmm_disk *disk)
{
    struct vmm_overlay *o = disk->overlay;
    for (uint64_t i = 0; i < o->n_notes; i++) {
        const int rc =
            vmm_disk_write_whole(disk->fd, o->notes[i].bits, BLOCK, o->bitmap_at + o->notes[i].block * BLOCK);
        if (rc)
            return rc;
    }
    return o->n_notes > 0;
}

static void overlay_end_flush(struct vmm_disk *disk)
{
    struct vmm_overlay *o = disk->overlay;
    free(o->notes);
    free(o->noted);
    o->notes = NULL;
    o->noted = NULL;
    o->n_notes = 0;
}

/* ---- life ---- */

static uint64_t clusters_of(uint64_t size)
{
    return size / CLUSTER + (size % CLUSTER != 0);
}

static int overlay_resize(struct vmm_disk *disk, uint64_t size, bool follow)
{
    (void)follow; /* the file's size says nothing of the disk's */
    const struct vmm_overlay *o = disk->overlay;
    if (size < disk->size)
        return vmm_error_set(-EBUSY, "an overlay cannot shrink");
    if (clusters_of(size) > o->bitmap_size * 8)
        return vmm_error_set(-EINVAL, "the overlay has room for a disk of %llu bytes",
                             (unsigned long long)(o->bitmap_size * 8 * CLUSTER));
    return ftruncate(disk->fd, (off_t)(disk->data_at + clusters_of(size) * CLUSTER)) < 0
               ? vmm_error_errno("ftruncate of an overlay")
               : 0;
}

static void overlay_free(struct vmm_overlay *o)
{
    if (!o)
        return;
    if (o->bits)
        munmap(o->bits, o->bitmap_size);
    for (struct layer *l = o->below; l < o->below + o->n_below; l++) {
        if (l->bits)
            munmap(l->bits, l->bitmap_size);
        if (l->fd >= 0)
            close(l->fd);
    }
    free(o->below);
    free(o->dirty);
    free(o);
}

/* A last flush without anyone to answer: what is lost without it was not flushed by the guest. */
static void overlay_close(struct vmm_disk *disk)
{
    struct vmm_overlay *o = disk->overlay;
    if (o && o->n_dirty && !disk->flush_failed && overlay_begin_flush(disk) == 0) {
        if (fdatasync(disk->fd) == 0 && overlay_record(disk) > 0)
            fdatasync(disk->fd);
        overlay_end_flush(disk);
    }
    overlay_free(o);
}

/* A bitmap of `size` bytes, most of which is a hole: room for every size the disk may grow to, touched where bits are. */
static int load_bits(int fd, uint64_t bitmap_at, uint64_t size, uint64_t **out)
{
    uint64_t *bits =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bits == MAP_FAILED)
        return vmm_error_set(-ENOMEM, "an overlay's bitmap");
    *out = bits;
    const uint64_t end = bitmap_at + size;
    for (uint64_t at = bitmap_at; at < end;) {
        const off_t data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0;
        if (data < 0)
            return vmm_error_errno("SEEK_DATA in an overlay");
        at = (uint64_t)data / BLOCK * BLOCK;
        if (at >= end)
            return 0;
        const int64_t got = vmm_disk_read_whole(fd, (uint8_t *)bits + (at - bitmap_at), BLOCK, at);
        if (got != (int64_t)BLOCK)
            return vmm_error_host(got < 0 ? (int)got : -EIO, "reading an overlay's bitmap");
        at += BLOCK;
    }
    return 0;
}

static int open_below(struct vmm_overlay *o, const vmm_disk_layer *below, uint32_t n)
{
    o->below = calloc(n, sizeof(*o->below));
    if (!o->below)
        return vmm_error_set(-ENOMEM, "an overlay");
    for (uint32_t i = 0; i < n; i++) {
        struct layer *l = &o->below[o->n_below++];
        *l = (struct layer){
            .size = below[i].size, .data_at = below[i].data_at, .bitmap_size = below[i].bitmap_size};
        l->fd = fcntl(below[i].fd, F_DUPFD_CLOEXEC, 0);
        if (l->fd < 0)
            return vmm_error_errno("F_DUPFD_CLOEXEC of a base");
        const int rc = l->bitmap_size ? load_bits(l->fd, below[i].bitmap_at, l->bitmap_size, &l->bits) : 0;
        if (rc)
            return rc;
    }
    return 0;
}

static int open_layers(struct vmm_overlay *o, const vmm_disk_layer *layers, uint32_t n)
{
    o->dirty = calloc(o->bitmap_size / BLOCK, 1);
    if (!o->dirty)
        return vmm_error_set(-ENOMEM, "an overlay's bitmap");
    const int rc = load_bits(layers[0].fd, o->bitmap_at, o->bitmap_size, &o->bits);
    return rc ? rc : open_below(o, layers + 1, n - 1);
}

/* The bitmap lies before the data, and has a bit for every cluster. */
static bool is_overlay(const vmm_disk_layer *l)
{
    return l->bitmap_size && !(l->bitmap_at % BLOCK) && !(l->bitmap_size % BLOCK) &&
           !(l->data_at % CLUSTER) && l->bitmap_size <= l->data_at &&
           l->bitmap_at <= l->data_at - l->bitmap_size && clusters_of(l->size) <= l->bitmap_size * 8;
}

static int check_layers(const vmm_disk_layer *layers, uint32_t n)
{
    if (n < 2 || layers[n - 1].bitmap_size || layers[n - 1].data_at)
        return vmm_error_set(-EINVAL, "an overlay without a base");
    for (uint32_t i = 0; i < n - 1; i++)
        if (!is_overlay(&layers[i]))
            return vmm_error_set(
                -EINVAL, "an overlay whose bitmap of %llu bytes is not for %llu bytes of disk",
                (unsigned long long)layers[i].bitmap_size, (unsigned long long)layers[i].size);
    return 0;
}

int vmm_disk_open_overlay(const vmm_disk_layer *layers, uint32_t n, uint32_t alignment, uint32_t flags,
                          vmm_disk **out)
{
    static const struct vmm_disk_kind kind = {
        .map = overlay_map,
        .prepare = overlay_prepare,
        .written = overlay_written,
        .begin_flush = overlay_begin_flush,
        .record = overlay_record,
        .end_flush = overlay_end_flush,
        .resize = overlay_resize,
        .close = overlay_close,
    };
    int rc = check_layers(layers, n);
    if (rc)
        return rc;
    struct vmm_overlay *o = aligned_alloc(4096, (sizeof(*o) + 4095) / 4096 * 4096);
    if (!o)
        return vmm_error_set(-ENOMEM, "an overlay");
    memset(o, 0, sizeof(*o));
    o->bitmap_at = layers[0].bitmap_at;
    o->bitmap_size = layers[0].bitmap_size;
    rc = open_layers(o, layers, n);
    if (!rc)
        rc = vmm_disk_create(&kind, layers[0].fd, layers[0].size, layers[0].data_at, alignment, flags, out);
    if (rc) {
        overlay_free(o);
        return rc;
    }
    (*out)->overlay = o;
    return 0;
}
