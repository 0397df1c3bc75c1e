/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that comes while the machine runs already.
 *
 * One lock guards the bitmaps and the installing itself, so that a page cannot be installed twice: a second copy, from a
 * slower source, would take back what the guest has written since. One thread answers faults and fetches; it is the only one that
 * reads the file and the socket, and holds no lock while it does.
 */
#include "time/lazy.h"
#include "base/bitmap.h"
#include "base/thread.h"
#include "vmmsnapshot.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    RUN_PAGES = 16,     /* fetched at a time from a file: a fault waits for no more than that */
    MESSAGES = 16,      /* faults taken at a time */
    ASKED_MAX = 64,     /* unasked-for pages on their way over a socket: one is asked for when one has come */
    INPUT = 128 * 1024, /* of the socket */
};

struct answer {
    uint64_t gpa;
    uint32_t kind; /* 0: zeros; 1: a page follows */
    uint32_t reserved;
};
_Static_assert(sizeof(struct answer) == 16, "as vmmlazy.h says");

struct part {                   /* a region, and the file its pages lie in */
    uint64_t gpa, pages, first; /* first: number of its first page among all */
    uint8_t *host;
    int fd;
    uint64_t offset;
};

struct vmm_lazy {
    struct vmm_vm *vm;
    struct part parts[VMM_MAX_REGIONS];
    uint32_t n_parts;
    uint64_t pages;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    int state;        /* enum vmm_lazy_state */
    int uffd;         /* -1: closed, and memory is memory */
    uint64_t *wanted; /* bit: the page is to come */
    uint64_t *asked;  /* bit: and somebody waits for it, or it was asked for ahead */
    uint64_t *told;   /* bit: and vmm_lazy_wanted said so */
    uint64_t n_asked;
    uint64_t *list, n_list, listed; /* pages to fetch first, and how far that is */
    bool rest;                      /* then all others, */
    uint64_t reached;               /* which is done up to here */
    bool given_up;
    uint64_t *order, n_order;
    int stream_next; /* a socket that takes the place of the one there is */
    bool ends;
    vmm_lazy_stats stats;

    int wake_fd, event_fd;
    pthread_t thread;
    bool started;

    /* The thread's own. */
    int stream;
    bool from_file, lost;
    uint8_t *input;
    size_t n_input;
};

static const uint8_t zeros[VMM_PAGE];

static bool test(const uint64_t *bits, uint64_t n)
{
    return bits[n / 64] >> n % 64 & 1;
}

static void set(uint64_t *bits, uint64_t n)
{
    bits[n / 64] |= 1ull << n % 64;
}

static void clear(uint64_t *bits, uint64_t n)
{
    bits[n / 64] &= ~(1ull << n % 64);
}

