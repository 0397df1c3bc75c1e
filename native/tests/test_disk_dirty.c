/* SPDX-License-Identifier: Apache-2.0 */
/* Logs of what changes on a disk: a copy that follows them is the disk, whatever was under way when it was made. */
#include "blk_guest.h"
#include "disk/dirty.h"
#include "disk/undo.h"
#include "disk_bench.h"

#include <errno.h>

#define LOGS 2
#define CLUSTERS ((SIZE + 4095) / 4096)

struct follower {
    vmm_disk_dirty *log;
    _Alignas(4096) uint8_t copy[SIZE]; /* as O_DIRECT has it */
};

static void follow(struct bench *b, struct follower *f)
{
    CHECK_EQUAL(vmm_disk_dirty_open(b->disk, &f->log), 0);
    CHECK_EQUAL(vmm_disk_dirty_count(f->log), 0);
    CHECK_EQUAL(vmm_disk_read_now(b->disk, 0, SIZE, f->copy), 0);
}

/* Some of what is in the log, or all of it. */
static void catch_up(struct bench *b, struct follower *f, unsigned runs)
{
    uint64_t at = 0, size;
    for (; runs && (size = vmm_disk_dirty_take(f->log, &at, (1 + draw(20)) * 4096)); runs--) {
        CHECK(at % 4096 == 0 && (size % 4096 == 0 || at + size == SIZE) && at + size <= SIZE);
        CHECK_EQUAL(vmm_disk_read_now(b->disk, at, size, f->copy + at), 0);
        at += size;
    }
}

static void test_a_copy_that_follows_its_log_is_the_disk(bool overlay, enum how how)
{
    static struct bench b;
    static struct follower followers[LOGS];
    static _Alignas(4096) uint8_t whole[SIZE];
    seed = 40 + how + 7u * overlay;
    if (!bench_open(&b, overlay, how))
        return;
    for (int round = 0; round < 60; round++) {
        for (unsigned i = 0; i < LOGS; i++)
            if (!followers[i].log && draw(3) == 0)
                follow(&b, &followers[i]);
        struct job under_way[4];
        for (unsigned i = 0; i < 4; i++) {
            job_prepare(&under_way[i], VMM_DISK_WRITE, i * 70 * 4096 + 512, (1 + draw(60)) * 4096);
            memcpy(b.model + under_way[i].at, under_way[i].buffer, under_way[i].size);
            under_way[i].over = vmm_disk_start(b.disk, &under_way[i].io);
        }
        for (unsigned i = 0; i < LOGS; i++)
            if (followers[i].log)
                catch_up(&b, &followers[i], 1 + draw(4)); /* what is in motion comes again */
        for (unsigned i = 0; i < 4; i++) {
            finish(b.disk, &under_way[i]);
            CHECK_EQUAL(under_way[i].io.error, 0);
            job_free(&under_way[i]);
        }
        batch(&b);
        for (unsigned i = 0; i < LOGS; i++) {
            if (!followers[i].log || draw(4))
                continue;
            catch_up(&b, &followers[i], UINT32_MAX);
            CHECK_EQUAL(vmm_disk_dirty_count(followers[i].log), 0);
            CHECK_EQUAL(vmm_disk_read_now(b.disk, 0, SIZE, whole), 0);
            CHECK(!memcmp(followers[i].copy, whole, SIZE) && !memcmp(whole, b.model, SIZE));
            if (draw(3) == 0) {
                vmm_disk_dirty_close(followers[i].log);
                followers[i].log = NULL;
            }
        }
    }
    CHECK_EQUAL(vmm_disk_resize(b.disk, SIZE + 4096, false), b.disk->dirty ? -EBUSY : 0);
    bench_close(&b); /* and closes the logs */
    memset(followers, 0, sizeof(followers));
}

static void test_the_log_has_each_cluster_that_changed_and_no_other(void)
{
    static struct bench b;
    static _Alignas(4096) uint8_t bytes[3 * 4096];
    vmm_disk_dirty *log;
    vmm_undo *undo;
    seed = 50;
    CHECK(bench_open(&b, false, BLOCKING));
    CHECK_EQUAL(vmm_disk_undo_open(b.disk, -1, &undo), 0);
    CHECK_EQUAL(vmm_disk_dirty_open(b.disk, &log), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, 0, bytes, sizeof(bytes)), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
    CHECK_EQUAL(vmm_disk_dirty_count(log), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 63 * 4096 + 512, bytes, 4096), 0); /* in two, of two words */
    CHECK_EQUAL(simple(b.disk, VMM_DISK_ZERO, 65 * 4096, NULL, 64 * 4096), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, SIZE - 512, bytes, 512), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, SIZE - 512, bytes, 512), 0);
    CHECK_EQUAL(vmm_disk_dirty_count(log), 2 + 64 + 1);
    uint64_t at = 0;
    CHECK_EQUAL(vmm_disk_dirty_take(log, &at, UINT64_MAX), 66 * 4096);
    CHECK_EQUAL(at, 63 * 4096);
    CHECK_EQUAL(vmm_disk_dirty_take(log, &at, UINT64_MAX), 512);
    CHECK_EQUAL(at, SIZE - 512);
    at = 0;
    CHECK_EQUAL(vmm_disk_dirty_take(log, &at, UINT64_MAX), 0);
    CHECK_EQUAL(vmm_disk_undo_back(undo), 2 + 64 + 1); /* going back is a change */
    CHECK_EQUAL(vmm_disk_dirty_count(log), 2 + 64 + 1);
    at = 64 * 4096;
    CHECK_EQUAL(vmm_disk_dirty_take(log, &at, 2 * 4096), 2 * 4096);
    CHECK_EQUAL(at, 64 * 4096);
    at = SIZE;
    CHECK_EQUAL(vmm_disk_dirty_take(log, &at, UINT64_MAX), 0);
    CHECK_EQUAL(vmm_disk_dirty_count(log), 1 + 63 - 1 + 1 + 1);
    bench_close(&b);
}

