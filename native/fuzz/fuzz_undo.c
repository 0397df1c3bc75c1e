/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-blk over asynchronous host I/O, with undo logs, resets and roll-backs at any moment, compared byte for byte
 * with a model. The host is simulated: the input says which operation the host carries out next and when its
 * completion is seen, in any order, whole, in part, interrupted or failed. What must hold: every request is answered
 * once; a read holds bytes that the disk held while it was under way; a write that is over is there; a log brings back
 * exactly what the disk held when it was opened; after a reset nothing is under way.
 */
#include "driven.h"

#include "blk_guest.h"
#include "disk/undo.h"

#define take take_request
#include "virtio/blk.c" /* to give its device a fresh disk for each input */
#undef take

#include <fcntl.h>
#include <sys/eventfd.h>

enum kind { RAW, DIRECT, OVERLAY, KINDS }; /* DIRECT: with the alignment that O_DIRECT asks for */

#define SECTOR 512u
#define CLUSTER 4096u
#define SIZE (5 * CLUSTER + 3 * SECTOR) /* the last cluster is not whole */
#define SECTORS (SIZE / SECTOR)
#define BASE_SIZE (3 * CLUSTER + SECTOR)
#define BITMAP_AT 4096u
#define DATA_AT 8192u

enum { SLOTS = 12, RING_SIZE = 64, LOGS = 2, OPS = 64, ROOM_OF_A_SMALL_LOG = 3 };
#define SLOT_DATA(slot) (GUEST_DATA + (slot)*0x10000ull)
#define SLOT_HEADER(slot) (0x80000ull + (slot)*64)
#define SLOT_STATUS(slot) (0x84000ull + (slot))

/* What a byte of a sector may be besides what the model has: written by requests that are not over. */
struct tags {
    uint64_t bits[4];
};

struct slot {
    bool used, reads, writes, discards;
    uint64_t at[2], size[2];
    uint8_t tag;
    int id;
    uint8_t before[SIZE]; /* of a read: what it may hold, beside the tags */
    struct tags tags[SECTORS];
};

enum op_state { FREE, GATHERED, SUBMITTED, DONE, COMPLETED };
struct host_op {
    enum op_state state;
    enum { TRANSFER, SYNC, ALLOCATE } what;
    struct vmm_host_io_op *op;
    bool write;
    int fd, mode;
    const struct iovec *iov;
    unsigned n_iov;
    uint64_t at, size;
    int64_t result;
};

static struct {
    struct input in;
    bool faithful; /* the host does as it is told */
    unsigned faults;
    struct host_op ops[OPS];
} host;

static struct {
    uint8_t bytes[SIZE];
    struct tags tags[SECTORS];
    uint8_t writers[SECTORS];
    bool shared[SECTORS]; /* by requests under way at a time: which was last is not known */
} model;

static struct log {
    vmm_undo *undo; /* NULL: closed */
    bool small;
    uint8_t past[SIZE];
} logs[LOGS];

static struct guest guest;
static struct slot slots[SLOTS];
static int slot_of_id[RING_SIZE];
static uint8_t next_tag, pattern[SIZE];
static struct file {
    int fd;
    uint64_t size;
    uint8_t *bytes;
} disk_file, base_file, overlay_file;
static int ring_fd;
static enum kind kind;
static bool small_log_was_open;

/* What is simulated is not what is to be explored. */
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

/* ---- disk/host_io.h, simulated ---- */

static int64_t pending(struct vmm_host_io *io, struct vmm_host_io_op *op, struct host_op how)
{
    unsigned i = 0;
    while (host.ops[i].state != FREE)
        CHECK(++i < OPS);
    how.state = GATHERED;
    how.op = op;
    host.ops[i] = how;
    io->gathered++;
    io->under_way++;
    return VMM_HOST_IO_PENDING;
}

/* The bytes of a file, wherever the disk's descriptor of it is. */
static uint8_t *bytes_of_file(int fd, uint64_t at, uint64_t size)
{
    const struct file *file = fd != guest.blk->disk->fd ? &base_file
                              : kind == OVERLAY         ? &overlay_file
                                                        : &disk_file;
    CHECK(fd >= 0 && at <= file->size && size <= file->size - at);
    return file->bytes + at;
}

