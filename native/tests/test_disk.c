/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Disks against a model in memory: random histories through every engine; what a power cut may leave; a host that
 * fails. The system calls that write are this program's own, so that it can lose, shorten and refuse writes.
 */
#include "disk_bench.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- the host ---- */

struct lost_write { /* not yet stable */
    uint64_t at, size;
    uint8_t *bytes;
};
static struct {
    int fd;     /* the file that is watched; -1: none */
    int refuse; /* errno of every write to it, after so many */
    unsigned accept;
    int sync_refuse;
    unsigned sync_interrupt; /* so many syncs are interrupted */
    uint64_t shorten;        /* a write of more than this writes so many bytes */
    bool shorten_once;
    uint8_t *stable; /* its bytes on the medium */
    uint64_t size;
    struct lost_write *writes;
    unsigned n_writes;
} host = {.fd = -1};

static bool watched(int fd)
{
    struct stat a, b;
    return host.fd >= 0 && fstat(fd, &a) == 0 && fstat(host.fd, &b) == 0 && a.st_ino == b.st_ino &&
           a.st_dev == b.st_dev;
}

static void remember(uint64_t at, const void *bytes, uint64_t size)
{
    if (!host.stable)
        return;
    host.writes = realloc(host.writes, (host.n_writes + 1) * sizeof(*host.writes));
    struct lost_write *w = &host.writes[host.n_writes++];
    *w = (struct lost_write){at, size, malloc(size)};
    memcpy(w->bytes, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
    if (watched(fd)) {
        if (host.refuse && (!host.accept || !host.accept--)) {
            errno = host.refuse;
            return -1;
        }
        remember((uint64_t)at, bytes, n);
    }
    return syscall(SYS_pwrite64, fd, bytes, n, at);
}

/* One write, whatever its pieces: a medium keeps sectors whole. */
ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    if (!watched(fd))
        return syscall(SYS_pwritev, fd, iov, n, at, 0);
    size_t size = 0;
    for (int i = 0; i < n; i++)
        size += iov[i].iov_len;
    uint8_t *bytes = malloc(size), *next = bytes;
    for (int i = 0; i < n; next += iov[i++].iov_len)
        memcpy(next, iov[i].iov_base, iov[i].iov_len);
    const bool cut = host.shorten && size > host.shorten;
    const ssize_t put = pwrite(fd, bytes, cut ? host.shorten : size, at);
    if (cut && host.shorten_once)
        host.shorten = 0;
    free(bytes);
    return put;
}

int fallocate(int fd, int mode, off_t at, off_t size)
{
    if (watched(fd) && host.stable) { /* the medium is the model's; writing zeros takes the same way */
        errno = EOPNOTSUPP;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, at, size);
}

