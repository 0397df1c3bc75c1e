/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lazy memory whose source is hostile: the loop of core/lazy.c runs here, on one thread, and the host around it (poll,
 * userfaultfd, sockets, files) is simulated from the input. What must hold: a page is installed once, with the first
 * bytes that the source sent for it; a page that a vCPU waits for has been requested from the current source; no
 * descriptor leaks; and whatever happened, a good source afterwards completes the memory.
 */
#include "driven.h"

#include "base/error.h"
#include "time/lazy_parts.h"
#include "vmmsnapshot.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum { HALF = 16, PAGES = 2 * HALF, PAGE_SIZE = 4096, HEADER = 16, WIRE = 1 << 20, FDS = 32, FAULTS = 64 };
enum kind { CLOSED, EVENT, UFFD, STREAM, FILE_OF_PAGES };
enum { FIRST_FD = 1000 };
#define BIT(page) (1u << (page))

/* What is simulated is not what is to be explored. */
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

static struct world {
    struct input in;
    vmm_lazy *lazy;
    enum kind fds[FDS];
    bool readable[FDS];                /* events */
    uint32_t present, wanted, waiting; /* a bit for each page */
    uint8_t faults[FAULTS];
    unsigned n_faults;
    /* The peer of the newest stream. */
    int peer;
    bool closed, reset, rejected; /* rejected: what it sent is no answer, and the stream must be lost */
    uint32_t requested;
    uint8_t outstanding[4 * PAGES];
    unsigned n_outstanding;
    size_t sent, received, parsed; /* of wire */
    unsigned next_send;            /* how the next send fails; 0: it does not */
    bool file_fails, stopped, finishing;
    uint64_t serial;
} w;

static uint8_t wire[WIRE + HEADER + PAGE_SIZE];
static uint32_t due; /* pages that the model's parser has taken: to be installed next, */
static uint8_t delivered[PAGES][PAGE_SIZE]; /* as these */
static vmm_vm *vm;

static uint64_t gpa_of_number(unsigned page)
{
    return page < HALF ? page * PAGE_SIZE : MACHINE_HIGH + (page - HALF) * PAGE_SIZE;
}

/* PAGES: it is not the address of one. */
static unsigned number_of(uint64_t gpa)
{
    const uint64_t at = gpa >= MACHINE_HIGH ? gpa - MACHINE_HIGH : gpa;
    if (at >= HALF * PAGE_SIZE || at % PAGE_SIZE)
        return PAGES;
    return (unsigned)(at / PAGE_SIZE) + (gpa >= MACHINE_HIGH ? HALF : 0);
}

static uint8_t *host_of_number(unsigned page)
{
    return (uint8_t *)vm->regions[page / HALF].host + page % HALF * PAGE_SIZE;
}

/* ---- descriptors ---- */

static int fd_open(enum kind kind)
{
    for (int i = 0; i < FDS; i++)
        if (w.fds[i] == CLOSED) {
            w.fds[i] = kind;
            w.readable[i] = false;
            return FIRST_FD + i;
        }
    CHECK(!"descriptors left");
    return -1;
}

static enum kind *fd_of(int fd)
{
    CHECK(fd >= FIRST_FD && fd < FIRST_FD + FDS && w.fds[fd - FIRST_FD] != CLOSED);
    return &w.fds[fd - FIRST_FD];
}

static int world_close(int fd)
{
    *fd_of(fd) = CLOSED;
    return 0;
}

static int world_open(const char *path, int flags)
{
    (void)path;
    (void)flags;
    errno = ENOENT;
    return -1;
}

static long world_syscall(long number, int flags)
{
    CHECK_EQUAL(number, SYS_userfaultfd);
    (void)flags;
    return fd_open(UFFD);
}

static int world_eventfd(unsigned count, int flags)
{
    (void)count;
    (void)flags;
    return fd_open(EVENT);
}

static int world_fcntl(int fd, int command, int least)
{
    CHECK(command == F_DUPFD_CLOEXEC && !least);
    return fd_open(*fd_of(fd));
}

static ssize_t world_write(int fd, const void *bytes, size_t n)
{
    (void)bytes;
    CHECK(*fd_of(fd) == EVENT && n == sizeof(uint64_t));
    w.readable[fd - FIRST_FD] = true;
    return (ssize_t)n;
}

