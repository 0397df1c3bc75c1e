/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory by linear address, as the guest's own page tables have it (Intel SDM volume 3, chapter 4). */
#include "compat.h"

#include <string.h>

enum pte { PTE_P = 1, PTE_W = 2, PTE_U = 4, PTE_A = 0x20, PTE_D = 0x40, PTE_PS = 0x80 };
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS 0x000ffffffffff000ull

enum pf_error { PF_PRESENT = 1, PF_RESERVED = 8 };

enum { MAX_LEVELS = 4 };

/* How a paging mode divides a linear address. */
struct paging {
    uint8_t levels, index_bits, entry_size;
};

static enum outcome page_fault(struct completion *c, uint64_t linear, unsigned access, uint32_t error)
{
    bool fetch_reported = (c->sregs.efer & EFER_NXE && c->sregs.cr4 & CR4_PAE) || c->sregs.cr4 & CR4_SMEP;
    error |= access & (ACCESS_WRITE | ACCESS_USER);
    if (access & ACCESS_FETCH && fetch_reported)
        error |= ACCESS_FETCH;
    c->event.address = linear;
    return fault_error(c, V_PF, error);
}

/* SDM volume 3, 4.6.1: may this access use a translation whose entries all together say so? */
static bool permitted(const struct completion *c, unsigned access, bool user, bool writable, bool nx)
{
    if (access & ACCESS_FETCH) {
        if (nx)
            return false;
        return access & ACCESS_USER ? user : !(user && c->sregs.cr4 & CR4_SMEP);
    }
    if (access & ACCESS_USER)
        return user && (writable || !(access & ACCESS_WRITE));
    if (user && c->sregs.cr4 & CR4_SMAP && !(c->regs.rflags & FLAG_AC))
        return false;
    return writable || !(access & ACCESS_WRITE) || !(c->sregs.cr0 & CR0_WP);
}

static uint64_t entry_load(const void *entry, unsigned size)
{
    return size == 8 ? __atomic_load_n((const uint64_t *)entry, __ATOMIC_RELAXED)
                     : __atomic_load_n((const uint32_t *)entry, __ATOMIC_RELAXED);
}

/* Accessed and dirty flags share the entry's first byte with nothing the guest's other vCPUs may lose by an
 * OR. */
static void entry_mark(const struct completion_source *source, void *entry, unsigned size, uint32_t flags)
{
    uint64_t before = size == 8 ? __atomic_fetch_or((uint64_t *)entry, flags, __ATOMIC_RELAXED)
                                : __atomic_fetch_or((uint32_t *)entry, flags, __ATOMIC_RELAXED);
    if (flags & ~before)
        completion_wrote(source, entry, size);
}

enum outcome linear_translate(struct completion *c, uint64_t linear, unsigned access, uint64_t *gpa)
{
    const struct kvm_sregs *s = &c->sregs;
    if (!(s->efer & EFER_LMA))
        linear = (uint32_t)linear;
    if (!(s->cr0 & CR0_PG)) {
        *gpa = linear;
        return COMPLETE_DONE;
    }
    bool long_paging = s->efer & EFER_LMA, pae = s->cr4 & CR4_PAE;
    if (long_paging && !canonical(linear))
        return fault_error(c, V_GP, 0);
    /* Not modelled: five levels, protection keys, shadow stacks. */
    if (s->cr4 & (CR4_PKE | CR4_PKS | CR4_CET) || (long_paging && s->cr4 & CR4_LA57))
        return COMPLETE_UNKNOWN;
    const struct paging mode = long_paging ? (struct paging){4, 9, 8}
                               : pae       ? (struct paging){3, 9, 8}
                                           : (struct paging){2, 10, 4};
    uint64_t table = long_paging ? s->cr3 & PTE_ADDRESS : pae ? s->cr3 & 0xffffffe0u : s->cr3 & 0xfffff000u;
    bool user = true, writable = true, nx = false;
    void *entries[MAX_LEVELS];
    unsigned n = 0, shift = 12 + mode.index_bits * (mode.levels - 1u);
    uint64_t entry = 0;