/* A write that fails may have changed a part. */
static void test_a_write_that_fails_is_in_the_log(void)
{
    static struct bench b;
    static _Alignas(4096) uint8_t bytes[4096];
    vmm_disk_dirty *log;
    CHECK(bench_open(&b, false, BLOCKING));
    CHECK_EQUAL(vmm_disk_dirty_open(b.disk, &log), 0);
    const int writable = b.disk->fd;
    b.disk->fd = open("/dev/null", O_RDONLY);
    CHECK(simple(b.disk, VMM_DISK_WRITE, 8192, bytes, 4096) < 0);
    close(b.disk->fd);
    b.disk->fd = writable;
    CHECK_EQUAL(vmm_disk_dirty_count(log), 1);
    bench_close(&b);
}

static void test_what_lies_nowhere_is_told_from_what_has_to_be_read(bool overlay)
{
    static struct bench b;
    static struct guest g;
    static _Alignas(4096) uint8_t bytes[4096], whole[CLUSTERS * 4096], read[CLUSTERS * 4096];
    seed = 60;
    CHECK(bench_open(&b, overlay, URING));
    memset(bytes, 7, sizeof(bytes));
    for (unsigned i = 0; i < 5; i++)
        CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, (i * 61 + 210 * (i == 4)) % 300 * 4096, bytes, 4096), 0);
    CHECK_EQUAL(vmm_disk_read_now(b.disk, 0, SIZE, whole), 0);
    guest_create(&g, b.disk, &(vmm_blk_options){.sector = 512, .queues = 1});
    uint64_t at = 0, n, nothing = 0;
    int zeros;
    for (; (n = vmm_blk_extent(g.blk, at, &zeros)); at += n) {
        CHECK(n <= SIZE - at);
        nothing += zeros ? n : 0;
        if (!zeros)
            CHECK_EQUAL(vmm_blk_peek(g.blk, at, n, read + at), 0);
    }
    CHECK_EQUAL(at, SIZE);
    CHECK(nothing >= 50 * 4096 && !memcmp(read, whole, SIZE));
    CHECK_EQUAL(vmm_blk_peek(g.blk, 0, SIZE, read), 0);
    CHECK(!memcmp(read, whole, SIZE));
    CHECK_EQUAL(vmm_blk_peek(g.blk, SIZE - 512, 1024, read), -ENODATA);
    CHECK_EQUAL(vmm_blk_peek(g.blk, UINT64_MAX, 1, read), -ENODATA);
    CHECK_EQUAL(vmm_blk_extent(g.blk, UINT64_MAX, &zeros), 0);
    guest_destroy(&g);
    close(b.base);
    close(b.fd);
}

static void test_a_file_is_cleared_where_it_is_told_to_be(void)
{
    static uint8_t bytes[200 << 10], read[200 << 10];
    for (enum how how = BLOCKING; how <= URING; how++) { /* tmpfs, and what /tmp is */
        memset(bytes, 9, sizeof(bytes));
        const int fd = temporary(sizeof(bytes), how);
        CHECK(pwrite(fd, bytes, sizeof(bytes), 0) == sizeof(bytes));
        CHECK_EQUAL(vmm_disk_clear(fd, 4096 + 100, 150 << 10), 0);
        memset(bytes + 4096 + 100, 0, 150 << 10);
        CHECK(pread(fd, read, sizeof(read), 0) == sizeof(read) && !memcmp(read, bytes, sizeof(bytes)));
        close(fd);
    }
    const int readonly = open("/dev/null", O_RDONLY);
    CHECK_EQUAL(vmm_disk_clear(readonly, 0, 4096), -EBADF);
    close(readonly);
}

int main(void)
{
    for (int overlay = 0; overlay < 2; overlay++) {
        for (enum how how = 0; how < HOWS; how++)
            test_a_copy_that_follows_its_log_is_the_disk(overlay, how);
        test_what_lies_nowhere_is_told_from_what_has_to_be_read(overlay);
    }
    test_the_log_has_each_cluster_that_changed_and_no_other();
    test_a_write_that_fails_is_in_the_log();
    test_a_file_is_cleared_where_it_is_told_to_be();
    puts("disk dirty: ok");
    return 0;
}