static ssize_t world_read(int fd, void *to, size_t n)
{
    if (*fd_of(fd) == EVENT) {
        w.readable[fd - FIRST_FD] = false;
        return sizeof(uint64_t);
    }
    struct uffd_msg *messages = to;
    unsigned given = 0;
    memset(to, 0, n);
    for (; given < n / sizeof(*messages) && given < w.n_faults; given++) {
        const unsigned page = w.faults[given];
        messages[given].event = UFFD_EVENT_PAGEFAULT;
        messages[given].arg.pagefault.address = (uintptr_t)host_of_number(page);
    }
    memmove(w.faults, w.faults + given, w.n_faults -= given);
    errno = EAGAIN;
    return given ? (ssize_t)(given * sizeof(*messages)) : -1;
}

static ssize_t world_pread(int fd, void *to, size_t n, off_t at)
{
    CHECK(*fd_of(fd) == FILE_OF_PAGES && at >= 0 && (uint64_t)at + n <= PAGES * PAGE_SIZE);
    const unsigned how = (unsigned)take(&w.in, 1);
    if (w.file_fails)
        return how & 1 ? 0 : (errno = EIO, -1);
    if (how >= 0xf8) {
        errno = EINTR;
        return -1;
    }
    if (how >= 0xe0 && n > 1)
        n = 1 + how % (n - 1);
    for (size_t done = 0, part; done < n; done += part) {
        const size_t here = (size_t)at + done;
        part = PAGE_SIZE - here % PAGE_SIZE;
        part = part < n - done ? part : n - done;
        memset((uint8_t *)to + done, (int)(here / PAGE_SIZE + 1), part);
    }
    return (ssize_t)n;
}

/* ---- userfaultfd ---- */

static unsigned number_of_host(uint64_t host)
{
    for (unsigned half = 0; half < 2; half++) {
        const uint64_t at = host - (uintptr_t)host_of_number(half * HALF);
        if (at < HALF * PAGE_SIZE && at % PAGE_SIZE == 0)
            return half * HALF + (unsigned)(at / PAGE_SIZE);
    }
    CHECK(!"a page of the machine");
    return 0;
}

static int uffd_copy(struct uffdio_copy *copy)
{
    CHECK(copy->len == PAGE_SIZE && !copy->mode);
    const unsigned page = number_of_host(copy->dst);
    const uint8_t *source = (const uint8_t *)(uintptr_t)copy->src;
    if (due & BIT(page))
        CHECK(!memcmp(delivered[page], source, PAGE_SIZE));
    else if (w.wanted & BIT(page))
        CHECK(!*source || *source == page + 1); /* by hand, or from the file */
    else
        CHECK(!*source && !memcmp(source, source + 1, PAGE_SIZE - 1)); /* of no source: zeros */
    due &= ~BIT(page);
    w.wanted &= ~BIT(page);
    if (w.present & BIT(page)) {
        errno = EEXIST;
        return -1;
    }
    memcpy(host_of_number(page), source, PAGE_SIZE);
    w.present |= BIT(page);
    w.waiting &= ~BIT(page);
    return 0;
}

static int world_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    CHECK(*fd_of(fd) == UFFD);
    if (request == UFFDIO_COPY)
        return uffd_copy((struct uffdio_copy *)argument);
    if (request == UFFDIO_WAKE)
        w.waiting &= ~BIT(number_of_host(((struct uffdio_range *)argument)->start));
    return 0;
}

static int world_madvise(void *at, size_t n, int advice)
{
    CHECK_EQUAL(advice, MADV_REMOVE);
    memset(at, 0, n);
    return 0;
}

/* ---- the peer ---- */

static void peer_writes(const void *bytes, size_t n)
{
    if (w.sent + n <= sizeof wire && !w.closed) {
        memcpy(wire + w.sent, bytes, n);
        w.sent += n;
    }
}