int fdatasync(int fd)
{
    if (watched(fd)) {
        if (host.sync_interrupt && host.sync_interrupt--) {
            errno = EINTR;
            return -1;
        }
        if (host.sync_refuse) {
            errno = host.sync_refuse;
            return -1;
        }
        for (unsigned i = 0; i < host.n_writes; i++) {
            memcpy(host.stable + host.writes[i].at, host.writes[i].bytes, host.writes[i].size);
            free(host.writes[i].bytes);
        }
        host.n_writes = 0;
        return 0;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

static void watch(int fd)
{
    for (unsigned i = 0; i < host.n_writes; i++)
        free(host.writes[i].bytes);
    host.n_writes = 0;
    host.fd = fd;
    host.refuse = host.sync_refuse = 0;
    host.shorten = 0;
    free(host.stable);
    host.stable = NULL;
}

static void watch_medium(int fd)
{
    watch(fd);
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    host.size = (uint64_t)st.st_size;
    host.stable = malloc(host.size);
    CHECK(pread(fd, host.stable, host.size, 0) == (ssize_t)host.size);
}

static void test_a_random_history_reads_as_the_model_does(bool overlay, enum how how)
{
    static struct bench b;
    seed = 1 + how + 7u * overlay;
    if (!bench_open(&b, overlay, how))
        return;
    for (int i = 0; i < (how == BLOCKING ? 600 : 80); i++) { /* real syncs take their time */
        batch(&b);
        if (draw(20) == 0)
            CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
        if (draw(50) == 0) { /* an overlay records what it holds when it is closed */
            vmm_disk_destroy(b.disk);
            open_disk(&b);
        }
    }
    check_all(&b);
    bench_close(&b);
}

/* ---- power cuts ---- */

/*
 * Every sector of the disk after the cut: what it was at the last flush, or one of the values written since. The
 * medium holds what was synced, and of the later writes any subset of sectors.
 */
static void power_cut(bool overlay, unsigned number)
{
    static struct bench b;
    seed = 1000 + number;
    CHECK(bench_open(&b, overlay, BLOCKING));
    watch_medium(b.fd);
    static uint8_t flushed[SIZE];
    static uint32_t written[SIZE / SECTOR]; /* since then: how often, up to 8 kept */
    static uint8_t later[SIZE / SECTOR][8][SECTOR];
    memcpy(flushed, b.model, SIZE);
    memset(written, 0, sizeof(written));
    for (unsigned i = draw(60); i; i--) {
        uint64_t at, size;
        place(NULL, 0, &at, &size);
        struct job j;
        job_prepare(&j, VMM_DISK_WRITE, at, size);
        memcpy(b.model + at, j.buffer, size);
        for (uint64_t s = at / SECTOR; s < (at + size) / SECTOR; s++)
            memcpy(later[s][written[s]++ % 8], b.model + s * SECTOR, SECTOR);
        const bool through = j.io.through = draw(8) == 0;
        CHECK_EQUAL(run(b.disk, &j), 0);
        job_free(&j);
        if (through || draw(8) == 0) {
            if (!through)
                CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
            memcpy(flushed, b.model, SIZE);
            memset(written, 0, sizeof(written));
        }
    }
    /* The cut: some sectors of what the host had not synced, in any order. */
    for (unsigned i = 0; i < host.n_writes; i++)
        for (uint64_t at = 0; at < host.writes[i].size; at += SECTOR)
            if (draw(2))
                memcpy(host.stable + host.writes[i].at + at, host.writes[i].bytes + at, SECTOR);
    const int after = temporary(host.size, BLOCKING);
    CHECK(syscall(SYS_pwrite64, after, host.stable, host.size, 0) == (ssize_t)host.size);
    watch(-1);
    vmm_disk_destroy(b.disk);
    close(b.fd);
    b.fd = after;
    open_disk(&b);
    static uint8_t bytes[SIZE];
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, 0, bytes, SIZE), 0);
    for (uint64_t s = 0; s < SIZE / SECTOR; s++) {
        bool known = !memcmp(bytes + s * SECTOR, flushed + s * SECTOR, SECTOR);
        for (uint32_t k = 0; k < 8 && k < written[s] && !known; k++)
            known = !memcmp(bytes + s * SECTOR, later[s][k], SECTOR);
        if (!known) {
            fprintf(stderr,
                    "%s, cut %u: sector %llu is neither what was flushed nor what was written since\n",
                    overlay ? "overlay" : "raw", number, (unsigned long long)s);
            exit(1);
        }
    }
    bench_close(&b);
}

/* ---- a host that fails ---- */

static void test_a_full_host_is_an_error_and_a_base_keeps_showing(bool overlay)
{
    static struct bench b;
    static uint8_t bytes[8192];
    CHECK(bench_open(&b, overlay, BLOCKING));
    watch(b.fd);
    host.refuse = ENOSPC;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 4096, bytes, 4096), -ENOSPC);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 8192 + 512, bytes, 512), -ENOSPC);
    host.refuse = 0;
    check_all(&b);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 4096, bytes, 8192), 0);
    memset(b.model + 4096, 0, 8192);
    check_all(&b);
    watch(-1);
    bench_close(&b);
}

