/* SPDX-License-Identifier: Apache-2.0 */
/* Undo logs against a model: random histories with several logs at once, through every engine; logs that cannot keep. */
#include "blk_guest.h"
#include "disk/undo.h"
#include "disk_bench.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define LOGS 3

struct log {
    vmm_undo *undo; /* NULL: closed */
    uint8_t past[SIZE];
};

static void log_open(struct bench *b, struct log *log, int fd)
{
    CHECK_EQUAL(vmm_disk_undo_open(b->disk, fd, &log->undo), 0);
    memcpy(log->past, b->model, SIZE);
}

static int64_t log_back(struct bench *b, struct log *log)
{
    const int64_t n = vmm_disk_undo_back(log->undo);
    memcpy(b->model, log->past, SIZE);
    check_all(b);
    return n;
}

static void log_close(struct log *log)
{
    if (log->undo)
        vmm_disk_undo_close(log->undo);
    log->undo = NULL;
}

static void test_any_log_goes_back_to_its_past_in_any_order(bool overlay, enum how how)
{
    static struct bench b;
    static struct log logs[LOGS];
    seed = 500 + how + 7u * overlay;
    if (!bench_open(&b, overlay, how))
        return;
    unsigned backs = 0;
    for (int i = 0; i < (how == BLOCKING ? 1500 : 300); i++) {
        struct log *log = &logs[draw(LOGS)];
        if (draw(3))
            batch(&b);
        else if (!log->undo)
            log_open(&b, log, -1);
        else if (draw(4) == 0)
            log_close(log);
        else {
            CHECK(log_back(&b, log) >= 0);
            CHECK_EQUAL(vmm_disk_undo_back(log->undo), 0); /* nothing has changed since */
            backs++;
        }
        if (draw(40) == 0)
            CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
    }
    CHECK(backs > 20);
    check_all(&b);
    for (unsigned i = 0; i < LOGS; i++)
        log_close(&logs[i]);
    CHECK(!b.disk->undo);
    vmm_disk_destroy(b.disk); /* what was gone back to is what a closed disk holds */
    open_disk(&b);
    check_all(&b);
    bench_close(&b);
}

/* Requests of before the log are under way when it is opened: they belong to its past. Those under way when it goes
 * back are of its future. */
static void test_what_is_under_way_is_of_the_past_of_a_log_that_opens(bool overlay, enum how how)
{
    static struct bench b;
    static struct log log;
    seed = 900;
    if (!bench_open(&b, overlay, how))
        return;
    for (int round = 0; round < 20; round++) {
        struct job before[8], after[8];
        for (unsigned i = 0; i < 8; i++) {
            job_prepare(&before[i], VMM_DISK_WRITE, i * 9 * 4096 + 512, 8 * 4096);
            memcpy(b.model + before[i].at, before[i].buffer, before[i].size);
            before[i].over = vmm_disk_start(b.disk, &before[i].io);
        }
        log_open(&b, &log, -1);
        CHECK_EQUAL(b.disk->under_way, 0);
        for (unsigned i = 0; i < 8; i++) {
            job_prepare(&after[i], VMM_DISK_WRITE, i * 7 * 4096 + 1536, 6 * 4096);
            after[i].over = vmm_disk_start(b.disk, &after[i].io);
        }
        CHECK(log_back(&b, &log) >= 8 * 6);
        struct job reading;
        job_prepare(&reading, VMM_DISK_READ, 4096, 8 * 4096);
        reading.over = vmm_disk_start(b.disk, &reading.io);
        CHECK_EQUAL(vmm_disk_undo_back(log.undo), 0); /* waits also where it has nothing to do */
        CHECK(reading.over);
        job_free(&reading);
        log_close(&log);
        for (unsigned i = 0; i < 8; i++) {
            CHECK(before[i].over && after[i].over && !before[i].io.error && !after[i].io.error);
            job_free(&before[i]);
            job_free(&after[i]);
        }
    }
    bench_close(&b);
}