static void peer_answers(uint64_t gpa, uint32_t kind, bool bytes)
{
    const struct {
        uint64_t gpa;
        uint32_t kind, reserved;
    } header = {gpa, kind, 0};
    uint8_t page[PAGE_SIZE];
    peer_writes(&header, sizeof header);
    memset(page, (int)(0x80 | ++w.serial), sizeof page);
    memcpy(page, &gpa, sizeof gpa);
    if (bytes)
        peer_writes(page, sizeof page);
}

static ssize_t world_send(int fd, const void *bytes, size_t n, int flags)
{
    uint64_t gpa;
    CHECK(*fd_of(fd) == STREAM && n == sizeof gpa && flags == (MSG_DONTWAIT | MSG_NOSIGNAL));
    const unsigned how = w.next_send;
    w.next_send = 0;
    if (how == 1)
        return errno = EAGAIN, -1;
    if (how == 2)
        return errno = EPIPE, -1;
    if (how == 3)
        return 5;
    memcpy(&gpa, bytes, sizeof gpa);
    const unsigned page = number_of(gpa);
    CHECK(page < PAGES); /* it asks for pages of the machine, */
    CHECK(w.wanted & BIT(page) && w.n_outstanding < sizeof w.outstanding);
    if (fd == w.peer)
        CHECK(!(w.requested & BIT(page))); /* once from each source */
    if (fd == w.peer) {
        w.requested |= BIT(page);
        w.outstanding[w.n_outstanding++] = (uint8_t)page;
    }
    return (ssize_t)n;
}

/* The same bytes by another parser: the first page that came stays, and what is no answer ends the stream. */
static void model_parses(void)
{
    while (!w.rejected && w.received - w.parsed >= HEADER) {
        uint64_t gpa;
        uint32_t kind, reserved;
        memcpy(&gpa, wire + w.parsed, 8);
        memcpy(&kind, wire + w.parsed + 8, 4);
        memcpy(&reserved, wire + w.parsed + 12, 4);
        const unsigned page = number_of(gpa);
        w.rejected = reserved || kind > 1 || page == PAGES;
        const size_t size = HEADER + (kind ? PAGE_SIZE : 0);
        if (w.rejected || w.received - w.parsed < size)
            return;
        if (w.wanted & BIT(page)) {
            due |= BIT(page);
            memset(delivered[page], 0, PAGE_SIZE);
            if (kind)
                memcpy(delivered[page], wire + w.parsed + HEADER, PAGE_SIZE);
        }
        w.wanted &= ~BIT(page);
        w.parsed += size;
    }
}

static ssize_t world_recv(int fd, void *to, size_t n, int flags)
{
    CHECK(*fd_of(fd) == STREAM && flags == MSG_DONTWAIT && n);
    if (fd != w.peer)
        return errno = EAGAIN, -1;
    const size_t there = w.sent - w.received;
    if (!there && w.closed)
        return w.reset ? (errno = ECONNRESET, -1) : 0;
    if (!there)
        return errno = EAGAIN, -1;
    n = n < there ? n : there;
    if (!w.finishing && take(&w.in, 1) & 1) {
        const size_t limit = 1 + take(&w.in, 2);
        n = n < limit ? n : limit;
    }
    memcpy(to, wire + w.received, n);
    w.received += n;
    model_parses();
    return (ssize_t)n;
}

/* ---- the loop runs on this thread ---- */

static int world_poll(struct pollfd *fds, unsigned n, int timeout);

/* The input's buffer is so large that mapping it anew would be most of an execution. It keeps its red zones. */
static void *input_buffer;

static void *world_malloc(size_t n)
{
    if (n != 128 * 1024)
        return malloc(n);
    if (!input_buffer)
        input_buffer = malloc(n);
    return input_buffer;
}

static void world_free(void *at)
{
    if (at != input_buffer)
        free(at);
}

static int world_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *opaque)
{
    (void)thread;
    (void)name;
    (void)run;
    (void)opaque;
    return 0;
}

static int world_join(pthread_t thread, void **result)
{
    (void)thread;
    (void)result;
    return 0;
}

#pragma clang attribute pop

