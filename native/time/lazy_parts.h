/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The files of lazy memory, each above the one before: lazy_pages.c knows the pages and installs them, lazy_serve.c is
 * the thread that serves faults and fetches ahead, lazy.c is the interface of vmmlazy.h.
 *
 * One lock guards the bitmaps and the installing itself, so that a page cannot be installed twice: a second copy, from a
 * slower source, would overwrite what the guest has written since. Only the thread reads the file and the socket, and it
 * holds no lock while it does.
 */
#ifndef VMM_TIME_LAZY_PARTS_H
#define VMM_TIME_LAZY_PARTS_H

#include "base/bitmap.h"
#include "base/thread.h"
#include "time/lazy.h"
#include "vmmsnapshot.h"

enum { VMM_LAZY_INPUT = 128 * 1024 }; /* of the socket */

struct vmm_lazy_part {          /* a region, and the file its pages lie in */
    uint64_t gpa, pages, first; /* first: number of its first page among all */
    uint8_t *host;
    int fd;
    uint64_t offset;
};

struct vmm_lazy {
    struct vmm_vm *vm;
    struct vmm_lazy_part parts[VMM_MAX_REGIONS];
    uint32_t n_parts;
    uint64_t pages;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    int state;        /* enum vmm_lazy_state */
    int uffd;         /* -1: closed, and memory is memory */
    uint64_t *wanted; /* bit: the page is to come */
    uint64_t *asked;  /* bit: a fault waits for it, or it was requested ahead */
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

static inline bool test(const uint64_t *bits, uint64_t n)
{
    return bits[n / 64] >> n % 64 & 1;
}

static inline void set(uint64_t *bits, uint64_t n)
{
    bits[n / 64] |= 1ull << n % 64;
}

static inline void clear(uint64_t *bits, uint64_t n)
{
    bits[n / 64] &= ~(1ull << n % 64);
}

/* Make an eventfd readable. */
void vmm_lazy_signal(int fd);

const struct vmm_lazy_part *vmm_lazy_part(const struct vmm_lazy *l, uint64_t page);
uint64_t vmm_lazy_gpa(const struct vmm_lazy *l, uint64_t page);
/* The page that begins at a guest-physical address, or that holds a host address. false: none. */
bool vmm_lazy_page_at(const struct vmm_lazy *l, uint64_t gpa, uint64_t *page);
bool vmm_lazy_page_of_host(const struct vmm_lazy *l, uint64_t host, uint64_t *page);

void vmm_lazy_enter_locked(struct vmm_lazy *l, int state);
/* All wanted pages are here: DONE, unless it is over already. */
void vmm_lazy_finish_locked(struct vmm_lazy *l);
/* The pages will not come: stop the machine, then end the thread. `why` may be NULL. Idempotent. */
void vmm_lazy_give_up(struct vmm_lazy *l, const char *why);

/* Copy a page to where it belongs and wake its waiters. 0; or why the kernel refuses. */
int vmm_lazy_copy_locked(struct vmm_lazy *l, uint64_t page, const void *bytes);
/* n pages that follow each other in a region; those that are here already stay. Returns how many were not, or -errno. */
int vmm_lazy_install(struct vmm_lazy *l, uint64_t first, uint64_t n, const uint8_t *bytes, bool unasked);
/* Whether `rc` is no error; a host without a page left to give cannot go on, and the machine is stopped. */
bool vmm_lazy_survived(struct vmm_lazy *l, int rc);
/* Close the userfaultfd: the kernel forgets the ranges and wakes every waiter. */
void vmm_lazy_let_go(struct vmm_lazy *l);

/* The thread; `opaque` is the lazy memory. */
void *vmm_lazy_serve(void *opaque);

#endif