    for (unsigned level = mode.levels; level > 0; level--, shift -= mode.index_bits) {
        uint64_t index = linear >> shift & ((1u << mode.index_bits) - 1);
        bool pdpte = pae && !long_paging && level == 3; /* has neither rights nor accessed flag */
        if (pdpte)
            index &= 3;
        void *at = c->source->memory(c->source->opaque, table + index * mode.entry_size, mode.entry_size);
        if (!at)
            return COMPLETE_UNKNOWN;
        entry = entry_load(at, mode.entry_size);
        if (!(entry & PTE_P))
            return page_fault(c, linear, access, 0);
        if (mode.entry_size == 8 && entry & PTE_NX && !(s->efer & EFER_NXE))
            return page_fault(c, linear, access, PF_PRESENT | PF_RESERVED);
        if (!pdpte) {
            user &= !!(entry & PTE_U);
            writable &= !!(entry & PTE_W);
            nx |= mode.entry_size == 8 && entry & PTE_NX;
            entries[n++] = at;
        }
        table = mode.entry_size == 8 ? entry & PTE_ADDRESS : entry & 0xfffff000u;
        if (level == 1 || pdpte || !(entry & PTE_PS))
            continue;
        if (level == 4)
            return page_fault(c, linear, access, PF_PRESENT | PF_RESERVED);
        if (mode.entry_size == 8 || s->cr4 & CR4_PSE)
            break;
    }
    if (shift < 12)
        shift = 12; /* the walk went all the way */
    if (!permitted(c, access, user, writable, nx))
        return page_fault(c, linear, access, PF_PRESENT);
    for (unsigned i = 0; i < n; i++)
        entry_mark(c->source, entries[i], mode.entry_size,
                   i + 1 == n && access & ACCESS_WRITE ? PTE_A | PTE_D : PTE_A);

    uint64_t offset = (1ull << shift) - 1;
    if (mode.entry_size == 4 && shift == 22) /* PSE-36: bits 13..20 are address bits 32..39 */
        table = (entry & 0xffc00000u) | (entry >> 13 & 0xff) << 32;
    *gpa = (table & ~offset) | (linear & offset);
    return COMPLETE_DONE;
}

enum outcome linear_span(struct completion *c, uint64_t linear, size_t size, enum access access,
                         struct span *span)
{
    unsigned how = access | (completion_cpl(c) == 3 ? ACCESS_USER : 0);
    size_t first = 4096 - (linear & 4095);
    *span = (struct span){.source = c->source,
                          .size = {size < first ? size : first, size < first ? 0 : size - first}};
    for (unsigned i = 0; i < 2 && span->size[i]; i++) {
        uint64_t gpa = 0;
        enum outcome o = linear_translate(c, i ? linear + first : linear, how, &gpa);
        if (o != COMPLETE_DONE)
            return o;
        span->part[i] = c->source->memory(c->source->opaque, gpa, span->size[i]);
        if (!span->part[i])
            return COMPLETE_UNKNOWN; /* a device's memory, or nothing */
    }
    return COMPLETE_DONE;
}

/* How much of [offset, offset+n) lies in the first part. */
static size_t in_first(const struct span *span, size_t offset, size_t n)
{
    size_t left = offset < span->size[0] ? span->size[0] - offset : 0;
    return n < left ? n : left;
}

void span_read(const struct span *span, size_t offset, void *to, size_t n)
{
    size_t first = in_first(span, offset, n);
    if (first)
        memcpy(to, span->part[0] + offset, first);
    if (n > first)
        memcpy((uint8_t *)to + first, span->part[1] + offset + first - span->size[0], n - first);
}

static void store(const struct span *span, void *at, const void *from, size_t n)
{
    memcpy(at, from, n);
    completion_wrote(span->source, at, n);
}

void span_write(const struct span *span, size_t offset, const void *from, size_t n)
{
    size_t first = in_first(span, offset, n);
    if (first)
        store(span, span->part[0] + offset, from, first);
    if (n > first)
        store(span, span->part[1] + offset + first - span->size[0], (const uint8_t *)from + first, n - first);
}

enum outcome system_read(struct completion *c, uint64_t linear, void *to, size_t n)
{
    for (size_t done = 0; done < n;) {
        const size_t in_page = 4096 - ((linear + done) & 4095),
                     part = in_page < n - done ? in_page : n - done;
        uint64_t gpa;
        const enum outcome o = linear_translate(c, linear + done, ACCESS_READ, &gpa);
        if (o != COMPLETE_DONE)
            return o;
        const void *at = c->source->memory(c->source->opaque, gpa, part);
        if (!at)
            return COMPLETE_UNKNOWN;
        memcpy((uint8_t *)to + done, at, part);
        done += part;
    }
    return COMPLETE_DONE;
}