static void test_a_write_the_host_shortens_is_finished(bool overlay)
{
    static struct bench b;
    static uint8_t bytes[20 * 4096];
    memset(bytes, 0x5a, sizeof(bytes));
    CHECK(bench_open(&b, overlay, BLOCKING));
    watch(b.fd);
    for (host.shorten = 4096 + 512; host.shorten < 10000; host.shorten += 1536) {
        CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 512 * 3, bytes, sizeof(bytes)), 0);
        memset(b.model + 512 * 3, 0x5a, sizeof(bytes));
        check_all(&b);
    }
    watch(-1);
    bench_close(&b);
}

/* Of a cluster that was written in part, the rest is not there: the base shows, not what the file holds. */
static void test_a_cluster_the_host_stopped_in_is_still_the_base(void)
{
    static struct bench b;
    static uint8_t bytes[3 * 4096];
    CHECK(bench_open(&b, true, BLOCKING));
    watch(b.fd);
    host.shorten = 4096 + 512;
    host.refuse = ENOSPC;
    host.accept = 1;
    struct job j = {.iov = {{bytes, sizeof(bytes)}}};
    j.io = (struct vmm_disk_io){
        .op = VMM_DISK_WRITE, .size = sizeof(bytes), .iov = j.iov, .n_iov = 1, .done = job_done};
    CHECK_EQUAL(run(b.disk, &j), -ENOSPC);
    CHECK_EQUAL(j.io.finished, 4096);
    memset(b.model, 0, 4096);
    check_all(&b);
    watch(-1);
    bench_close(&b);
}

/* Found by fuzz_undo.c: it was an I/O error without a reason, also where the host only had been interrupted. */
static void test_a_cluster_the_host_stopped_in_is_written_once_more(void)
{
    static struct bench b;
    static uint8_t bytes[4096];
    struct job j = {.iov = {{bytes, sizeof(bytes)}}};
    CHECK(bench_open(&b, true, BLOCKING));
    watch(b.fd);
    memset(bytes, 0x77, sizeof(bytes));
    host.shorten = 512;
    host.shorten_once = true;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 4096, bytes, sizeof(bytes)), 0);
    CHECK_EQUAL(host.shorten, 0);
    memset(b.model + 4096, 0x77, sizeof(bytes));
    check_all(&b);
    host.shorten = 512;
    host.refuse = ENOSPC;
    host.accept = 1;
    j.io = (struct vmm_disk_io){
        .op = VMM_DISK_WRITE, .at = 8192, .size = 4096, .iov = j.iov, .n_iov = 1, .done = job_done};
    CHECK_EQUAL(run(b.disk, &j), -ENOSPC);
    watch(-1);
    check_all(&b);
    host.shorten_once = false;
    bench_close(&b);
}

/* Both cover the same cluster, one of them in part: what only the other wrote is not lost to a copy from the base. */
static void test_a_part_of_a_cluster_waits_for_the_whole_that_is_under_way(enum how how)
{
    static struct bench b;
    if (!bench_open(&b, true, how))
        return;
    seed = 77;
    for (uint64_t cluster = 0; cluster < 100; cluster++) {
        struct job whole, part;
        job_prepare(&whole, VMM_DISK_WRITE, cluster * 4096, 4096);
        job_prepare(&part, VMM_DISK_WRITE, cluster * 4096 + 1024, 512);
        memcpy(b.model + whole.at, whole.buffer, whole.size);
        whole.over = vmm_disk_start(b.disk, &whole.io);
        vmm_disk_turn(b.disk);
        part.over = vmm_disk_start(b.disk, &part.io);
        finish(b.disk, &whole);
        finish(b.disk, &part);
        CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, part.at, b.model + part.at, part.size), 0);
        check_all(&b);
        job_free(&whole);
        job_free(&part);
    }
    bench_close(&b);
}

static void test_once_flushing_has_failed_no_flush_succeeds(bool overlay)
{
    static struct bench b;
    static uint8_t bytes[4096];
    CHECK(bench_open(&b, overlay, BLOCKING));
    watch(b.fd);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 0, bytes, 4096), 0);
    host.sync_refuse = EIO;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), -EIO);
    host.sync_refuse = 0;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), -EIO);
    struct job j;
    job_prepare(&j, VMM_DISK_WRITE, 0, 4096);
    j.io.through = true;
    CHECK_EQUAL(run(b.disk, &j), -EIO);
    job_free(&j);
    watch(-1);
    bench_close(&b);
}