#define malloc world_malloc
#define free world_free
#define close world_close
#define open world_open
#define syscall world_syscall
#define eventfd world_eventfd
#define fcntl world_fcntl
#define write world_write
#define read world_read
#define pread world_pread
#define ioctl(fd, request, argument) world_ioctl(fd, request, (uintptr_t)(argument))
#define madvise world_madvise
#define send world_send
#define recv world_recv
#define poll world_poll
#define vmm_thread_start world_thread
#define pthread_join world_join
/* the three files of lazy memory, in this world */
#include "time/lazy.c"
#include "time/lazy_pages.c"
#include "time/lazy_serve.c"

/* ---- steps ---- */

static void connect_peer(void)
{
    const int fd = fd_open(STREAM);
    const int rc = vmm_lazy_connect(w.lazy, fd);
    close(fd);
    CHECK(rc == 0 || (rc == -EBUSY && w.lazy->state >= VMM_LAZY_DONE));
    if (rc)
        return;
    w.peer = w.lazy->stream_next;
    w.closed = w.reset = w.rejected = false;
    w.sent = w.received = w.parsed = 0;
    w.n_outstanding = 0;
    w.requested = 0;
}

static void touch(unsigned page)
{
    if (w.present & BIT(page) || w.n_faults == FAULTS)
        return;
    w.waiting |= BIT(page);
    w.faults[w.n_faults++] = (uint8_t)page;
}

static void damaged_answer(void)
{
    uint8_t header[HEADER] = {0};
    const uint64_t gpa = gpa_of_number(take(&w.in, 1) % PAGES);
    memcpy(header, &gpa, sizeof gpa);
    for (unsigned n = take(&w.in, 1) & 3; n--;) {
        const unsigned at = (unsigned)take(&w.in, 1) % HEADER;
        header[at] = (uint8_t)take(&w.in, 1);
    }
    peer_writes(header, sizeof header);
}

static void answer_outstanding(unsigned which, bool bytes)
{
    if (!w.n_outstanding)
        return;
    which %= w.n_outstanding;
    const unsigned page = w.outstanding[which];
    memmove(w.outstanding + which, w.outstanding + which + 1, --w.n_outstanding - which);
    peer_answers(gpa_of_number(page), bytes, bytes);
}

static void prefetch(void)
{
    uint64_t list[8];
    const unsigned n = (unsigned)take(&w.in, 1) & 7;
    for (unsigned i = 0; i < n; i++)
        list[i] = gpa_of_number(take(&w.in, 1) % PAGES) + (take(&w.in, 1) > 0xf0 ? 8 : 0);
    const int rc = vmm_lazy_prefetch(w.lazy, list, n);
    CHECK(rc == 0 || rc == -EEXIST);
}

/* A balloon, or something that wrote the memory's file: pages go and come without the loop. */
static void host_changes(unsigned page, bool there)
{
    if (there && !(w.present & BIT(page)))
        memset(host_of_number(page), 0x11, PAGE_SIZE);
    if (there)
        w.present |= BIT(page);
    else if (!(w.wanted & BIT(page))) {
        memset(host_of_number(page), 0, PAGE_SIZE);
        w.present &= ~BIT(page);
    }
}

static void step(void)
{
    const uint8_t op = (uint8_t)take(&w.in, 1), page = (uint8_t)take(&w.in, 1) % PAGES;
    switch (op & 15) {
    case 0:
    case 1:
        touch(page);
        break;
    case 2:
    case 3:
        answer_outstanding(page, op & 16);
        break;
    case 4:
        peer_answers(gpa_of_number(page), op >> 4 & 1, op >> 5 & 1);
        break;
    case 5:
        damaged_answer();
        break;
    case 6:
        w.closed = true;
        w.reset = op & 16;
        break;
    case 7:
    case 8:
        connect_peer();
        break;
    case 9:
        prefetch();
        break;
    case 10:
        vmm_lazy_fetch_rest(w.lazy);
        break;
    case 12:
        host_changes(page, op & 16);
        break;
    case 13:
        w.next_send = op >> 4 & 3;
        w.file_fails = op & 0x80;
        break;
    case 14:
        w.stopped |= op >> 4 == 15;
        if (op >> 4 == 14)
            vmm_lazy_abandon(w.lazy, "the test said so");
        break;
    default: /* 11 and 15: nothing, so that the seeds keep their meaning */
        break;
    }
}

/* ---- what must hold whenever the loop waits ---- */