static int64_t move_bytes(const struct host_op *o, uint64_t size)
{
    uint8_t *bytes = bytes_of_file(o->fd, o->at, size);
    uint64_t left = size;
    for (unsigned i = 0; i < o->n_iov && left; i++) {
        const uint64_t n = o->iov[i].iov_len < left ? o->iov[i].iov_len : left;
        memcpy(o->write ? bytes : o->iov[i].iov_base, o->write ? o->iov[i].iov_base : bytes, n);
        bytes += n;
        left -= n;
    }
    CHECK_EQUAL(left, 0);
    return (int64_t)size;
}

/* How the host carries one operation out; whole, where it is faithful and where the input has ended. */
static int64_t carry_out(const struct host_op *o)
{
    static const int errors[] = {EINTR, EAGAIN, EIO, ENOSPC};
    const uint8_t how = host.faithful ? 0 : (uint8_t)take(&host.in, 1);
    const uint64_t unit = kind == DIRECT ? SECTOR : 1;
    uint64_t size = o->size;
    if (how >= 0xf0) {
        const int error = errors[how & 3];
        if (error != EINTR && error != EAGAIN)
            host.faults++;
        if (o->what == TRANSFER && how & 8 && size > unit) /* some of it was written before it failed */
            move_bytes(o, take(&host.in, 2) % (size / unit) * unit);
        return -error;
    }
    if (o->what == SYNC)
        return 0;
    if (o->what == ALLOCATE && how >= 0xe0)
        return -EOPNOTSUPP;
    if (o->what == ALLOCATE) {
        memset(bytes_of_file(o->fd, o->at, size), 0, size);
        return 0;
    }
    if (how >= 0xd0 && size > unit) {
        host.faults += kind == OVERLAY && o->write; /* twice within a cluster is a failure */
        size = (1 + take(&host.in, 2) % (size / unit)) * unit;
    }
    return move_bytes(o, size);
}

void vmm_host_io_init(struct vmm_host_io *io, bool blocking)
{
    (void)blocking;
    *io = (struct vmm_host_io){.ring = ring_fd};
}

void vmm_host_io_deinit(struct vmm_host_io *io)
{
    CHECK(!io->under_way);
}

int64_t vmm_host_io_transfer(struct vmm_host_io *io, struct vmm_host_io_op *op, bool write, bool direct,
                             int fd, const struct iovec *iov, unsigned n_iov, uint64_t size, uint64_t at)
{
    const struct host_op o = {
        .write = write, .fd = fd, .iov = iov, .n_iov = n_iov, .size = size, .at = at, .what = TRANSFER};
    for (unsigned i = 0; direct && i < n_iov; i++)
        CHECK(!(((uintptr_t)iov[i].iov_base | iov[i].iov_len | at) % SECTOR));
    return host.faithful || take(&host.in, 1) < 96 ? carry_out(&o) : pending(io, op, o);
}

int64_t vmm_host_io_sync(struct vmm_host_io *io, struct vmm_host_io_op *op, int fd)
{
    return pending(io, op, (struct host_op){.fd = fd, .what = SYNC});
}

int64_t vmm_host_io_allocate(struct vmm_host_io *io, struct vmm_host_io_op *op, int fd, int mode, uint64_t at,
                             uint64_t size)
{
    return pending(io, op,
                   (struct host_op){.fd = fd, .mode = mode, .at = at, .size = size, .what = ALLOCATE});
}

void vmm_host_io_submit(struct vmm_host_io *io)
{
    for (unsigned i = 0; i < OPS && io->gathered; i++)
        if (host.ops[i].state == GATHERED) {
            host.ops[i].state = SUBMITTED;
            io->gathered--;
        }
}

bool vmm_host_io_reap(struct vmm_host_io *io)
{
    bool any = false;
    for (unsigned i = 0; i < OPS && io->under_way; i++)
        if (host.ops[i].state == COMPLETED) {
            const struct host_op done = host.ops[i];
            host.ops[i].state = FREE;
            io->under_way--;
            done.op->done(done.op, done.result);
            any = true;
        }
    return any;
}

/* The input's choice of an operation goes on: the host carries it out, and its completion is seen. */
static bool go_on_with(unsigned which, bool complete)
{
    for (unsigned n = 0; n < OPS; n++) {
        struct host_op *o = &host.ops[(which + n) % OPS];
        if (o->state == SUBMITTED) {
            o->result = carry_out(o);
            o->state = DONE;
        } else if (o->state != DONE || !complete) {
            continue;
        }
        if (complete)
            o->state = COMPLETED;
        return true;
    }
    return false;
}