/* File systems that wait for another machine are interrupted by signals. Found by fuzz_undo.c. */
static void test_a_flush_that_was_interrupted_is_made_again(bool overlay)
{
    static struct bench b;
    static uint8_t bytes[4096];
    CHECK(bench_open(&b, overlay, BLOCKING));
    watch(b.fd);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 0, bytes, 4096), 0);
    host.sync_interrupt = 2;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
    CHECK_EQUAL(host.sync_interrupt, 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
    watch(-1);
    bench_close(&b);
}

static void test_a_file_that_has_shrunk_ends_a_read(enum how how)
{
    static struct bench b;
    static _Alignas(4096) uint8_t bytes[16384];
    if (!bench_open(&b, false, how))
        return;
    CHECK(ftruncate(b.fd, 8192) == 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, 0, bytes, 8192), 0);
    struct job j = {.iov = {{bytes, 16384}}};
    j.io =
        (struct vmm_disk_io){.op = VMM_DISK_READ, .size = 16384, .iov = j.iov, .n_iov = 1, .done = job_done};
    CHECK_EQUAL(run(b.disk, &j), -ENODATA);
    CHECK_EQUAL(j.io.finished, 8192);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 12288, bytes, 4096), 0); /* it grows again */
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, 0, bytes, 16384), 0);
    bench_close(&b);
}

/* The real thing, through the io_uring: a limit on file size refuses what lies beyond. */
static void test_a_file_size_limit_is_an_error(void)
{
    static struct bench b;
    static uint8_t bytes[4096];
    CHECK(bench_open(&b, false, URING));
    CHECK(ftruncate(b.fd, 4096) == 0);
    struct rlimit before, limit;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 65536;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 131072, bytes, 4096), -EFBIG);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 0, bytes, 4096), 0);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    bench_close(&b);
}

/* Buffers as O_DIRECT would have them, so that what stands in for them does so for their length alone. */
static void test_long_transfers_are_whole_whether_there_is_a_buffer_for_them_or_not(bool overlay)
{
    enum { AT_ONCE = VMM_BOUNCE_BUFFERS + 4, ROOM = (SIZE + 4095) / 4096 * 4096 };
    static struct bench b;
    static struct job jobs[AT_ONCE];
    if (!bench_open(&b, overlay, DIRECT))
        return;
    for (unsigned round = 0; round < 4; round++) {
        uint8_t *bytes = aligned_alloc(4096, ROOM);
        for (unsigned i = 0; i < SIZE; i++)
            bytes[i] = b.model[i] = (uint8_t)draw(256);
        b.disk->bounce.off = round == 3;
        CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 0, bytes, SIZE), 0);
        free(bytes);
        for (unsigned i = 0; i < AT_ONCE; i++) {
            struct job *j = &jobs[i];
            const uint64_t at = i % 3 * SECTOR, size = SIZE - at - i % 2 * (SIZE / 3 / SECTOR * SECTOR);
            *j = (struct job){.at = at, .size = size, .buffer = aligned_alloc(4096, ROOM)};
            const uint64_t first = 4096 * (1 + draw(200));
            j->iov[0] = (struct iovec){j->buffer, first};
            j->iov[1] = (struct iovec){j->buffer + first, size - first};
            j->io = (struct vmm_disk_io){.op = VMM_DISK_READ, .at = at, .size = size, .done = job_done};
            j->io.iov = j->iov;
            j->io.n_iov = 2;
            j->over = vmm_disk_start(b.disk, &j->io);
        }
        CHECK_EQUAL(!b.disk->bounce.taken, round == 3);
        for (unsigned i = 0; i < AT_ONCE; i++) {
            finish(b.disk, &jobs[i]);
            CHECK_EQUAL(jobs[i].io.error, 0);
            CHECK(!memcmp(jobs[i].buffer, b.model + jobs[i].at, jobs[i].size));
            free(jobs[i].buffer);
        }
        CHECK_EQUAL(b.disk->bounce.taken, 0);
    }
    bench_close(&b);
}