static void check(void)
{
    const struct vmm_lazy *l = w.lazy;
    const uint64_t asked = *l->asked;
    CHECK_EQUAL(*l->wanted, w.wanted);
    CHECK(!(asked & ~*l->wanted) && !due);
    CHECK_EQUAL(l->stats.missing, __builtin_popcountll(*l->wanted));
    CHECK_EQUAL(l->n_asked, __builtin_popcountll(asked));
    if (l->stream >= 0 && l->stream == w.peer)
        CHECK(!(asked & ~(uint64_t)w.requested));
    CHECK(l->n_order <= PAGES && l->listed <= l->n_list);
    if (l->state != VMM_LAZY_ABANDONED)
        CHECK_EQUAL(l->state == VMM_LAZY_DONE, !w.wanted);
    if (w.rejected)
        CHECK(l->stream != w.peer);
}

/* A good source, and a request for everything: it sends what it was asked for until all is there. */
static void finish(bool idle)
{
    if (w.finishing) {
        CHECK(!idle || w.n_outstanding);
        answer_outstanding(0, true);
        return;
    }
    w.finishing = true;
    w.next_send = 0;
    connect_peer();
    vmm_lazy_fetch_rest(w.lazy);
}

static bool any_event(struct pollfd *fds)
{
    const bool from_peer = fds[2].fd >= 0 && fds[2].fd == w.peer && (w.sent > w.received || w.closed);
    fds[0].revents = w.readable[fds[0].fd - FIRST_FD] ? POLLIN : 0;
    fds[1].revents = w.n_faults ? POLLIN : 0;
    fds[2].revents = from_peer ? POLLIN : 0;
    fds[3].revents = fds[3].fd >= 0 && w.stopped ? POLLIN : 0;
    return fds[0].revents || fds[1].revents || from_peer || fds[3].revents;
}

static int world_poll(struct pollfd *fds, unsigned n, int timeout)
{
    CHECK_EQUAL(n, 4);
    check();
    do {
        const bool over = w.lazy->state >= VMM_LAZY_DONE;
        if (w.in.at < w.in.end) {
            step();
        } else if (!over) {
            finish(timeout && !any_event(fds));
        } else {
            w.readable[fds[0].fd - FIRST_FD] = true; /* as its end says */
        }
    } while (!any_event(fds) && timeout);
    return 1;
}

static void prepare_world(const uint8_t *data, size_t size)
{
    if (!vm) {
        vm = machine_create();
        vm->regions[0].size = vm->regions[1].size = HALF * PAGE_SIZE;
        vm->stop_fd = FIRST_FD + FDS; /* nothing is written to it */
    }
    memset(&w, 0, sizeof w);
    w.in = (struct input){data, data + size};
    w.peer = -1;
    due = 0;
    vm->lazy = NULL;
    vm->stop_reason = VMM_STOP_NONE;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    prepare_world(data, size);
    CHECK_EQUAL(vmm_lazy_create(vm, &w.lazy), 0);
    uint64_t bits[2] = {take(&w.in, 2), take(&w.in, 2)};
    for (uint32_t region = 0; region < 2; region++)
        CHECK_EQUAL(vmm_lazy_want(w.lazy, region, &bits[region]), 0);
    w.wanted = (uint32_t)(bits[0] | bits[1] << HALF);
    w.present = ~w.wanted;
    if (take(&w.in, 1) & 1) {
        const int fd = fd_open(FILE_OF_PAGES);
        CHECK_EQUAL(vmm_lazy_from_file(w.lazy, 0, fd, 0), 0);
        CHECK_EQUAL(vmm_lazy_from_file(w.lazy, 1, fd, HALF * PAGE_SIZE), 0);
        close(fd);
    }
    CHECK_EQUAL(vmm_lazy_start(w.lazy), 0);
    vmm_lazy_serve(w.lazy);
    if (w.lazy->state == VMM_LAZY_DONE && !w.n_faults)
        CHECK(!w.waiting);
    vmm_lazy_destroy(w.lazy);
    for (unsigned i = 0; i < FDS; i++)
        CHECK_EQUAL(w.fds[i], CLOSED);
    return 0;
}
