/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of guest memory to and from a sparse file. */
#include "base/bitmap.h"
#include "base/thread.h"
#include "core/core.h"
#include "vmmsnapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    PAGES_PER_CHUNK = VMM_CHUNK / VMM_PAGE,
    PIECE = 16 * PAGES_PER_CHUNK, /* what is checked by one thread before it looks for more */
    PAGES_WORTH_A_THREAD = 2048,  /* are read and summed in a millisecond: ten times what a thread takes */
    HELPERS_MAX = 7,
    PAGEMAP_BATCH = 4096,
};
_Static_assert(64 % PAGES_PER_CHUNK == 0, "a chunk's pages lie in one word of a bitmap");

/* Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_HERE (3ull << 62) /* present, or swapped */
#define PAGEMAP_FILE (1ull << 61) /* a page of a file's */

static bool is_zero(const uint8_t *page)
{
    for (size_t at = 0; at < VMM_PAGE; at += 64) {
        uint64_t words[8], any = 0;
        memcpy(words, page + at, sizeof(words));
        for (int i = 0; i < 8; i++)
            any |= words[i];
        if (any)
            return false;
    }
    return true;
}

/* All n bytes, or why not: a file that ends before is -EBADMSG. */
static int read_all(int fd, void *bytes, size_t n, uint64_t at)
{
    for (uint8_t *p = bytes; n;) {
        const ssize_t got = pread(fd, p, n, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return vmm_error_errno("reading memory from a file");
        if (got == 0)
            return vmm_error_set(-EBADMSG, "the file ends at %#llx", (unsigned long long)at);
        p += got, at += (uint64_t)got, n -= (size_t)got;
    }
    return 0;
}

static int write_all(int fd, const void *bytes, size_t n, uint64_t at)
{
    for (const uint8_t *p = bytes; n;) {
        const ssize_t put = pwrite(fd, p, n, (off_t)at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? vmm_error_errno("writing memory to a file")
                           : vmm_error_host(-EIO, "writing memory to a file: nothing was written");
        p += put, at += (uint64_t)put, n -= (size_t)put;
    }
    return 0;
}

/* The next stretch of data in [*from, end) of a file, as the file system has it. 1: there is one; 0; -errno. */
static int next_data(int fd, uint64_t *from, uint64_t *to, uint64_t end)
{
    const off_t data = lseek(fd, (off_t)*from, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 0 : vmm_error_errno("SEEK_DATA");
    if ((uint64_t)data >= end)
        return 0;
    const off_t hole = lseek(fd, data, SEEK_HOLE);
    if (hole < 0)
        return vmm_error_errno("SEEK_HOLE");
    *from = (uint64_t)data;
    *to = (uint64_t)hole < end ? (uint64_t)hole : end;
    return 1;
}

/* ---- find ---- */

static void add(uint64_t *bitmap, uint64_t from, uint64_t to)
{
    for (uint64_t page = from; page < to; page++)
        bitmap[page / 64] |= 1ull << page % 64;
}

static int add_data(int fd, uint64_t offset, uint64_t size, uint64_t *bitmap)
{
    uint64_t from = offset, to = 0;
    int rc;
    for (; (rc = next_data(fd, &from, &to, offset + size)) > 0; from = to)
        add(bitmap, (from - offset) / VMM_PAGE, (to - offset + VMM_PAGE - 1) / VMM_PAGE);
    return rc;
}

int vmm_pages_own(const void *host, uint64_t size, uint64_t *bitmap)
{
    const uint64_t pages = size / VMM_PAGE;
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return vmm_error_errno("/proc/self/pagemap");
    static _Thread_local uint64_t entries[PAGEMAP_BATCH];
    int rc = 0;
    for (uint64_t first = 0; first < pages && rc == 0; first += PAGEMAP_BATCH) {
        const uint64_t n = pages - first < PAGEMAP_BATCH ? pages - first : PAGEMAP_BATCH;
        rc = read_all(fd, entries, n * sizeof(*entries),
                      ((uintptr_t)host / VMM_PAGE + first) * sizeof(*entries));
        for (uint64_t i = 0; i < n && rc == 0; i++)
            if (entries[i] & PAGEMAP_HERE && !(entries[i] & PAGEMAP_FILE))
                add(bitmap, first + i, first + i + 1);
    }
    close(fd);
    return rc;
}

int64_t vmm_pages_find(const void *host, uint64_t size, int fd, uint64_t offset, int privately,
                       uint64_t *bitmap)
{
    const uint8_t *memory = host;
    const uint64_t pages = size / VMM_PAGE;
    memset(bitmap, 0, (pages + 63) / 64 * sizeof(*bitmap));
    int rc = fd >= 0 ? add_data(fd, offset, size, bitmap) : 0;
    if (rc == 0 && privately)
        rc = vmm_pages_own(memory, size, bitmap);
    if (rc < 0)
        return rc;
    if (fd < 0 && !privately)
        add(bitmap, 0, pages);
    int64_t found = 0;
    for (uint64_t page = 0; (page = vmm_bitmap_next(bitmap, page, pages, true)) < pages; page++) {
        if (is_zero(memory + page * VMM_PAGE))
            bitmap[page / 64] &= ~(1ull << page % 64);
        else
            found++;
    }
    return found;
}

/* ---- write, read ---- */

static int write_run(int fd, uint64_t offset, const uint8_t *memory, uint64_t from, uint64_t to)
{
    int rc = 0;
    for (uint64_t end; from < to && rc == 0; from = end) {
        const bool zero = is_zero(memory + from * VMM_PAGE);
        for (end = from + 1; end < to && is_zero(memory + end * VMM_PAGE) == zero;)
            end++;
        if (!zero)
            rc = write_all(fd, memory + from * VMM_PAGE, (end - from) * VMM_PAGE, offset + from * VMM_PAGE);
    }
    return rc;
}

int vmm_pages_write(int fd, uint64_t offset, const void *host, uint64_t size, const uint64_t *bitmap,
                    uint32_t *checksums)
{
    const uint8_t *memory = host;
    const uint64_t pages = size / VMM_PAGE;
    for (uint64_t first = 0; first < pages; first += PAGES_PER_CHUNK) {
        const uint64_t end = first + PAGES_PER_CHUNK < pages ? first + PAGES_PER_CHUNK : pages;
        uint32_t crc = 0;
        for (uint64_t from = first, to; (from = vmm_bitmap_next(bitmap, from, end, true)) < end; from = to) {
            to = vmm_bitmap_next(bitmap, from, end, false);
            crc = vmm_crc32c(crc, memory + from * VMM_PAGE, (to - from) * VMM_PAGE);
            const int rc = write_run(fd, offset, memory, from, to);
            if (rc < 0)
                return rc;
        }
        checksums[first / PAGES_PER_CHUNK] = crc;
    }
    return 0;
}

int vmm_pages_read(int fd, uint64_t offset, void *host, uint64_t size, const uint64_t *bitmap)
{
    const uint64_t pages = size / VMM_PAGE;
    for (uint64_t from = 0, to; (from = vmm_bitmap_next(bitmap, from, pages, true)) < pages; from = to) {
        to = vmm_bitmap_next(bitmap, from, pages, false);
        const int rc =
            read_all(fd, (uint8_t *)host + from * VMM_PAGE, (to - from) * VMM_PAGE, offset + from * VMM_PAGE);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- check ---- */

/* Small enough to be in the cache still when it is summed; aligned, since copying into it is most of the work. */
static uint8_t *new_buffer(void)
{
    return aligned_alloc(VMM_PAGE, VMM_CHUNK);
}

struct checking {
    int fd;
    uint64_t offset, pages;
    const uint64_t *bitmap;
    const uint32_t *checksums;
    _Atomic uint64_t next; /* first page that no thread has taken */
    _Atomic bool failed;
};

static int check_chunk(const struct checking *c, uint64_t first, uint64_t end, uint8_t *buffer)
{
    uint32_t crc = 0;
    for (uint64_t from = first, to; (from = vmm_bitmap_next(c->bitmap, from, end, true)) < end; from = to) {
        to = vmm_bitmap_next(c->bitmap, from, end, false);
        const int rc = read_all(c->fd, buffer, (to - from) * VMM_PAGE, c->offset + from * VMM_PAGE);
        if (rc < 0)
            return rc;
        crc = vmm_crc32c(crc, buffer, (to - from) * VMM_PAGE);
    }
    return crc == c->checksums[first / PAGES_PER_CHUNK]
               ? 0
               : vmm_error_set(-EBADMSG, "a page from %#llx on is not what was written",
                               (unsigned long long)(c->offset + first * VMM_PAGE));
}

/* Piece after piece, as long as there are any: on each of the threads. */
static int check_pieces(struct checking *c)
{
    uint8_t *buffer = new_buffer();
    int rc = buffer ? 0 : vmm_error_set(-ENOMEM, "no memory to check a file of guest memory");
    for (uint64_t first; rc == 0 && !c->failed && (first = atomic_fetch_add(&c->next, PIECE)) < c->pages;) {
        const uint64_t end = first + PIECE < c->pages ? first + PIECE : c->pages;
        for (uint64_t chunk = first; chunk < end && rc == 0; chunk += PAGES_PER_CHUNK)
            rc = check_chunk(c, chunk, chunk + PAGES_PER_CHUNK < end ? chunk + PAGES_PER_CHUNK : end, buffer);
    }
    if (rc < 0)
        c->failed = true; /* the others need not go on */
    free(buffer);
    return rc;
}

/* No page that is not held may be anything but zeros: it is mapped along with the others. One thread's: to find where
 * data end, the file system walks over all of them. */
static int check_holes(const struct checking *c)
{
    uint8_t page[VMM_PAGE];
    uint64_t start = c->offset, stop = 0;
    int rc;
    for (; (rc = next_data(c->fd, &start, &stop, c->offset + c->pages * VMM_PAGE)) > 0; start = stop) {
        const uint64_t end = (stop - c->offset + VMM_PAGE - 1) / VMM_PAGE;
        for (uint64_t n = (start - c->offset) / VMM_PAGE;
             (n = vmm_bitmap_next(c->bitmap, n, end, false)) < end; n++) {
            rc = read_all(c->fd, page, VMM_PAGE, c->offset + n * VMM_PAGE);
            if (rc == 0 && !is_zero(page))
                rc = vmm_error_set(-EBADMSG, "there are data at %#llx, where there were none",
                                   (unsigned long long)(c->offset + n * VMM_PAGE));
            if (rc < 0)
                return rc;
        }
    }
    return rc;
}

struct helper {
    struct checking *checking;
    pthread_t thread;
    int rc;
    bool host;     /* it was the host's answer */
    char why[160]; /* what went wrong is remembered for each thread */
};

static void *help(void *opaque)
{
    struct helper *h = opaque;
    h->rc = check_pieces(h->checking);
    if (h->rc < 0)
        snprintf(h->why, sizeof(h->why), "%s", vmm_error_text());
    h->host = vmm_error_source(h->rc) == VMM_ERROR_HOST;
    return NULL;
}

/* Reading is copying from the page cache: it takes as long as there are bytes, and goes as fast as there are CPUs. */
static unsigned helpers_for(const uint64_t *bitmap, uint64_t pages)
{
    cpu_set_t cpus;
    uint64_t held = 0;
    for (uint64_t word = 0; word < (pages + 63) / 64; word++)
        held += (unsigned)__builtin_popcountll(bitmap[word]);
    const uint64_t others =
        sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? (uint64_t)CPU_COUNT(&cpus) - 1 : 0;
    const uint64_t worth = held / PAGES_WORTH_A_THREAD;
    const uint64_t n = worth < others ? worth : others;
    return n < HELPERS_MAX ? (unsigned)n : HELPERS_MAX;
}

int vmm_pages_check(int fd, uint64_t offset, uint64_t size, const uint64_t *bitmap, const uint32_t *checksums)
{
    struct checking c = {
        .fd = fd, .offset = offset, .pages = size / VMM_PAGE, .bitmap = bitmap, .checksums = checksums};
    struct helper helpers[HELPERS_MAX];
    const unsigned wanted = helpers_for(bitmap, c.pages);
    unsigned n = 0;
    for (; n < wanted; n++) {
        helpers[n] = (struct helper){.checking = &c};
        if (vmm_thread_start(&helpers[n].thread, "snapshot-check", help, &helpers[n]) < 0)
            break; /* fewer do it too */
    }
    int rc = check_holes(&c);
    if (rc < 0)
        c.failed = true;
    else
        rc = check_pieces(&c);
    for (unsigned i = 0; i < n; i++) {
        pthread_join(helpers[i].thread, NULL);
        if (rc == 0 && helpers[i].rc < 0)
            rc = (helpers[i].host ? vmm_error_host : vmm_error_set)(helpers[i].rc, "%s", helpers[i].why);
    }
    return rc;
}

/* ---- whole files ---- */

int vmm_file_crc32c(int fd, uint32_t *crc)
{
    const off_t size = lseek(fd, 0, SEEK_END);
    if (size < 0)
        return vmm_error_errno("lseek");
    uint8_t *buffer = new_buffer();
    if (!buffer)
        return vmm_error_set(-ENOMEM, "no memory to check a file");
    uint64_t at = 0, from = 0, to = 0;
    int rc;
    *crc = 0;
    for (; (rc = next_data(fd, &from, &to, (uint64_t)size)) > 0; from = to) {
        *crc = vmm_crc32c_zeros(*crc, from - at);
        for (at = from; at < to && rc >= 0;) {
            const size_t n = to - at < VMM_CHUNK ? to - at : VMM_CHUNK;
            rc = read_all(fd, buffer, n, at);
            *crc = vmm_crc32c(*crc, buffer, n);
            at += n;
        }
        if (rc < 0)
            break;
    }
    *crc = vmm_crc32c_zeros(*crc, (uint64_t)size - at);
    free(buffer);
    return rc;
}

int vmm_rename(const char *from, const char *to, int exchange)
{
    return renameat2(AT_FDCWD, from, AT_FDCWD, to, exchange ? RENAME_EXCHANGE : RENAME_NOREPLACE) < 0
               ? vmm_error_errno("rename")
               : 0;
}