static void test_cancelling_ends_what_is_under_way(void)
{
    static struct bench b;
    if (!bench_open(&b, true, DIRECT))
        return;
    seed = 5;
    struct job jobs[32];
    for (int i = 0; i < 32; i++) {
        job_prepare(&jobs[i], i % 2 ? VMM_DISK_WRITE : VMM_DISK_READ, (uint64_t)i * 8192 + 512, 6144);
        jobs[i].over = vmm_disk_start(b.disk, &jobs[i].io);
    }
    vmm_disk_drain(b.disk, true);
    CHECK_EQUAL(b.disk->under_way, 0);
    CHECK_EQUAL(b.disk->host_io.under_way, 0);
    for (int i = 0; i < 32; i++) {
        CHECK(jobs[i].over && (jobs[i].io.error == 0 || jobs[i].io.error == -ECANCELED));
        job_free(&jobs[i]);
    }
    bench_close(&b);
}

static void test_an_overlay_grows_and_does_not_shrink(void)
{
    static struct bench b;
    static uint8_t bytes[4096], zeros[4096];
    CHECK(bench_open(&b, true, BLOCKING));
    CHECK_EQUAL(vmm_disk_resize(b.disk, SIZE - 512, false), -EBUSY);
    CHECK_EQUAL(vmm_disk_resize(b.disk, (BITMAP_SIZE * 8ull + 1) * 4096, false), -EINVAL);
    CHECK_EQUAL(vmm_disk_resize(b.disk, BITMAP_SIZE * 8ull * 4096, false), 0);
    const uint64_t last = (BITMAP_SIZE * 8ull - 1) * 4096;
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, last, bytes, 4096), 0);
    CHECK(!memcmp(bytes, zeros, 4096));
    memset(bytes, 7, 4096);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, last, bytes, 4096), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, SIZE, bytes, 4096), 0); /* past the old end: not the base */
    CHECK(!memcmp(bytes, zeros, 4096));
    bench_close(&b);
}

static void test_an_overlay_whose_bitmap_is_too_small_is_refused(void)
{
    const int fd = temporary(1 << 20, BLOCKING);
    vmm_disk *disk = NULL;
    const vmm_disk_layer base = {.fd = fd, .size = 4096}, good = {fd, 4096, 4096, 4096, 8192};
    const vmm_disk_layer bad[] = {{fd, (4096 * 8 + 1) * 4096ull, 4096, 4096, 8192},
                                  {fd, 4096, 8192, 4096, 8192}, /* over the data */
                                  {fd, 4096, 4096, 100, 8192},
                                  {fd, 4096, UINT64_MAX - 4095, 8192, 8192}};
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        CHECK_EQUAL(vmm_disk_open_overlay((vmm_disk_layer[]){bad[i], base}, 2, 1, 0, &disk), -EINVAL);
        CHECK_EQUAL(vmm_disk_open_overlay((vmm_disk_layer[]){good, bad[i], base}, 3, 1, 0, &disk), -EINVAL);
    }
    CHECK_EQUAL(vmm_disk_open_overlay(&good, 1, 1, 0, &disk), -EINVAL); /* no base */
    CHECK_EQUAL(vmm_disk_open_overlay((vmm_disk_layer[]){good, good}, 2, 1, 0, &disk), -EINVAL);
    CHECK_EQUAL(vmm_disk_open_overlay((vmm_disk_layer[]){good, base}, 2, 1, 0, &disk), 0);
    vmm_disk_destroy(disk);
    close(fd);
}