static void test_a_log_keeps_each_cluster_once_and_only_what_changes(bool overlay)
{
    static struct bench b;
    static struct log log;
    static uint8_t bytes[8 * 4096];
    CHECK(bench_open(&b, overlay, BLOCKING));
    log_open(&b, &log, -1);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_READ, 0, bytes, sizeof(bytes)), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_DISCARD, 0, NULL, sizeof(bytes)), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_FLUSH, 0, NULL, 0), 0);
    CHECK_EQUAL(vmm_disk_undo_back(log.undo), 0);
    check_all(&b); /* the discard too: it was not taken */
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 4096 + 512, bytes, 4096), 0); /* parts of two */
    CHECK_EQUAL(simple(b.disk, VMM_DISK_ZERO, SIZE - 512, NULL, 512), 0); /* the last, not a whole one */
    CHECK_EQUAL(log_back(&b, &log), 3);
    CHECK_EQUAL(log_back(&b, &log), 0);
    log_close(&log);
    bench_close(&b);
}

static void test_going_back_is_a_change_for_the_other_logs(bool overlay)
{
    static struct bench b;
    static struct log first, second;
    static uint8_t bytes[4096];
    seed = 3;
    CHECK(bench_open(&b, overlay, BLOCKING));
    log_open(&b, &first, -1);
    memset(bytes, 1, sizeof(bytes));
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 40960, bytes, 4096), 0);
    memcpy(b.model + 40960, bytes, 4096);
    log_open(&b, &second, -1);
    CHECK_EQUAL(log_back(&b, &first), 1);
    CHECK_EQUAL(log_back(&b, &second), 1);
    CHECK_EQUAL(b.model[40960], 1);
    CHECK_EQUAL(log_back(&b, &first), 1);
    CHECK_EQUAL(log_back(&b, &second), 1);
    log_close(&first);
    CHECK_EQUAL(log_back(&b, &second), 0);
    log_close(&second);
    bench_close(&b);
}

/* The log's file has room for ten clusters. The write that needs an eleventh fails and changes nothing. */
static void test_a_write_that_cannot_be_undone_does_not_happen(bool overlay, enum how how)
{
    static struct bench b;
    static struct log log;
    static _Alignas(4096) uint8_t bytes[64 * 4096];
    seed = 8;
    if (!bench_open(&b, overlay, how))
        return;
    const int fd = memfd_create("test-undo", MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && ftruncate(fd, 10 * 4096) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) == 0);
    log_open(&b, &log, fd);
    memset(bytes, 0xee, sizeof(bytes));
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 0, bytes, 8 * 4096), 0);
    memset(b.model, 0xee, 8 * 4096);
    struct job j = {.iov = {{bytes, 4 * 4096}}};
    j.io = (struct vmm_disk_io){
        .op = VMM_DISK_WRITE, .at = 32 * 4096, .size = 4 * 4096, .iov = j.iov, .n_iov = 1, .done = job_done};
    CHECK_EQUAL(run(b.disk, &j), -EPERM);
    CHECK(j.io.unkept);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_ZERO, 64 * 4096, NULL, 64 * 4096), -EPERM);
    check_all(&b);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 4096, bytes, 4096), 0); /* kept already */
    CHECK_EQUAL(log_back(&b, &log), 8);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 32 * 4096, bytes, 4 * 4096), 0); /* room again */
    CHECK_EQUAL(log_back(&b, &log), 4);
    log_close(&log);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 32 * 4096, bytes, 64 * 4096), 0);
    close(fd);
    bench_close(&b);
}

/* The host's own refusal, half way through a long write: what came before it happened, and goes back. */
static void test_a_file_size_limit_on_the_log_is_an_error_of_the_write(void)
{
    static struct bench b;
    static struct log log;
    static uint8_t bytes[64 * 4096];
    seed = 9;
    CHECK(bench_open(&b, false, URING));
    log_open(&b, &log, -1);
    struct rlimit before, limit;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 40 * 4096 + 100;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    for (int i = 0; i < 40; i++)
        CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, (uint64_t)(i % 8) * 4096 + 512, bytes, 512), 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_ZERO, 0, NULL, 60 * 4096), -EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(log_back(&b, &log) >= 8);
    log_close(&log);
    bench_close(&b);
}