void vmm_host_io_wait(struct vmm_host_io *io)
{
    vmm_host_io_submit(io);
    for (unsigned i = 0; i < OPS; i++)
        if (host.ops[i].state == COMPLETED)
            return;
    if (io->under_way)
        CHECK(go_on_with((unsigned)take(&host.in, 1), true));
}

/* ---- the model ---- */

static bool may_be(const struct tags *tags, uint8_t byte)
{
    return tags->bits[byte / 64] >> byte % 64 & 1;
}

static void add_tag(struct tags *tags, uint8_t byte)
{
    tags->bits[byte / 64] |= 1ull << byte % 64;
}

static void check_sector(const uint8_t *got, const uint8_t *wanted, const struct tags *tags, unsigned sector)
{
    if (!memcmp(got, wanted, SECTOR))
        return;
    for (unsigned i = 0; i < SECTOR; i++)
        if (got[i] != wanted[i] && !may_be(tags, got[i])) {
            fprintf(stderr, "sector %u, byte %u is %#x, not %#x\n", sector, i, got[i], wanted[i]);
            CHECK(!"what the disk may hold");
        }
}

static void read_disk(uint64_t at, uint64_t size, uint8_t *to)
{
    struct vmm_disk *disk = guest.blk->disk;
    while (size) {
        const struct vmm_extent extent = disk->kind->map(disk, at, size);
        if (extent.fd < 0)
            memset(to, 0, extent.size);
        else
            memcpy(to, bytes_of_file(extent.fd, extent.at, extent.size), extent.size);
        to += extent.size;
        at += extent.size;
        size -= extent.size;
    }
}

/* Nothing is under way there: whatever it is that the sector holds, it stays. */
static void settle(unsigned sector)
{
    uint8_t now[SECTOR];
    read_disk((uint64_t)sector * SECTOR, SECTOR, now);
    check_sector(now, model.bytes + sector * SECTOR, &model.tags[sector], sector);
    memcpy(model.bytes + sector * SECTOR, now, SECTOR);
    model.tags[sector] = (struct tags){0};
    model.shared[sector] = false;
}

static void check_disk(void)
{
    static uint8_t now[SIZE];
    read_disk(0, SIZE, now);
    for (unsigned sector = 0; sector < SECTORS; sector++)
        check_sector(now + sector * SECTOR, model.bytes + sector * SECTOR, &model.tags[sector], sector);
}

static void writes_begin(struct slot *s, unsigned range)
{
    for (uint64_t at = s->at[range]; at < s->at[range] + s->size[range]; at += SECTOR) {
        const unsigned sector = (unsigned)(at / SECTOR);
        model.shared[sector] |= model.writers[sector]++ > 0 || s->discards;
        add_tag(&model.tags[sector], s->tag);
        for (unsigned i = 0; i < SLOTS; i++)
            if (slots[i].used && slots[i].reads)
                add_tag(&slots[i].tags[sector], s->tag);
    }
}

/* How requests end that write: carried out; failed or cut short by a reset; carried out and then rolled back. */
enum end { WRITTEN, FAILED, ROLLED_BACK };

static void writes_end(struct slot *s, unsigned range, enum end end)
{
    for (uint64_t at = s->at[range]; at < s->at[range] + s->size[range]; at += SECTOR) {
        const unsigned sector = (unsigned)(at / SECTOR);
        if (--model.writers[sector])
            continue;
        if (end == ROLLED_BACK || (end == WRITTEN && !model.shared[sector]))
            model.tags[sector] = (struct tags){0};
        if (end == WRITTEN && !model.shared[sector])
            memset(model.bytes + at, s->tag, SECTOR);
        settle(sector);
    }
}

/* A read that was offered and not yet taken is one of the disk as it was brought back. */
static void reads_may_see(struct slot *s, const uint8_t *disk)
{
    for (uint64_t at = s->at[0]; at < s->at[0] + s->size[0]; at++)
        add_tag(&s->tags[at / SECTOR], disk[at]);
}

static void check_read(unsigned slot)
{
    const struct slot *s = &slots[slot];
    const uint8_t *got = machine_at(guest.vm, SLOT_DATA(slot), s->size[0]);
    for (uint64_t done = 0; done < s->size[0]; done += SECTOR) {
        const unsigned sector = (unsigned)((s->at[0] + done) / SECTOR);
        check_sector(got + done, s->before + sector * SECTOR, &s->tags[sector], sector);
    }
}