static void signal_fd(int fd)
{
    const ssize_t written = write(fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* only a full counter could refuse, and then it is readable already */
}

static void drain_fd(int fd)
{
    uint64_t count;
    const ssize_t got = read(fd, &count, sizeof(count));
    (void)got;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* ---- pages: by number, by guest-physical and by host address ---- */

static const struct part *part_of(const struct vmm_lazy *l, uint64_t page)
{
    uint32_t i = 0;
    while (page - l->parts[i].first >= l->parts[i].pages)
        i++;
    return &l->parts[i];
}

static uint8_t *host_of(const struct vmm_lazy *l, uint64_t page)
{
    const struct part *p = part_of(l, page);
    return p->host + (page - p->first) * VMM_PAGE;
}

static uint64_t gpa_of(const struct vmm_lazy *l, uint64_t page)
{
    const struct part *p = part_of(l, page);
    return p->gpa + (page - p->first) * VMM_PAGE;
}

static bool page_at(const struct vmm_lazy *l, uint64_t gpa, uint64_t *page)
{
    for (uint32_t i = 0; i < l->n_parts; i++) {
        const struct part *p = &l->parts[i];
        if (gpa >= p->gpa && (gpa - p->gpa) / VMM_PAGE < p->pages) {
            *page = p->first + (gpa - p->gpa) / VMM_PAGE;
            return gpa % VMM_PAGE == 0;
        }
    }
    return false;
}

static bool page_of_host(const struct vmm_lazy *l, uint64_t host, uint64_t *page)
{
    for (uint32_t i = 0; i < l->n_parts; i++) {
        const struct part *p = &l->parts[i];
        if (host >= (uintptr_t)p->host && (host - (uintptr_t)p->host) / VMM_PAGE < p->pages) {
            *page = p->first + (host - (uintptr_t)p->host) / VMM_PAGE;
            return true;
        }
    }
    return false;
}

/* ---- state ---- */

static void enter_locked(struct vmm_lazy *l, int state)
{
    l->state = state;
    pthread_cond_broadcast(&l->changed);
    signal_fd(l->event_fd);
}

static void abandon(struct vmm_lazy *l, const char *why)
{
    pthread_mutex_lock(&l->lock);
    const bool over = l->given_up || l->state == VMM_LAZY_DONE;
    l->given_up = true;
    pthread_mutex_unlock(&l->lock);
    if (over)
        return;
    /* In this order: a vCPU that is woken by the end of the thread finds the request to stop before it enters the guest. */
    if (why)
        vmm_vm_say(l->vm, "%s", why);
    vmm_vm_stop(l->vm, VMM_STOP_MEMORY, 0);
    pthread_mutex_lock(&l->lock);
    enter_locked(l, VMM_LAZY_ABANDONED);
    pthread_mutex_unlock(&l->lock);
    signal_fd(l->wake_fd);
}

/* ---- installing ---- */

/* 0; or why the kernel would not. */
static int copy_locked(struct vmm_lazy *l, uint64_t page, const void *bytes)
{
    struct uffdio_copy copy = {.dst = (uintptr_t)host_of(l, page), .src = (uintptr_t)bytes, .len = VMM_PAGE};
    while (ioctl(l->uffd, UFFDIO_COPY, &copy) < 0) {
        if (errno == EEXIST) { /* somebody wrote the file behind it: who waits is woken by nobody else */
            struct uffdio_range range = {.start = copy.dst, .len = VMM_PAGE};
            ioctl(l->uffd, UFFDIO_WAKE, &range);
            return 0;
        }
        if (errno != EAGAIN)
            return -errno;
    }
    return 0;
}

static void mark_here_locked(struct vmm_lazy *l, uint64_t page)
{
    if (test(l->asked, page)) {
        clear(l->asked, page);
        l->n_asked--;
    }
    clear(l->wanted, page);
    l->stats.missing--;
}

static void finish_locked(struct vmm_lazy *l)
{
    if (l->stats.missing || l->state == VMM_LAZY_IDLE || l->state >= VMM_LAZY_DONE)
        return;
    enter_locked(l, VMM_LAZY_DONE);
    signal_fd(l->wake_fd);
}

static int install_locked(struct vmm_lazy *l, uint64_t page, const void *bytes, bool unasked)
{
    if (!test(l->wanted, page)) {
        l->stats.repeated++;
        return 0;
    }
    const int rc = copy_locked(l, page, bytes);
    if (rc < 0)
        return vmm_error_host(rc, "userfaultfd would not install a page: %s", strerror(-rc));
    l->stats.unasked += unasked && !test(l->asked, page);
    mark_here_locked(l, page);
    finish_locked(l);
    return 1;
}

/* n pages that follow each other in a region; those that are here already stay. Answers how many were not, or -errno. */
static int install(struct vmm_lazy *l, uint64_t first, uint64_t n, const uint8_t *bytes, bool unasked)
{
    int installed = 0, rc = 0;
    pthread_mutex_lock(&l->lock);
    if (l->state == VMM_LAZY_IDLE || l->state == VMM_LAZY_ABANDONED)
        rc = vmm_error_set(-EBUSY, "memory that comes later has not begun to, or never will");
    for (uint64_t i = 0; i < n && rc >= 0; i++) {
        rc = install_locked(l, first + i, bytes + i * VMM_PAGE, unasked);
        installed += rc > 0;
    }
    pthread_mutex_unlock(&l->lock);
    return rc < 0 ? rc : installed;
}

/* A host without a page left to give cannot go on. */
static bool survived(struct vmm_lazy *l, int rc)
{
    if (rc < 0)
        abandon(l, vmm_error_text());
    return rc >= 0;
}

/* ---- sources; on the thread ---- */

static void lose(struct vmm_lazy *l, const char *why)
{
    if (l->stream >= 0)
        close(l->stream);
    l->stream = -1;
    l->from_file = false;
    l->lost = true;
    l->n_input = 0;
    pthread_mutex_lock(&l->lock);
    const bool serving = l->state == VMM_LAZY_SERVING;
    if (serving)
        enter_locked(l, VMM_LAZY_LOST);
    pthread_mutex_unlock(&l->lock);
    if (serving)
        vmm_vm_say(l->vm, "guest memory that is still to come: its source %s; the guest waits", why);
}

/* Pages first..first+n of one region, from its file. */
static int read_pages(struct vmm_lazy *l, uint64_t first, uint64_t n, uint8_t *buffer)
{
    const struct part *p = part_of(l, first);
    const uint64_t at = p->offset + (first - p->first) * VMM_PAGE;
    size_t have = 0;
    while (have < n * VMM_PAGE) {
        const ssize_t got = pread(p->fd, buffer + have, n * VMM_PAGE - have, (off_t)(at + have));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return -1;
        have += (size_t)got;
    }
    return 0;
}

static bool from_file(struct vmm_lazy *l, uint64_t first, uint64_t n, bool unasked)
{
    _Alignas(64) uint8_t buffer[RUN_PAGES * VMM_PAGE];
    if (read_pages(l, first, n, buffer) < 0) {
        lose(l, "is a file that cannot be read, or ends too early");
        return false;
    }
    return survived(l, install(l, first, n, buffer, unasked));
}

static bool request(struct vmm_lazy *l, uint64_t page)
{
    const uint64_t gpa = htole64(gpa_of(l, page));
    const ssize_t sent = send(l->stream, &gpa, sizeof(gpa), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == sizeof(gpa))
        return true;
    lose(l, sent < 0 && errno != EAGAIN ? "has closed its socket" : "takes no more requests");
    return false;
}

/* One answer from the start of the input: how many bytes it had; 0: not all of it is here; -1: it is none. */
static ssize_t take_answer(struct vmm_lazy *l, const uint8_t *bytes, size_t n)
{
    struct answer answer;
    uint64_t page;
    if (n < sizeof(answer))
        return 0;
    memcpy(&answer, bytes, sizeof(answer));
    if (answer.reserved || le32toh(answer.kind) > 1 || !page_at(l, le64toh(answer.gpa), &page))
        return -1;
    const size_t size = sizeof(answer) + (answer.kind ? VMM_PAGE : 0);
    if (n < size)
        return 0;
    survived(l, install(l, page, 1, answer.kind ? bytes + sizeof(answer) : zeros, true));
    return (ssize_t)size;
}

static void receive(struct vmm_lazy *l)
{
    const ssize_t got = recv(l->stream, l->input + l->n_input, INPUT - l->n_input, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        lose(l, got ? "cannot be read any more" : "has closed its socket");
        return;
    }
    l->n_input += (size_t)got;
    size_t at = 0;
    for (ssize_t taken; (taken = take_answer(l, l->input + at, l->n_input - at)); at += (size_t)taken)
        if (taken < 0) {
            lose(l, "sent what is no page of this machine");
            return;
        }
    l->n_input -= at;
    memmove(l->input, l->input + at, l->n_input);
}

/* Take the socket that was given, and ask for everything that is waited for. */
static void take_stream(struct vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    const int fd = l->stream_next;
    l->stream_next = -1;
    if (fd >= 0 && l->state == VMM_LAZY_LOST)
        enter_locked(l, VMM_LAZY_SERVING);
    pthread_mutex_unlock(&l->lock);
    if (fd < 0)
        return;
    if (l->stream >= 0)
        close(l->stream);
    l->stream = fd;
    l->from_file = l->lost = false;
    l->n_input = 0;
    for (uint64_t page = 0;; page++) {
        pthread_mutex_lock(&l->lock);
        page = vmm_bitmap_next(l->asked, page, l->pages, true);
        pthread_mutex_unlock(&l->lock);
        if (page >= l->pages || !request(l, page))
            return;
    }
}

/* ---- faults; on the thread ---- */

static void ask_locked(struct vmm_lazy *l, uint64_t page)
{
    if (!test(l->asked, page))
        l->n_asked++;
    set(l->asked, page);
}

/* A page that is missing: wanted, so it is fetched; or one that the guest has given back or never had: zeros. */
static void serve_fault(struct vmm_lazy *l, uint64_t page)
{
    const uint64_t start = now_ns();
    pthread_mutex_lock(&l->lock);
    l->stats.faults++;
    const bool wanted = test(l->wanted, page), waited_for = test(l->asked, page);
    const int rc = wanted ? 0 : copy_locked(l, page, zeros);
    if (wanted && !waited_for) {
        l->order[l->n_order++] = gpa_of(l, page);
        ask_locked(l, page);
    }
    pthread_mutex_unlock(&l->lock);
    if (rc < 0) {
        survived(l, vmm_error_host(rc, "userfaultfd would not install a page: %s", strerror(-rc)));
        return;
    }
    if (!wanted)
        return;
    if (l->from_file) {
        if (from_file(l, page, 1, false)) {
            pthread_mutex_lock(&l->lock);
            l->stats.fault_ns += now_ns() - start;
            pthread_mutex_unlock(&l->lock);
        }
    } else if (l->stream >= 0) {
        if (!waited_for)
            request(l, page);
    } else {
        signal_fd(l->event_fd);
    }
}

static void serve_faults(struct vmm_lazy *l)
{
    struct uffd_msg messages[MESSAGES];
    const ssize_t got = read(l->uffd, messages, sizeof(messages));
    for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++) {
        uint64_t page;
        if (messages[i].event == UFFD_EVENT_PAGEFAULT &&
            page_of_host(l, messages[i].arg.pagefault.address, &page))
            serve_fault(l, page);
    }
}

/* ---- fetching ahead; on the thread ---- */

/* The next pages to fetch unasked, in one region: how many, from *first on. */
static uint64_t choose_locked(struct vmm_lazy *l, uint64_t *first)
{
    while (l->listed < l->n_list) {
        *first = l->list[l->listed++];
        if (test(l->wanted, *first) && !test(l->asked, *first))
            return 1;
    }
    if (!l->rest)
        return 0;
    *first = l->reached;
    do
        *first = vmm_bitmap_next(l->wanted, *first, l->pages, true);
    while (*first < l->pages && test(l->asked, *first) && ++*first);
    l->reached = *first;
    if (*first >= l->pages)
        return 0;
    const struct part *p = part_of(l, *first);
    uint64_t n = 1;
    while (n < RUN_PAGES && *first + n < p->first + p->pages && test(l->wanted, *first + n) &&
           !test(l->asked, *first + n))
        n++;
    return n;
}

/* Fetch some pages ahead, or ask for them. Answers whether there may be more to do at once. */
static bool fetch_ahead(struct vmm_lazy *l)
{
    uint64_t first = 0, n = 0;
    pthread_mutex_lock(&l->lock);
    if (l->state == VMM_LAZY_SERVING && (l->from_file || (l->stream >= 0 && l->n_asked < ASKED_MAX)))
        n = choose_locked(l, &first);
    if (n && !l->from_file) {
        n = 1;
        ask_locked(l, first);
    }
    pthread_mutex_unlock(&l->lock);
    if (n)
        return l->from_file ? from_file(l, first, n, true) : request(l, first);
    return false;
}

/* The kernel forgets the ranges, and wakes who waits. Only the thread, or nobody else, has the descriptor in hand. */
static void let_go(struct vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    if (l->uffd >= 0)
        close(l->uffd);
    l->uffd = -1;
    pthread_mutex_unlock(&l->lock);
}

static void *serve(void *opaque)
{
    struct vmm_lazy *l = opaque;
    for (bool more = true;;) {
        struct pollfd fds[] = {{.fd = l->wake_fd, .events = POLLIN},
                               {.fd = l->uffd, .events = POLLIN},
                               {.fd = l->stream, .events = POLLIN},
                               {.fd = l->lost ? l->vm->stop_fd : -1, .events = POLLIN}};
        if (poll(fds, 4, more ? 0 : -1) < 0)
            continue;
        if (fds[0].revents)
            drain_fd(l->wake_fd);
        pthread_mutex_lock(&l->lock);
        const bool over = l->ends || l->state >= VMM_LAZY_DONE;
        pthread_mutex_unlock(&l->lock);
        if (over)
            break;
        take_stream(l);
        if (fds[1].revents & POLLIN)
            serve_faults(l);
        if (fds[2].revents && l->stream == fds[2].fd)
            receive(l);
        if (fds[3].revents && l->lost) /* a vCPU that waits for a page cannot leave */
            abandon(l, "the machine was stopped while the source of its memory was gone");
        more = fetch_ahead(l);
    }
    let_go(l);
    if (l->stream >= 0)
        close(l->stream); /* by which the other side learns it */
    l->stream = -1;
    return NULL;
}

/* ---- create, start, destroy ---- */

static int open_userfaultfd(void)
{
    /* Whoever may open the device may serve the kernel's own faults; the system call asks for a capability instead. */
    const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = -1;
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return errno == EPERM
                   ? vmm_error_set(-EPERM, "userfaultfd: have access to /dev/userfaultfd, or set "
                                           "vm.unprivileged_userfaultfd=1, or map the memory from a file")
                   : vmm_error_errno("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    if (ioctl(fd, UFFDIO_API, &api) == 0)
        return fd;
    const int rc = vmm_error_errno("userfaultfd for shared memory");
    close(fd);
    return rc;
}

static int prepare(struct vmm_lazy *l)
{
    for (uint32_t i = 0; i < l->vm->n_regions; i++) {
        const struct vmm_region *r = &l->vm->regions[i];
        if (r->flags & (VMM_MEMORY_PRIVATE | VMM_MEMORY_HUGE_2M))
            return vmm_error_set(-ENOTSUP,
                                 "memory that comes later can be neither private nor in huge pages");
        l->parts[l->n_parts++] = (struct part){
            .gpa = r->gpa, .pages = r->size / VMM_PAGE, .first = l->pages, .host = r->host, .fd = -1};
        l->pages += r->size / VMM_PAGE;
    }
    const size_t words = l->pages / 64 + 1;
    l->wanted = calloc(words, sizeof(*l->wanted));
    l->asked = calloc(words, sizeof(*l->asked));
    l->told = calloc(words, sizeof(*l->told));
    l->order = calloc(l->pages, sizeof(*l->order));
    l->input = malloc(INPUT);
    if (!l->wanted || !l->asked || !l->told || !l->order || !l->input)
        return vmm_error_set(-ENOMEM, "memory that comes later");
    l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    l->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (l->wake_fd < 0 || l->event_fd < 0)
        return vmm_error_errno("eventfd");
    l->uffd = open_userfaultfd();
    return l->uffd < 0 ? l->uffd : 0;
}

int vmm_lazy_create(vmm_vm *vm, vmm_lazy **out)
{
    *out = NULL;
    if (vm->lazy)
        return vmm_error_set(-EEXIST, "memory of this machine comes later already");
    struct vmm_lazy *l = calloc(1, sizeof(*l));
    if (!l)
        return vmm_error_set(-ENOMEM, "memory that comes later");
    l->vm = vm;
    l->uffd = l->wake_fd = l->event_fd = l->stream = l->stream_next = -1;
    pthread_mutex_init(&l->lock, NULL);
    vmm_cond_init(&l->changed);
    const int rc = prepare(l);
    if (rc < 0) {
        vmm_lazy_destroy(l);
        return rc;
    }
    *out = vm->lazy = l;
    return 0;
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

void vmm_lazy_destroy(struct vmm_lazy *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->ends = true;
    pthread_mutex_unlock(&l->lock);
    if (l->started) {
        signal_fd(l->wake_fd);
        pthread_join(l->thread, NULL);
    }
    let_go(l);
    for (uint32_t i = 0; i < l->n_parts; i++)
        close_fd(l->parts[i].fd);
    close_fd(l->stream);
    close_fd(l->stream_next);
    close_fd(l->wake_fd);
    close_fd(l->event_fd);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l->wanted);
    free(l->asked);
    free(l->told);
    free(l->order);
    free(l->list);
    free(l->input);
    free(l);
}

static int check_idle(const struct vmm_lazy *l, uint32_t region)
{
    if (l->started)
        return vmm_error_set(-EBUSY, "memory that comes later has begun to come");
    return region < l->n_parts ? 0 : vmm_error_set(-EINVAL, "there is no memory region %u", region);
}

int vmm_lazy_want(vmm_lazy *l, uint32_t region, const uint64_t *bitmap)
{
    const int rc = check_idle(l, region);
    if (rc < 0)
        return rc;
    const struct part *p = &l->parts[region];
    for (uint64_t from = 0, to; (from = vmm_bitmap_next(bitmap, from, p->pages, true)) < p->pages;
         from = to) {
        for (to = from; to < p->pages && test(bitmap, to); to++) {
            l->stats.wanted += !test(l->wanted, p->first + to);
            set(l->wanted, p->first + to);
        }
        if (madvise(p->host + from * VMM_PAGE, (to - from) * VMM_PAGE, MADV_REMOVE) < 0)
            return vmm_error_errno("giving up the pages that will come");
    }
    l->stats.missing = l->stats.wanted;
    return 0;
}

int vmm_lazy_from_file(vmm_lazy *l, uint32_t region, int fd, uint64_t offset)
{
    const int rc = check_idle(l, region);
    if (rc < 0)
        return rc;
    close_fd(l->parts[region].fd);
    l->parts[region].fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    l->parts[region].offset = offset;
    l->from_file = true;
    return l->parts[region].fd < 0 ? vmm_error_errno("file of guest memory") : 0;
}

static int register_parts(const struct vmm_lazy *l)
{
    for (uint32_t i = 0; i < l->n_parts; i++) {
        struct uffdio_register range = {
            .range = {.start = (uintptr_t)l->parts[i].host, .len = l->parts[i].pages * VMM_PAGE},
            .mode = UFFDIO_REGISTER_MODE_MISSING};
        if (ioctl(l->uffd, UFFDIO_REGISTER, &range) < 0)
            return vmm_error_errno("UFFDIO_REGISTER");
    }
    return 0;
}

int vmm_lazy_start(vmm_lazy *l)
{
    int rc = check_idle(l, 0);
    if (rc == 0)
        rc = register_parts(l);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&l->lock);
    enter_locked(l, VMM_LAZY_SERVING);
    finish_locked(l);
    pthread_mutex_unlock(&l->lock);
    rc = vmm_thread_start(&l->thread, "lazy-memory", serve, l);
    l->started = rc == 0;
    if (rc < 0)
        let_go(l);
    return rc;
}

/* ---- from outside ---- */

int vmm_lazy_connect(vmm_lazy *l, int fd)
{
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return vmm_error_errno("socket that memory comes from");
    pthread_mutex_lock(&l->lock);
    const bool over = l->state >= VMM_LAZY_DONE;
    const int before = l->stream_next;
    if (!over)
        l->stream_next = own;
    pthread_mutex_unlock(&l->lock);
    close_fd(over ? own : before);
    signal_fd(l->wake_fd);
    return over ? vmm_error_set(-EBUSY, "no more memory will come") : 0;
}

int vmm_lazy_prefetch(vmm_lazy *l, const uint64_t *gpas, size_t n)
{
    uint64_t *list = calloc(n ? n : 1, sizeof(*list));
    if (!list)
        return vmm_error_set(-ENOMEM, "list of pages");
    size_t n_list = 0;
    for (size_t i = 0; i < n; i++)
        n_list += page_at(l, gpas[i], &list[n_list]);
    pthread_mutex_lock(&l->lock);
    const bool taken = !l->list;
    if (taken) {
        l->list = list;
        l->n_list = n_list;
    }
    pthread_mutex_unlock(&l->lock);
    if (!taken)
        free(list);
    signal_fd(l->wake_fd);
    return taken ? 0 : vmm_error_set(-EEXIST, "there is a list of pages already");
}

void vmm_lazy_fetch_rest(vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    l->rest = true;
    pthread_mutex_unlock(&l->lock);
    signal_fd(l->wake_fd);
}

int vmm_lazy_install(vmm_lazy *l, uint64_t gpa, const void *page)
{
    uint64_t number;
    if (!page_at(l, gpa, &number))
        return vmm_error_set(-EINVAL, "%#llx is not the address of a page", (unsigned long long)gpa);
    return install(l, number, 1, page ? page : zeros, true);
}

size_t vmm_lazy_wanted(vmm_lazy *l, uint64_t *gpas, size_t max)
{
    size_t n = 0;
    pthread_mutex_lock(&l->lock);
    for (uint64_t page = 0; n < max && (page = vmm_bitmap_next(l->asked, page, l->pages, true)) < l->pages;
         page++) {
        if (test(l->told, page))
            continue;
        set(l->told, page);
        gpas[n++] = gpa_of(l, page);
    }
    pthread_mutex_unlock(&l->lock);
    return n;
}

int vmm_lazy_fd(vmm_lazy *l)
{
    return l->event_fd;
}

int vmm_lazy_state(vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    const int state = l->state;
    pthread_mutex_unlock(&l->lock);
    return state;
}

int vmm_lazy_wait(vmm_lazy *l, int timeout_ms)
{
    const struct timespec deadline = vmm_deadline(timeout_ms), *until = timeout_ms < 0 ? NULL : &deadline;
    int rc = 0;
    pthread_mutex_lock(&l->lock);
    while (l->state < VMM_LAZY_DONE && rc == 0)
        rc = vmm_cond_wait_until(&l->changed, &l->lock, until);
    const int state = l->state;
    pthread_mutex_unlock(&l->lock);
    if (state == VMM_LAZY_ABANDONED)
        return vmm_error_set(-ECANCELED, "guest memory is missing for good");
    return state == VMM_LAZY_DONE;
}

void vmm_lazy_abandon(vmm_lazy *l, const char *why)
{
    abandon(l, why);
}

size_t vmm_lazy_order(vmm_lazy *l, uint64_t *gpas, size_t max)
{
    pthread_mutex_lock(&l->lock);
    const size_t n = l->n_order;
    if (n && max)
        memcpy(gpas, l->order, (n < max ? n : max) * sizeof(*gpas));
    pthread_mutex_unlock(&l->lock);
    return n;
}

void vmm_lazy_get_stats(vmm_lazy *l, vmm_lazy_stats *stats)
{
    pthread_mutex_lock(&l->lock);
    *stats = l->stats;
    pthread_mutex_unlock(&l->lock);
}
