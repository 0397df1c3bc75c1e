/* SPDX-License-Identifier: Apache-2.0 */
/* Segment descriptors and gates, as the processor reads them (Intel SDM volume 3, 3.4.5, 5.8.3 and 6.11). */
#include "compat.h"

enum { ACCESSED = 1 };

static uint64_t descriptor_linear(const struct completion *c, uint16_t selector)
{
    return (selector & 4 ? c->sregs.ldt.base : c->sregs.gdt.base) + (selector & ~7u);
}

enum outcome descriptor_read(struct completion *c, uint16_t selector, uint64_t *descriptor, bool *found)
{
    const struct kvm_segment *ldt = &c->sregs.ldt;
    const bool local = selector & 4, absent = local && (ldt->unusable || !ldt->present);
    const uint32_t limit = local ? ldt->limit : c->sregs.gdt.limit;
    *descriptor = 0;
    *found = selector & ~3u && !absent && (uint32_t)(selector | 7) <= limit;
    return *found ? system_read(c, descriptor_linear(c, selector), descriptor, sizeof *descriptor)
                  : COMPLETE_DONE;
}

struct kvm_segment descriptor_segment(uint16_t selector, uint64_t descriptor)
{
    const uint32_t limit = (descriptor & 0xffff) | (descriptor >> 32 & 0xf0000);
    const bool pages = descriptor >> 55 & 1;
    return (struct kvm_segment){
        .base = (descriptor >> 16 & 0xffffff) | (descriptor >> 32 & 0xff000000u),
        .limit = pages ? limit << 12 | 0xfff : limit,
        .selector = selector,
        .type = descriptor >> 40 & 15,
        .s = descriptor >> 44 & 1,
        .dpl = descriptor >> 45 & 3,
        .present = descriptor >> 47 & 1,
        .avl = descriptor >> 52 & 1,
        .l = descriptor >> 53 & 1,
        .db = descriptor >> 54 & 1,
        .g = pages,
    };
}

enum outcome descriptor_mark_accessed(struct completion *c, struct kvm_segment *segment)
{
    if (segment->type & ACCESSED)
        return COMPLETE_DONE;
    uint64_t gpa;
    const enum outcome o =
        linear_translate(c, descriptor_linear(c, segment->selector) + 5, ACCESS_WRITE, &gpa);
    if (o != COMPLETE_DONE)
        return o;
    uint8_t *at = c->source->memory(c->source->opaque, gpa, 1);
    if (!at)
        return COMPLETE_UNKNOWN;
    __atomic_fetch_or(at, ACCESSED, __ATOMIC_RELAXED);
    completion_wrote(c->source, at, 1);
    segment->type |= ACCESSED;
    return COMPLETE_DONE;
}

enum outcome gate_read(struct completion *c, uint8_t vector, struct gate *gate)
{
    const unsigned size = c->sregs.efer & EFER_LMA ? 16 : 8;
    uint64_t raw[2] = {0};
    *gate = (struct gate){0};
    if (c->sregs.idt.limit < (vector + 1u) * size - 1)
        return COMPLETE_DONE;
    const enum outcome o = system_read(c, c->sregs.idt.base + (uint64_t)vector * size, raw, size);
    if (o != COMPLETE_DONE)
        return o;
    *gate = (struct gate){
        .entry = (raw[0] & 0xffff) | (raw[0] >> 32 & 0xffff0000u) | raw[1] << 32,
        .selector = raw[0] >> 16 & 0xffff,
        .type = raw[0] >> 40 & 31, /* bit 4, S, is 0 in every gate */
        .dpl = raw[0] >> 45 & 3,
        .present = raw[0] >> 47 & 1,
    };
    const uint32_t known = size == 16 ? 1u << GATE_INTERRUPT | 1u << GATE_TRAP
                                      : 1u << GATE_TASK | 1u << GATE_INTERRUPT_16 | 1u << GATE_TRAP_16 |
                                            1u << GATE_INTERRUPT | 1u << GATE_TRAP;
    gate->valid = known >> gate->type & 1;
    return COMPLETE_DONE;
}