#pragma clang attribute pop

/* ---- the driver ---- */

static void take_range(struct slot *s, unsigned range)
{
    const uint64_t first = take(&host.in, 1) % SECTORS, how = take(&host.in, 1);
    uint64_t n = how < 0xe0 ? 1 + how % 8 : how < 0xf8 ? 8 * (1 + how % 4) : SECTORS;
    if (how & 8 && how < 0xf8 && n >= 8)
        n -= n % 8;
    if (n > SECTORS - first)
        n = SECTORS - first;
    s->at[range] = first * SECTOR;
    s->size[range] = n * SECTOR;
}

static unsigned build(struct slot *s, unsigned slot, uint32_t type, struct piece *pieces)
{
    uint8_t *header = machine_at(guest.vm, SLOT_HEADER(slot), 64);
    const bool ranges = type == VMM_BLK_DISCARD || type == VMM_BLK_WRITE_ZEROES;
    const uint64_t sector = s->at[0] / SECTOR;
    unsigned n = 0;
    memcpy(header, &type, 4);
    memcpy(header + 8, &sector, 8);
    for (unsigned i = 0; ranges && i < 2; i++) {
        const uint64_t at = s->at[i] / SECTOR;
        const uint32_t rest[2] = {(uint32_t)(s->size[i] / SECTOR),
                                  type == VMM_BLK_WRITE_ZEROES ? (uint32_t)take(&host.in, 1) & 1 : 0};
        memcpy(header + 16 + i * 16, &at, 8);
        memcpy(header + 24 + i * 16, rest, 8);
    }
    pieces[n++] = (struct piece)OUT(SLOT_HEADER(slot), ranges ? 48 : 16);
    if (type == VMM_BLK_OUT || type == VMM_BLK_IN) {
        const uint32_t size = (uint32_t)s->size[0], skew = (uint32_t)take(&host.in, 2) % size;
        const uint32_t first = skew & 1 ? 0 : skew & 2 ? skew & ~511u : skew;
        if (first)
            pieces[n++] = (struct piece){SLOT_DATA(slot), first, type == VMM_BLK_IN};
        pieces[n++] = (struct piece){SLOT_DATA(slot) + first, size - first, type == VMM_BLK_IN};
    }
    pieces[n++] = (struct piece)IN(SLOT_STATUS(slot), 1);
    return n;
}

static void offer(uint32_t type)
{
    struct piece pieces[4];
    unsigned slot = 0;
    while (slot < SLOTS && slots[slot].used)
        slot++;
    if (slot == SLOTS)
        return;
    struct slot *s = &slots[slot];
    s->used = true;
    s->reads = type == VMM_BLK_IN;
    s->discards = type == VMM_BLK_DISCARD;
    s->writes = s->discards || type == VMM_BLK_OUT || type == VMM_BLK_WRITE_ZEROES;
    s->tag = type == VMM_BLK_OUT ? ++next_tag : 0;
    take_range(s, 0);
    s->at[1] = s->size[1] = 0;
    if (s->writes && type != VMM_BLK_OUT)
        take_range(s, 1);
    const unsigned n = build(s, slot, type, pieces);
    if (type == VMM_BLK_OUT)
        memset(machine_at(guest.vm, SLOT_DATA(slot), s->size[0]), s->tag, s->size[0]);
    if (s->reads) {
        memcpy(s->before, model.bytes, SIZE);
        memcpy(s->tags, model.tags, sizeof s->tags);
    }
    for (unsigned range = 0; s->writes && range < 2; range++)
        writes_begin(s, range);
    s->id = ring_offer(&guest.rings[0], pieces, n);
    CHECK(s->id >= 0);
    slot_of_id[s->id] = (int)slot;
}

/* Take the answers that are there. */
static void collect(bool rolled_back)
{
    int id;
    uint32_t written;
    while (ring_collect(&guest.rings[0], &id, &written)) {
        const unsigned slot = (unsigned)slot_of_id[id];
        struct slot *s = &slots[slot];
        CHECK(slot < SLOTS && s->used && s->id == id);
        slot_of_id[id] = SLOTS;
        s->used = false;
        const uint8_t status = *(uint8_t *)machine_at(guest.vm, SLOT_STATUS(slot), 1);
        CHECK(status == VMM_BLK_OK || (status == VMM_BLK_IOERR && (host.faults || small_log_was_open)));
        for (unsigned range = 0; s->writes && range < 2; range++)
            writes_end(s, range, rolled_back ? ROLLED_BACK : status == VMM_BLK_OK ? WRITTEN : FAILED);
        if (s->reads && status == VMM_BLK_OK) {
            CHECK_EQUAL(written, s->size[0] + 1);
            check_read(slot);
        }
    }
}

