/* SPDX-License-Identifier: Apache-2.0 */
/* Pages that this process has written, while dirty logs are open: one bit a page, merged by time/dirty.c. */
#include "core/core.h"

#define PAGE_SHIFT 12

size_t vmm_region_words(const struct vmm_region *r)
{
    return ((r->size >> PAGE_SHIFT) + 63) / 64;
}

size_t vmm_words_before(const struct vmm_vm *vm, uint32_t region)
{
    size_t words = 0;
    for (uint32_t i = 0; i < region; i++)
        words += vmm_region_words(&vm->regions[i]);
    return words;
}

static void touch_pages(struct vmm_vm *vm, uint32_t region, uint64_t first, uint64_t last)
{
    _Atomic uint64_t *words = vm->touched + vmm_words_before(vm, region);
    /* The write before the load: a bit that is set and about to be fetched does not cover bytes written after. */
    atomic_thread_fence(memory_order_seq_cst);
    for (uint64_t page = first; page <= last; page++) {
        const uint64_t bit = 1ull << page % 64;
        if (!(atomic_load_explicit(&words[page / 64], memory_order_relaxed) & bit))
            atomic_fetch_or_explicit(&words[page / 64], bit, memory_order_release);
    }
}

void vmm_vm_touch(struct vmm_vm *vm, const void *host, size_t n)
{
    for (uint32_t i = 0; i < vm->n_regions && n; i++) {
        const struct vmm_region *r = &vm->regions[i];
        const uint64_t at = (uint64_t)((const uint8_t *)host - r->host);
        if ((uintptr_t)host < (uintptr_t)r->host || at >= r->size)
            continue;
        const uint64_t end = n < r->size - at ? at + n : r->size;
        touch_pages(vm, i, at >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT);
        return;
    }
}

void vmm_vm_dirty(vmm_vm *vm, uint64_t gpa, uint64_t size)
{
    const void *host = vmm_vm_gpa(vm, gpa, size);
    if (host)
        vmm_vm_wrote(vm, host, size);
}
