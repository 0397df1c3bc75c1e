/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dirty logs: pages that the guest has written, from the engine's dirty log, and pages that this process has written,
 * from the bitmap of core/written.c. Fetching merges both into every open log and clears them, so no log misses a page
 * that another has fetched. A writer marks after its write: a reader that copies a page after fetching either has the
 * write, or finds the mark the next time.
 */
#include "time/dirty.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct vmm_dirty {
    struct vmm_vm *vm;
    struct vmm_dirty *next;
    uint64_t *bits; /* of every region, one after another; each begins with a word of its own */
};

/* ---- fetching ---- */

static int log_regions(struct vmm_vm *vm, bool on)
{
    int rc = 0;
    for (uint32_t i = 0; i < vm->n_regions && rc == 0; i++) {
        const uint32_t flags = vm->regions[i].flags;
        if (!(flags & VMM_MEMORY_READONLY) && !(flags & VMM_MEMORY_DIRTY_LOG) == on)
            rc = vmm_region_set_flags(vm, i, flags ^ VMM_MEMORY_DIRTY_LOG);
    }
    return rc;
}

/* One region's news into every log, with dirty_lock held; `scratch` has room for its words. */
static int fetch_region(struct vmm_vm *vm, uint32_t region, uint64_t *scratch)
{
    const size_t words = vmm_region_words(&vm->regions[region]), before = vmm_words_before(vm, region);
    const bool logged = vm->regions[region].flags & VMM_MEMORY_DIRTY_LOG;
    memset(scratch, 0, words * sizeof(*scratch));
    const int rc = logged ? vm->engine->ops->dirty_log(vm->engine, region, scratch) : 0;
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < words; i++) {
        if (atomic_load_explicit(&vm->touched[before + i], memory_order_relaxed))
            scratch[i] |= atomic_exchange_explicit(&vm->touched[before + i], 0, memory_order_acquire);
        for (struct vmm_dirty *d = vm->dirty; scratch[i] && d; d = d->next)
            d->bits[before + i] |= scratch[i];
    }
    return 0;
}

static int fetch(struct vmm_vm *vm)
{
    size_t most = 0;
    for (uint32_t i = 0; i < vm->n_regions; i++)
        most = vmm_region_words(&vm->regions[i]) > most ? vmm_region_words(&vm->regions[i]) : most;
    uint64_t *scratch = malloc(most * sizeof(*scratch));
    int rc = scratch ? 0 : vmm_error_set(-ENOMEM, "no memory for a dirty log");
    for (uint32_t i = 0; i < vm->n_regions && rc == 0; i++)
        rc = fetch_region(vm, i, scratch);
    free(scratch);
    return rc;
}

/* ---- logs ---- */

static int begin(struct vmm_vm *vm)
{
    const size_t words = vmm_words_before(vm, vm->n_regions);
    if (!vm->touched)
        vm->touched = calloc(words, sizeof(*vm->touched));
    if (!vm->touched)
        return vmm_error_set(-ENOMEM, "no memory for a dirty log");
    for (size_t i = 0; i < words; i++)
        atomic_store_explicit(&vm->touched[i], 0, memory_order_relaxed);
    atomic_store(&vm->tracked, true);
    return log_regions(vm, true);
}

static void end(struct vmm_vm *vm)
{
    log_regions(vm, false); /* refused: it costs the guest a fault a page, and is wrong in nothing */
    atomic_store(&vm->tracked, false); /* the bitmap stays: a device may be about to set a bit */
}