static void kick_device(void)
{
    VMM_VIRTIO_LOCKED(guest.dev);
    guest.dev->ops->kick(guest.dev->opaque, 0);
}

static void completions_are_seen(void)
{
    if (guest.blk->completions.live)
        guest.blk->completions.ready(&guest.blk->completions, EPOLLIN);
}

static void restart(uint8_t how)
{
    if (guest.dev->running)
        collect(false); /* what was answered before the reset */
    guest_start(&guest, how & 1 ? ~(VMM_F_RING_PACKED | VMM_F_RING_RESET) : 0, RING_SIZE);
    CHECK(!guest.blk->disk->under_way);
    for (unsigned i = 0; i < OPS; i++)
        CHECK_EQUAL(host.ops[i].state, FREE);
    for (unsigned i = 0; i < SLOTS; i++)
        slots[i].used = false;
    for (unsigned i = 0; i < RING_SIZE; i++)
        slot_of_id[i] = SLOTS;
    for (unsigned sector = 0; sector < SECTORS; sector++) {
        model.shared[sector] = model.writers[sector] > 0;
        model.writers[sector] = 0;
        if (model.shared[sector])
            settle(sector);
    }
    check_disk();
}

/* ---- logs ---- */

static void log_open(struct log *log, bool small)
{
    int fd = -1;
    if (small) {
        fd = memfd_create("fuzz-undo", MFD_ALLOW_SEALING | MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, ROOM_OF_A_SMALL_LOG * CLUSTER) == 0);
        CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) == 0);
    }
    CHECK_EQUAL(vmm_blk_undo_open(guest.blk, fd, &log->undo), 0);
    if (small)
        close(fd);
    log->small = small;
    small_log_was_open |= small;
    CHECK(!guest.blk->disk->under_way);
    collect(false);
    check_disk();
    read_disk(0, SIZE, log->past);
}

static void log_close(struct log *log)
{
    vmm_blk_undo_close(guest.blk, log->undo);
    log->undo = NULL;
}

static void log_back(struct log *log)
{
    static uint8_t now[SIZE];
    const bool faithful = host.faithful;
    const unsigned faults = host.faults;
    int64_t rc = vmm_blk_undo_back(guest.blk, log->undo);
    CHECK(!guest.blk->disk->under_way);
    if (rc < 0) { /* the log has everything still */
        bool others_small = false;
        for (unsigned i = 0; i < LOGS; i++)
            if (&logs[i] != log && logs[i].undo && logs[i].small) {
                others_small = true;
                log_close(&logs[i]);
            }
        CHECK(host.faults > faults || others_small);
        host.faithful = true;
        rc = vmm_blk_undo_back(guest.blk, log->undo);
        host.faithful = faithful;
    }
    CHECK(rc >= 0 && rc <= (SIZE + CLUSTER - 1) / CLUSTER);
    read_disk(0, SIZE, now);
    for (unsigned i = 0; memcmp(now, log->past, SIZE) && i < SIZE; i++)
        if (now[i] != log->past[i]) {
            fprintf(stderr, "byte %#x is %#x, was %#x\n", i, now[i], log->past[i]);
            CHECK(!"the disk of then");
        }
    memcpy(model.bytes, now, SIZE);
    for (unsigned i = 0; i < SLOTS; i++)
        if (slots[i].used && slots[i].reads)
            reads_may_see(&slots[i], now);
    collect(true); /* what the going back waited for was of before */
}

static void use_log(uint8_t op, uint8_t how)
{
    struct log *log = &logs[how & 1];
    if (!log->undo)
        log_open(log, (how & 0xf0) == 0xf0);
    else if (op == 14)
        log_close(log);
    else
        log_back(log);
}

