/* SPDX-License-Identifier: Apache-2.0 */
/* What KVM gives with its internal errors, as it comes out of a vCPU: no KVM is needed. */
#include "check.h"

#include "core/core.h"

#include <string.h>

static struct kvm_run run;
static struct vmm_vcpu vcpu = {.run = &run};

static void internal_error(uint32_t suberror, uint32_t ndata)
{
    memset(&run, 0, sizeof(run));
    run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
    run.internal.suberror = suberror;
    run.internal.ndata = ndata;
    for (uint64_t i = 0; i < 16; i++)
        run.internal.data[i] = 0x100 + i;
}

static void the_numbers_come_out_in_their_order(void)
{
    uint64_t data[16];
    internal_error(KVM_INTERNAL_ERROR_DELIVERY_EV, 4);
    CHECK_EQUAL(vmm_vcpu_internal_error(&vcpu, data), 4);
    for (uint64_t i = 0; i < 16; i++)
        CHECK_EQUAL(data[i], i < 4 ? 0x100 + i : 0);
}

static void more_than_there_is_room_for_is_cut(void)
{
    uint64_t data[17] = {[16] = 7};
    internal_error(KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, UINT32_MAX);
    CHECK_EQUAL(vmm_vcpu_internal_error(&vcpu, data), 16);
    CHECK_EQUAL(data[15], 0x10f);
    CHECK_EQUAL(data[16], 7);
}

static void failed_emulation_and_other_exits_have_none(void)
{
    uint64_t data[16];
    uint8_t bytes[16];
    internal_error(KVM_INTERNAL_ERROR_EMULATION, 3);
    CHECK_EQUAL(vmm_vcpu_internal_error(&vcpu, data), 0);
    internal_error(KVM_INTERNAL_ERROR_SIMUL_EX, 3);
    CHECK_EQUAL(vmm_vcpu_failed_instruction(&vcpu, bytes), 0);
    run.exit_reason = KVM_EXIT_SHUTDOWN;
    CHECK_EQUAL(vmm_vcpu_internal_error(&vcpu, data), 0);
}

int main(void)
{
    the_numbers_come_out_in_their_order();
    more_than_there_is_room_for_is_cut();
    failed_emulation_and_other_exits_have_none();
    puts("internal error: ok");
    return 0;
}