int vmm_dirty_open(vmm_vm *vm, vmm_dirty **out)
{
    *out = NULL;
    struct vmm_dirty *log = calloc(1, sizeof(*log));
    uint64_t *bits = calloc(vmm_words_before(vm, vm->n_regions), sizeof(*bits));
    if (!log || !bits) {
        free(log);
        free(bits);
        return vmm_error_set(-ENOMEM, "no memory for a dirty log");
    }
    *log = (struct vmm_dirty){.vm = vm, .bits = bits};
    pthread_mutex_lock(&vm->dirty_lock);
    int rc = vm->dirty ? fetch(vm) : begin(vm);
    if (rc == 0) {
        log->next = vm->dirty;
        vm->dirty = log;
    } else if (!vm->dirty) {
        end(vm);
    }
    pthread_mutex_unlock(&vm->dirty_lock);
    if (rc < 0) {
        free(bits);
        free(log);
        return rc;
    }
    *out = log;
    return 0;
}

void vmm_dirty_close(vmm_dirty *log)
{
    if (!log)
        return;
    struct vmm_vm *vm = log->vm;
    pthread_mutex_lock(&vm->dirty_lock);
    for (struct vmm_dirty **at = &vm->dirty; *at; at = &(*at)->next)
        if (*at == log) {
            *at = log->next;
            break;
        }
    if (!vm->dirty)
        end(vm);
    pthread_mutex_unlock(&vm->dirty_lock);
    free(log->bits);
    free(log);
}

int64_t vmm_dirty_collect(vmm_dirty *log)
{
    struct vmm_vm *vm = log->vm;
    const size_t words = vmm_words_before(vm, vm->n_regions);
    int64_t pages = 0;
    pthread_mutex_lock(&vm->dirty_lock);
    int rc = fetch(vm);
    for (size_t i = 0; i < words && rc == 0; i++)
        pages += __builtin_popcountll(log->bits[i]);
    pthread_mutex_unlock(&vm->dirty_lock);
    return rc < 0 ? rc : pages;
}

int64_t vmm_dirty_take(vmm_dirty *log, uint32_t region, uint64_t *bitmap, size_t words)
{
    struct vmm_vm *vm = log->vm;
    if (region >= vm->n_regions)
        return vmm_error_set(-EINVAL, "there is no memory region %u", region);
    if (words != vmm_region_words(&vm->regions[region]))
        return vmm_error_set(-EMSGSIZE, "a bitmap of %zu words is not the size of memory region %u", words,
                             region);
    int64_t pages = 0;
    pthread_mutex_lock(&vm->dirty_lock);
    uint64_t *bits = log->bits + vmm_words_before(vm, region);
    for (size_t i = 0; i < words; i++)
        pages += __builtin_popcountll(bits[i]);
    memcpy(bitmap, bits, words * sizeof(*bits));
    memset(bits, 0, words * sizeof(*bits));
    pthread_mutex_unlock(&vm->dirty_lock);
    return pages;
}

static int64_t undo_word(vmm_dirty *log, size_t word, uint32_t region, uint64_t page,
                         void (*copy_back)(void *opaque, uint32_t region, uint64_t page), void *opaque)
{
    const uint64_t dirty = log->bits[word];
    for (uint64_t bits = dirty; bits; bits &= bits - 1)
        copy_back(opaque, region, page + (unsigned)__builtin_ctzll(bits));
    for (struct vmm_dirty *other = log->vm->dirty; other; other = other->next)
        other->bits[word] |= dirty;
    log->bits[word] = 0;
    return __builtin_popcountll(dirty);
}

int64_t vmm_dirty_undo(vmm_dirty *log, void (*copy_back)(void *opaque, uint32_t region, uint64_t page),
                       void *opaque)
{
    struct vmm_vm *vm = log->vm;
    int64_t pages = 0;
    pthread_mutex_lock(&vm->dirty_lock);
    const int rc = fetch(vm);
    size_t word = 0;
    for (uint32_t region = 0; region < vm->n_regions && rc == 0; region++)
        for (size_t i = 0; i < vmm_region_words(&vm->regions[region]); i++, word++)
            if (log->bits[word])
                pages += undo_word(log, word, region, 64 * i, copy_back, opaque);
    pthread_mutex_unlock(&vm->dirty_lock);
    return rc < 0 ? rc : pages;
}