/* The disk cannot be read (its file has shrunk), then cannot be written: the log loses nothing of what it has. */
static void test_a_host_that_fails_loses_nothing_that_was_kept(void)
{
    static struct bench b;
    static struct log log;
    static uint8_t bytes[4 * 4096];
    seed = 10;
    CHECK(bench_open(&b, false, BLOCKING));
    batch(&b);
    log_open(&b, &log, -1);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 100 * 4096, bytes, sizeof(bytes)), 0);
    const int whole = dup(b.fd);
    CHECK(ftruncate(whole, 200 * 4096) == 0);
    CHECK_EQUAL(simple(b.disk, VMM_DISK_WRITE, 250 * 4096, bytes, 4096), -ENODATA);
    CHECK(ftruncate(whole, SIZE) == 0);
    memset(b.model + 200 * 4096, 0, SIZE - 200 * 4096);
    memset(log.past + 200 * 4096, 0, SIZE - 200 * 4096);
    struct rlimit before, limit;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = 101 * 4096;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK_EQUAL(vmm_disk_undo_back(log.undo), -EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK_EQUAL(log_back(&b, &log), 4);
    log_close(&log);
    close(whole);
    bench_close(&b);
}

static void test_a_disk_keeps_its_size_while_a_log_is_open(void)
{
    static struct bench b;
    static struct log log;
    CHECK(bench_open(&b, false, BLOCKING));
    log_open(&b, &log, -1);
    CHECK_EQUAL(vmm_disk_resize(b.disk, SIZE + 4096, false), -EBUSY);
    CHECK_EQUAL(vmm_disk_size(b.disk), SIZE);
    log_close(&log);
    CHECK_EQUAL(vmm_disk_resize(b.disk, SIZE + 4096, false), 0);
    CHECK_EQUAL(vmm_disk_undo_open(b.disk, -1, &log.undo), 0);
    vmm_disk_destroy(b.disk); /* and closes the log */
    close(b.base);
    close(b.fd);
}

static void test_a_long_write_lets_others_have_their_turn(void)
{
    const uint64_t size = 16u << 20, step = 2u << 20;
    const int fd = temporary(size, URING), kept = temporary(0, URING);
    vmm_disk *disk;
    vmm_undo *undo;
    struct stat st;
    struct job j;
    CHECK_EQUAL(vmm_disk_open_raw(fd, size, 1, 0, &disk), 0);
    if (vmm_disk_fd(disk) >= 0) {
        CHECK_EQUAL(vmm_disk_undo_open(disk, kept, &undo), 0);
        job_prepare(&j, VMM_DISK_WRITE, 512, size - 512);
        CHECK(!vmm_disk_start(disk, &j.io));
        CHECK(fstat(kept, &st) == 0);
        CHECK_EQUAL(st.st_size, step);
        finish(disk, &j);
        CHECK_EQUAL(j.io.error, 0);
        CHECK_EQUAL(vmm_disk_undo_back(undo), size / 4096);
        job_free(&j);
        uint8_t *bytes = malloc(size);
        CHECK_EQUAL(simple(disk, VMM_DISK_READ, 0, bytes, size), 0);
        CHECK(!bytes[0] && !memcmp(bytes, bytes + 1, size - 1));
        free(bytes);
        CHECK(fstat(kept, &st) == 0);
        CHECK_EQUAL(st.st_size, 0); /* so much room is given back */
    }
    vmm_disk_destroy(disk);
    close(fd);
    close(kept);
}

/* ---- through the device ---- */

static void device(struct guest *g, struct bench *b, bool overlay)
{
    CHECK(bench_open(b, overlay, URING));
    const vmm_blk_options options = {.sector = 512, .queues = 1};
    guest_create(g, b->disk, &options);
    guest_start(g, 0, 64);
}

static void device_close(struct guest *g, struct bench *b)
{
    guest_destroy(g);
    close(b->base);
    close(b->fd);
}

