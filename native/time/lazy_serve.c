/* SPDX-License-Identifier: Apache-2.0 */
/* The thread of lazy memory: its sources, faults, and fetching ahead. */
#include "time/lazy_parts.h"

#include <endian.h>
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    RUN_PAGES = 16, /* fetched at a time from a file: a fault waits for no more than that */
    MESSAGES = 16,  /* faults taken at a time */
    ASKED_MAX = 64, /* unasked-for pages on their way over a socket: one is asked for when one has come */
};

struct answer {
    uint64_t gpa;
    uint32_t kind; /* 0: zeros; 1: a page follows */
    uint32_t reserved;
};
_Static_assert(sizeof(struct answer) == 16, "as vmmlazy.h says");

static const uint8_t zeros[VMM_PAGE];

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
        vmm_lazy_enter_locked(l, VMM_LAZY_LOST);
    pthread_mutex_unlock(&l->lock);
    if (serving)
        vmm_vm_say(l->vm, "guest memory that is still to come: its source %s; the guest waits", why);
}

/* Pages first..first+n of one region, from its file. */
static int read_pages(struct vmm_lazy *l, uint64_t first, uint64_t n, uint8_t *buffer)
{
    const struct vmm_lazy_part *p = vmm_lazy_part(l, first);
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
    return vmm_lazy_survived(l, vmm_lazy_install(l, first, n, buffer, unasked));
}

static bool request(struct vmm_lazy *l, uint64_t page)
{
    const uint64_t gpa = htole64(vmm_lazy_gpa(l, page));
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
    if (answer.reserved || le32toh(answer.kind) > 1 || !vmm_lazy_page_at(l, le64toh(answer.gpa), &page))
        return -1;
    const size_t size = sizeof(answer) + (answer.kind ? VMM_PAGE : 0);
    if (n < size)
        return 0;
    vmm_lazy_survived(l, vmm_lazy_install(l, page, 1, answer.kind ? bytes + sizeof(answer) : zeros, true));
    return (ssize_t)size;
}

static void receive(struct vmm_lazy *l)
{
    const ssize_t got = recv(l->stream, l->input + l->n_input, VMM_LAZY_INPUT - l->n_input, MSG_DONTWAIT);
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
        vmm_lazy_enter_locked(l, VMM_LAZY_SERVING);
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
    const int rc = wanted ? 0 : vmm_lazy_copy_locked(l, page, zeros);
    if (wanted && !waited_for) {
        l->order[l->n_order++] = vmm_lazy_gpa(l, page);
        ask_locked(l, page);
    }
    pthread_mutex_unlock(&l->lock);
    if (rc < 0) {
        vmm_lazy_survived(l, vmm_error_host(rc, "userfaultfd would not install a page: %s", strerror(-rc)));
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
    }
}

static void serve_faults(struct vmm_lazy *l)
{
    struct uffd_msg messages[MESSAGES];
    const ssize_t got = read(l->uffd, messages, sizeof(messages));
    for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++) {
        uint64_t page;
        if (messages[i].event == UFFD_EVENT_PAGEFAULT &&
            vmm_lazy_page_of_host(l, messages[i].arg.pagefault.address, &page))
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
    const struct vmm_lazy_part *p = vmm_lazy_part(l, *first);
    uint64_t n = 1;
    while (n < RUN_PAGES && *first + n < p->first + p->pages && test(l->wanted, *first + n) &&
           !test(l->asked, *first + n))
        n++;
    return n;
}

/* Fetch some pages ahead, or ask for them. Returns whether there may be more to do at once. */
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

void *vmm_lazy_serve(void *opaque)
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
            vmm_lazy_give_up(l, "the machine was stopped while the source of its memory was gone");
        more = fetch_ahead(l);
    }
    vmm_lazy_let_go(l);
    if (l->stream >= 0)
        close(l->stream); /* by which the other side learns it */
    l->stream = -1;
    return NULL;
}