/* A layer that is smaller than what lies on it: zeros follow it, whatever its own base has there. */
static void test_what_a_layer_is_short_of_is_zeros(void)
{
    static uint8_t bytes[4 * 4096], read[4 * 4096];
    memset(bytes, 0xbb, sizeof(bytes));
    const int base = temporary(4 * 4096, BLOCKING), lower = temporary(DATA_AT + 2 * 4096, BLOCKING),
              top = temporary(DATA_AT + 4 * 4096, BLOCKING);
    CHECK(pwrite(base, bytes, sizeof(bytes), 0) == sizeof(bytes));
    const vmm_disk_layer layers[] = {{top, 4 * 4096, BITMAP_AT, BITMAP_SIZE, DATA_AT},
                                     {lower, 4096 + 512, BITMAP_AT, BITMAP_SIZE, DATA_AT},
                                     {.fd = base, .size = 4 * 4096}};
    vmm_disk *disk;
    CHECK_EQUAL(vmm_disk_open_overlay(layers, 3, 1, VMM_DISK_BLOCKING, &disk), 0);
    memset(bytes + 4096 + 512, 0, sizeof(bytes) - 4096 - 512);
    CHECK_EQUAL(simple(disk, VMM_DISK_READ, 0, read, sizeof(read)), 0);
    CHECK(!memcmp(read, bytes, sizeof(read)));
    memset(bytes + 4096, 0xcc, 512); /* a part of a cluster: the rest of it is copied up */
    CHECK_EQUAL(simple(disk, VMM_DISK_WRITE, 4096, bytes + 4096, 512), 0);
    CHECK_EQUAL(simple(disk, VMM_DISK_READ, 0, read, sizeof(read)), 0);
    CHECK(!memcmp(read, bytes, sizeof(read)));
    vmm_disk_destroy(disk);
    close(base);
    close(lower);
    close(top);
}

static void test_layers_read_as_one_disk_and_only_the_last_is_written(enum how how)
{
    static struct bench b;
    static uint8_t before[GENERATIONS][OVERLAY_SIZE], after[OVERLAY_SIZE];
    seed = 300 + how;
    if (!bench_open(&b, true, how))
        return;
    while (true) {
        for (int i = 0; i < 40; i++)
            batch(&b);
        check_all(&b);
        if (b.n_middle == GENERATIONS)
            break;
        vmm_disk_destroy(b.disk);
        CHECK(fcntl(b.fd, F_SETFL, 0) == 0); /* what lies below is read through the page cache */
        CHECK(pread(b.fd, before[b.n_middle], OVERLAY_SIZE, 0) == OVERLAY_SIZE);
        b.middle[b.n_middle++] = b.fd;
        b.fd = temporary(OVERLAY_SIZE, how);
        open_disk(&b);
        check_all(&b);
    }
    for (unsigned i = 0; i < GENERATIONS; i++) {
        CHECK(pread(b.middle[i], after, OVERLAY_SIZE, 0) == OVERLAY_SIZE);
        CHECK(!memcmp(before[i], after, OVERLAY_SIZE));
    }
    bench_close(&b);
}

int main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    for (int overlay = 0; overlay < 2; overlay++) {
        for (enum how how = 0; how < HOWS; how++)
            test_a_random_history_reads_as_the_model_does(overlay, how);
        for (unsigned i = 0; i < 100; i++)
            power_cut(overlay, i);
        test_a_full_host_is_an_error_and_a_base_keeps_showing(overlay);
        test_a_write_the_host_shortens_is_finished(overlay);
        test_once_flushing_has_failed_no_flush_succeeds(overlay);
        test_a_flush_that_was_interrupted_is_made_again(overlay);
        test_long_transfers_are_whole_whether_there_is_a_buffer_for_them_or_not(overlay);
    }
    test_a_cluster_the_host_stopped_in_is_still_the_base();
    test_a_cluster_the_host_stopped_in_is_written_once_more();
    for (enum how how = 0; how < HOWS; how++) {
        test_a_part_of_a_cluster_waits_for_the_whole_that_is_under_way(how);
        test_a_file_that_has_shrunk_ends_a_read(how);
        test_layers_read_as_one_disk_and_only_the_last_is_written(how);
    }
    test_a_file_size_limit_is_an_error();
    test_cancelling_ends_what_is_under_way();
    test_an_overlay_grows_and_does_not_shrink();
    test_an_overlay_whose_bitmap_is_too_small_is_refused();
    test_what_a_layer_is_short_of_is_zeros();
    puts("disk: ok");
    return 0;
}