static void step(void)
{
    static const uint32_t types[] = {VMM_BLK_OUT, VMM_BLK_OUT,     VMM_BLK_WRITE_ZEROES,
                                     VMM_BLK_IN,  VMM_BLK_DISCARD, VMM_BLK_FLUSH};
    const uint8_t op = (uint8_t)take(&host.in, 1), how = op >> 4;
    switch (op & 15) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4:
    case 5:
        offer(types[op & 15]);
        if (how & 1)
            kick_device();
        break;
    case 6:
        kick_device();
        break;
    case 7:
        go_on_with((unsigned)take(&host.in, 1), false);
        break;
    case 8:
    case 9:
        go_on_with((unsigned)take(&host.in, 1), true);
        if (how & 1)
            completions_are_seen();
        break;
    case 10:
        completions_are_seen();
        break;
    case 11:
        collect(false);
        break;
    case 12:
        if (how > 8)
            restart(how);
        break;
    case 13:
    case 14:
        use_log(op & 15, (uint8_t)take(&host.in, 1));
        break;
    default: {
        VMM_VIRTIO_LOCKED(guest.dev);
        vmm_virtio_config_write(guest.dev, offsetof(struct vmm_blk_config, writeback), 1, how & 1);
    }
    }
    CHECK(guest.dev->running);
}

/* ---- one input ---- */

static struct file file_of(uint64_t size)
{
    const int fd = memfd_create("fuzz-undo", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    uint8_t *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(bytes != MAP_FAILED);
    return (struct file){fd, size, bytes};
}

static vmm_disk *open_disk(void)
{
    vmm_disk *disk;
    const vmm_disk_layer layers[] = {{.fd = overlay_file.fd,
                                      .size = SIZE,
                                      .bitmap_at = BITMAP_AT,
                                      .bitmap_size = DATA_AT - BITMAP_AT,
                                      .data_at = DATA_AT},
                                     {.fd = base_file.fd, .size = BASE_SIZE}};
    if (kind == OVERLAY)
        memset(overlay_file.bytes + BITMAP_AT, 0, DATA_AT - BITMAP_AT);
    else
        memcpy(disk_file.bytes, pattern, SIZE);
    CHECK_EQUAL(kind == OVERLAY
                    ? vmm_disk_open_overlay(layers, 2, 1, 0, &disk)
                    : vmm_disk_open_raw(disk_file.fd, SIZE, kind == DIRECT ? SECTOR : 1, 0, &disk),
                0);
    return disk;
}

static void set_up(void)
{
    for (unsigned i = 0; i < SIZE; i++)
        pattern[i] = (uint8_t)(i * 31 + i / SECTOR);
    ring_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    disk_file = file_of(SIZE);
    base_file = file_of(BASE_SIZE);
    overlay_file = file_of(DATA_AT + (SIZE + CLUSTER - 1) / CLUSTER * CLUSTER);
    CHECK(ring_fd >= 0);
    memcpy(base_file.bytes, pattern, BASE_SIZE);
    const vmm_blk_options options = {.sector = SECTOR, .queues = 1, .serial = "fuzz"};
    guest_create(&guest, open_disk(), &options);
    vmm_loop_pause(vmm_vm_loop(guest.vm));
    guest.dev->queues[0].external = true; /* kicked here and not by the I/O thread */
}

static void begin_input(const uint8_t *data, size_t size)
{
    host.in = (struct input){data, data + size};
    host.faithful = true;
    if (!guest.vm)
        set_up();
    const uint8_t first = (uint8_t)take(&host.in, 1);
    vmm_virtio_reset(guest.dev);
    vmm_disk_destroy(guest.blk->disk);
    kind = first % KINDS;
    guest.blk->disk = open_disk();
    memset(&model, 0, sizeof model);
    memcpy(model.bytes, pattern, kind == OVERLAY ? BASE_SIZE : SIZE);
    next_tag = 0;
    host.faults = 0;
    small_log_was_open = guest.blk->failed = false;
    restart(first >> 4);
    host.faithful = false;
}

/* Every request is answered once the host does its part; every log that is open brings its past back. */
static void end_input(void)
{
    host.faithful = true;
    bool waits = true;
    for (unsigned rounds = 0; waits; rounds++) {
        CHECK(rounds < 100);
        kick_device();
        while (go_on_with(0, true))
            ;
        completions_are_seen();
        collect(false);
        waits = false;
        for (unsigned i = 0; i < SLOTS; i++)
            waits |= slots[i].used;
    }
    check_disk();
    for (unsigned i = 0; i < LOGS; i++)
        if (logs[i].undo) {
            log_back(&logs[i]);
            log_close(&logs[i]);
        }
    CHECK(!guest.blk->disk->undo);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    begin_input(data, size);
    for (unsigned steps = 0; host.in.at < host.in.end && steps < 256; steps++)
        step();
    end_input();
    return 0;
}
