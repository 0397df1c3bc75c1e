/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of lazy memory: their numbers and addresses, and installing them. */
#include "time/lazy_parts.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

void vmm_lazy_signal(int fd)
{
    const ssize_t written = write(fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* only a full counter could refuse, and then it is readable already */
}

/* ---- pages: by number, by guest-physical and by host address ---- */

const struct vmm_lazy_part *vmm_lazy_part(const struct vmm_lazy *l, uint64_t page)
{
    uint32_t i = 0;
    while (page - l->parts[i].first >= l->parts[i].pages)
        i++;
    return &l->parts[i];
}

static uint8_t *host_of(const struct vmm_lazy *l, uint64_t page)
{
    const struct vmm_lazy_part *p = vmm_lazy_part(l, page);
    return p->host + (page - p->first) * VMM_PAGE;
}

uint64_t vmm_lazy_gpa(const struct vmm_lazy *l, uint64_t page)
{
    const struct vmm_lazy_part *p = vmm_lazy_part(l, page);
    return p->gpa + (page - p->first) * VMM_PAGE;
}

bool vmm_lazy_page_at(const struct vmm_lazy *l, uint64_t gpa, uint64_t *page)
{
    for (uint32_t i = 0; i < l->n_parts; i++) {
        const struct vmm_lazy_part *p = &l->parts[i];
        if (gpa >= p->gpa && (gpa - p->gpa) / VMM_PAGE < p->pages) {
            *page = p->first + (gpa - p->gpa) / VMM_PAGE;
            return gpa % VMM_PAGE == 0;
        }
    }
    return false;
}

bool vmm_lazy_page_of_host(const struct vmm_lazy *l, uint64_t host, uint64_t *page)
{
    for (uint32_t i = 0; i < l->n_parts; i++) {
        const struct vmm_lazy_part *p = &l->parts[i];
        if (host >= (uintptr_t)p->host && (host - (uintptr_t)p->host) / VMM_PAGE < p->pages) {
            *page = p->first + (host - (uintptr_t)p->host) / VMM_PAGE;
            return true;
        }
    }
    return false;
}

/* ---- state ---- */

void vmm_lazy_enter_locked(struct vmm_lazy *l, int state)
{
    l->state = state;
    pthread_cond_broadcast(&l->changed);
    vmm_lazy_signal(l->event_fd);
}

void vmm_lazy_give_up(struct vmm_lazy *l, const char *why)
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
    vmm_lazy_enter_locked(l, VMM_LAZY_ABANDONED);
    pthread_mutex_unlock(&l->lock);
    vmm_lazy_signal(l->wake_fd);
}

/* ---- installing ---- */

/* 0; or why the kernel would not. */
int vmm_lazy_copy_locked(struct vmm_lazy *l, uint64_t page, const void *bytes)
{
    struct uffdio_copy copy = {.dst = (uintptr_t)host_of(l, page), .src = (uintptr_t)bytes, .len = VMM_PAGE};
    while (ioctl(l->uffd, UFFDIO_COPY, &copy) < 0) {
        if (errno == EEXIST) { /* another writer of the file won the race: wake the waiters ourselves */
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

void vmm_lazy_finish_locked(struct vmm_lazy *l)
{
    if (l->stats.missing || l->state == VMM_LAZY_IDLE || l->state >= VMM_LAZY_DONE)
        return;
    vmm_lazy_enter_locked(l, VMM_LAZY_DONE);
    vmm_lazy_signal(l->wake_fd);
}

static int install_locked(struct vmm_lazy *l, uint64_t page, const void *bytes, bool unasked)
{
    if (!test(l->wanted, page)) {
        l->stats.repeated++;
        return 0;
    }
    const int rc = vmm_lazy_copy_locked(l, page, bytes);
    if (rc < 0)
        return vmm_error_host(rc, "userfaultfd would not install a page: %s", strerror(-rc));
    l->stats.unasked += unasked && !test(l->asked, page);
    mark_here_locked(l, page);
    vmm_lazy_finish_locked(l);
    return 1;
}

/* n pages that follow each other in a region; those that are here already stay. Returns how many were not, or -errno. */
int vmm_lazy_install(struct vmm_lazy *l, uint64_t first, uint64_t n, const uint8_t *bytes, bool unasked)
{
    int installed = 0, rc = 0;
    pthread_mutex_lock(&l->lock);
    if (l->state == VMM_LAZY_IDLE || l->state == VMM_LAZY_ABANDONED)
        rc = vmm_error_set(-EBUSY, "lazy guest memory was not started, or was abandoned");
    for (uint64_t i = 0; i < n && rc >= 0; i++) {
        rc = install_locked(l, first + i, bytes + i * VMM_PAGE, unasked);
        installed += rc > 0;
    }
    pthread_mutex_unlock(&l->lock);
    return rc < 0 ? rc : installed;
}

/* A host without a page left to give cannot go on. */
bool vmm_lazy_survived(struct vmm_lazy *l, int rc)
{
    if (rc < 0)
        vmm_lazy_give_up(l, vmm_error_text());
    return rc >= 0;
}

/* Closing makes the kernel forget the ranges and wake their waiters. No other thread uses the descriptor then. */
void vmm_lazy_let_go(struct vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    if (l->uffd >= 0)
        close(l->uffd);
    l->uffd = -1;
    pthread_mutex_unlock(&l->lock);
}
