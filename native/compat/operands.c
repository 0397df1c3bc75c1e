/* SPDX-License-Identifier: Apache-2.0 */
/* An instruction's ModRM operand: its address, checked against its segment, and its value. */
#include "compat.h"

static enum outcome segment_fault(struct completion *c, unsigned segment)
{
    return fault_error(c, segment == SEG_SS ? V_SS : V_GP, 0);
}

enum outcome operand_linear(struct completion *c, size_t size, enum access access, uint64_t *linear)
{
    const struct insn *i = &c->insn;
    const struct kvm_segment *const segments[] = {&c->sregs.es, &c->sregs.cs, &c->sregs.ss,
                                                  &c->sregs.ds, &c->sregs.fs, &c->sregs.gs};
    const struct kvm_segment *segment = segments[i->segment];
    uint64_t offset = (uint64_t)(int64_t)i->displacement;
    if (i->rip_relative)
        offset += c->regs.rip + i->length;
    if (i->base != REG_NONE)
        offset += gpr_read(c, i->base, 8);
    if (i->index != REG_NONE)
        offset += gpr_read(c, i->index, 8) << i->scale;
    if (i->address_size < 8)
        offset &= (1ull << (8 * i->address_size)) - 1;

    if (i->long_mode) {
        *linear = offset + (i->segment >= SEG_FS ? segment->base : 0);
        uint64_t last = *linear + size - 1;
        bool canonical = (int64_t)(*linear << 16) >> 16 == (int64_t)*linear &&
                         (int64_t)(last << 16) >> 16 == (int64_t)last;
        return canonical ? COMPLETE_DONE : segment_fault(c, i->segment);
    }
    bool code = segment->type & 8;
    if (segment->unusable || !segment->present)
        return segment_fault(c, i->segment);
    if (c->sregs.cr0 & CR0_PE && !(c->regs.rflags & FLAG_VM)) {
        bool refused = access == ACCESS_WRITE ? code || !(segment->type & 2) : code && !(segment->type & 2);
        if (refused)
            return segment_fault(c, i->segment);
    }
    if (!code && segment->type & 4)
        return COMPLETE_UNKNOWN; /* expand-down */
    if (offset > segment->limit || size - 1 > segment->limit - offset)
        return segment_fault(c, i->segment);
    *linear = (uint32_t)(segment->base + offset);
    return COMPLETE_DONE;
}

enum outcome operand_span(struct completion *c, size_t size, enum access access, struct span *span)
{
    uint64_t linear;
    enum outcome o = operand_linear(c, size, access, &linear);
    return o == COMPLETE_DONE ? linear_span(c, linear, size, access, span) : o;
}

enum outcome rm_read(struct completion *c, unsigned size, uint64_t *value)
{
    const struct insn *i = &c->insn;
    if (!i->memory) {
        bool high_byte = size == 1 && !i->rex && i->rm >= 4 && i->rm < 8; /* AH, CH, DH, BH */
        *value = high_byte ? gpr_read(c, i->rm - 4u, 2) >> 8 : gpr_read(c, i->rm, size);
        return COMPLETE_DONE;
    }
    struct span span;
    enum outcome o = operand_span(c, size, ACCESS_READ, &span);
    if (o != COMPLETE_DONE)
        return o;
    *value = 0;
    span_read(&span, 0, value, size);
    return COMPLETE_DONE;
}

enum outcome rm_write(struct completion *c, unsigned size, uint64_t value)
{
    if (!c->insn.memory) {
        gpr_write(c, c->insn.rm, size, value);
        return COMPLETE_DONE;
    }
    struct span span;
    enum outcome o = operand_span(c, size, ACCESS_WRITE, &span);
    if (o == COMPLETE_DONE)
        span_write(&span, 0, &value, size);
    return o;
}