static void test_a_device_goes_back_with_requests_in_its_ring(bool overlay)
{
    static struct bench b;
    static struct guest g;
    static uint8_t past[16 * 4096];
    seed = 20;
    device(&g, &b, overlay);
    for (unsigned i = 0; i < sizeof(past); i++)
        past[i] = guest_data(&g)[i] = (uint8_t)draw(256);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 8, sizeof(past), false), VMM_BLK_OK);
    vmm_undo *undo;
    CHECK_EQUAL(vmm_blk_undo_open(g.blk, -1, &undo), 0);
    for (int round = 0; round < 50; round++) {
        memset(guest_data(&g), round, sizeof(past));
        for (unsigned i = 0; i < 16; i++) {
            const uint64_t header = guest_header(&g, VMM_BLK_OUT, 8 + i * 8);
            const struct piece pieces[] = {OUT(header, 16), OUT(GUEST_DATA + i * 4096, 4096),
                                           IN(header + GUEST_STATUS, 1)};
            ring_offer(&g.rings[0], pieces, 3);
        }
        guest_ring(&g, 0);
        int64_t n = 0;
        if (round % 2) /* with all, some or none of them taken from the ring */
            CHECK((n = vmm_blk_undo_back(g.blk, undo)) >= 0);
        for (unsigned i = 0; i < 16; i++)
            guest_wait(&g, 0, NULL);
        const int64_t rest = vmm_blk_undo_back(g.blk, undo);
        CHECK(rest >= 0 && rest <= 16 && n + rest >= 16);
        CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 8, sizeof(past), true), VMM_BLK_OK);
        CHECK(!memcmp(guest_data(&g), past, sizeof(past)));
    }
    vmm_blk_undo_close(g.blk, undo);
    CHECK_EQUAL(vmm_blk_sync(g.blk), 0);
    device_close(&g, &b);
}

static void test_a_log_that_is_full_is_the_guests_io_error_with_the_reason(void)
{
    static struct bench b;
    static struct guest g;
    device(&g, &b, false);
    const int fd = memfd_create("test-undo", MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) == 0);
    vmm_undo *undo;
    CHECK_EQUAL(vmm_blk_undo_open(g.blk, fd, &undo), 0);
    memset(guest_data(&g), 5, 4096);
    CHECK_EQUAL(guest_request(&g, VMM_BLK_OUT, 0, 4096, false), VMM_BLK_IOERR);
    CHECK(strstr(g.text,
                 "keeping for a checkpoint what is in test.img failed at byte 0: Operation not permitted"));
    CHECK_EQUAL(guest_request(&g, VMM_BLK_IN, 0, 4096, true), VMM_BLK_OK);
    CHECK_EQUAL(guest_data(&g)[0], 0);
    CHECK_EQUAL(vmm_blk_resize(g.blk, SIZE + 512, false), -EBUSY);
    CHECK_EQUAL(vmm_blk_undo_back(g.blk, undo), 0);
    close(fd);
    device_close(&g, &b); /* closes the log */
}

int main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    for (int overlay = 0; overlay < 2; overlay++) {
        for (enum how how = 0; how < HOWS; how++) {
            test_any_log_goes_back_to_its_past_in_any_order(overlay, how);
            test_what_is_under_way_is_of_the_past_of_a_log_that_opens(overlay, how);
            test_a_write_that_cannot_be_undone_does_not_happen(overlay, how);
        }
        test_a_log_keeps_each_cluster_once_and_only_what_changes(overlay);
        test_going_back_is_a_change_for_the_other_logs(overlay);
        test_a_device_goes_back_with_requests_in_its_ring(overlay);
    }
    test_a_file_size_limit_on_the_log_is_an_error_of_the_write();
    test_a_host_that_fails_loses_nothing_that_was_kept();
    test_a_disk_keeps_its_size_while_a_log_is_open();
    test_a_long_write_lets_others_have_their_turn();
    test_a_log_that_is_full_is_the_guests_io_error_with_the_reason();
    puts("undo: ok");
    return 0;
}
