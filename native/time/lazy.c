/* SPDX-License-Identifier: Apache-2.0 */
/* Lazy guest memory, filled on demand through userfaultfd: its life, and what is asked of it from outside. */
#include "time/lazy_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_userfaultfd(void)
{
    /* A process that may open the device may serve the kernel's own faults; the system call asks for a capability instead. */
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
            return vmm_error_set(-ENOTSUP, "lazy guest memory can be neither private nor in huge pages");
        l->parts[l->n_parts++] = (struct vmm_lazy_part){
            .gpa = r->gpa, .pages = r->size / VMM_PAGE, .first = l->pages, .host = r->host, .fd = -1};
        l->pages += r->size / VMM_PAGE;
    }
    const size_t words = l->pages / 64 + 1;
    l->wanted = calloc(words, sizeof(*l->wanted));
    l->asked = calloc(words, sizeof(*l->asked));
    l->order = calloc(l->pages, sizeof(*l->order));
    l->input = malloc(VMM_LAZY_INPUT);
    if (!l->wanted || !l->asked || !l->order || !l->input)
        return vmm_error_set(-ENOMEM, "no memory for lazy guest memory");
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
        return vmm_error_set(-EEXIST, "the memory of this machine is lazy already");
    struct vmm_lazy *l = calloc(1, sizeof(*l));
    if (!l)
        return vmm_error_set(-ENOMEM, "no memory for lazy guest memory");
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
        vmm_lazy_signal(l->wake_fd);
        pthread_join(l->thread, NULL);
    }
    vmm_lazy_let_go(l);
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
    free(l->order);
    free(l->list);
    free(l->input);
    free(l);
}

static int check_idle(const struct vmm_lazy *l, uint32_t region)
{
    if (l->started)
        return vmm_error_set(-EBUSY, "lazy guest memory was started already");
    return region < l->n_parts ? 0 : vmm_error_set(-EINVAL, "there is no memory region %u", region);
}

int vmm_lazy_want(vmm_lazy *l, uint32_t region, const uint64_t *bitmap)
{
    const int rc = check_idle(l, region);
    if (rc < 0)
        return rc;
    const struct vmm_lazy_part *p = &l->parts[region];
    for (uint64_t from = 0, to; (from = vmm_bitmap_next(bitmap, from, p->pages, true)) < p->pages;
         from = to) {
        for (to = from; to < p->pages && test(bitmap, to); to++) {
            l->stats.wanted += !test(l->wanted, p->first + to);
            set(l->wanted, p->first + to);
        }
        if (madvise(p->host + from * VMM_PAGE, (to - from) * VMM_PAGE, MADV_REMOVE) < 0)
            return vmm_error_errno("dropping the pages that are wanted");
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
    vmm_lazy_enter_locked(l, VMM_LAZY_SERVING);
    vmm_lazy_finish_locked(l);
    pthread_mutex_unlock(&l->lock);
    rc = vmm_thread_start(&l->thread, "lazy-memory", vmm_lazy_serve, l);
    l->started = rc == 0;
    if (rc < 0)
        vmm_lazy_let_go(l);
    return rc;
}

/* ---- from outside ---- */

int vmm_lazy_connect(vmm_lazy *l, int fd)
{
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return vmm_error_errno("duplicating the socket of lazy guest memory");
    pthread_mutex_lock(&l->lock);
    const bool over = l->state >= VMM_LAZY_DONE;
    const int before = l->stream_next;
    if (!over)
        l->stream_next = own;
    pthread_mutex_unlock(&l->lock);
    close_fd(over ? own : before);
    vmm_lazy_signal(l->wake_fd);
    return over ? vmm_error_set(-EBUSY, "lazy guest memory is complete, or was abandoned: it needs no source")
                : 0;
}

int vmm_lazy_prefetch(vmm_lazy *l, const uint64_t *gpas, size_t n)
{
    uint64_t *list = calloc(n ? n : 1, sizeof(*list));
    if (!list)
        return vmm_error_set(-ENOMEM, "no memory for a list of pages to prefetch");
    size_t n_list = 0;
    for (size_t i = 0; i < n; i++)
        n_list += vmm_lazy_page_at(l, gpas[i], &list[n_list]);
    pthread_mutex_lock(&l->lock);
    const bool taken = !l->list;
    if (taken) {
        l->list = list;
        l->n_list = n_list;
    }
    pthread_mutex_unlock(&l->lock);
    if (!taken)
        free(list);
    vmm_lazy_signal(l->wake_fd);
    return taken ? 0 : vmm_error_set(-EEXIST, "a list of pages to prefetch was given already");
}

void vmm_lazy_fetch_rest(vmm_lazy *l)
{
    pthread_mutex_lock(&l->lock);
    l->rest = true;
    pthread_mutex_unlock(&l->lock);
    vmm_lazy_signal(l->wake_fd);
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
        return vmm_error_set(-ECANCELED, "pages of lazy guest memory are missing for good");
    return state == VMM_LAZY_DONE;
}

void vmm_lazy_abandon(vmm_lazy *l, const char *why)
{
    vmm_lazy_give_up(l, why);
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
