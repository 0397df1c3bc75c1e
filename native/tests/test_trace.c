/* SPDX-License-Identifier: Apache-2.0 */
/* The trace's rings: nothing torn, nothing twice, and what was lost is counted. */
#include "machine.h"

#include "core/trace.h"

#include <string.h>

#define EVENTS 400000

static void test_a_reader_that_keeps_up_sees_every_event_once(void)
{
    vmm_vm *vm = machine_create();
    CHECK_EQUAL(vmm_trace_start(vm, 64), 0);
    uint64_t position = 0, lost = 0;
    vmm_trace_event events[64];
    CHECK_EQUAL(vmm_trace_read(vm, UINT32_MAX, &position, events, 64, &lost), 0);
    for (uint32_t i = 0; i < 1000; i += 50) {
        for (uint32_t k = 0; k < 50; k++)
            vmm_trace_io(vm, VMM_TRACE_DOORBELL, 7, i + k, 0, 0);
        CHECK_EQUAL(vmm_trace_read(vm, UINT32_MAX, &position, events, 20, &lost), 20);
        CHECK_EQUAL(vmm_trace_read(vm, UINT32_MAX, &position, events + 20, 44, &lost), 30);
        for (uint32_t k = 0; k < 50; k++)
            CHECK_EQUAL(events[k].address, i + k);
    }
    CHECK_EQUAL(lost, 0);
    vmm_trace_stop(vm);
    vmm_trace_io(vm, VMM_TRACE_DOORBELL, 7, 0, 0, 0);
    CHECK_EQUAL(vmm_trace_read(vm, UINT32_MAX, &position, events, 64, &lost), 0);
    vmm_vm_destroy(vm);
}

static void test_a_reader_that_sleeps_is_told_how_many_it_lost(void)
{
    vmm_vm *vm = machine_create();
    CHECK_EQUAL(vmm_trace_start(vm, 64), 0);
    for (uint32_t i = 0; i < 1000; i++)
        vmm_trace_io(vm, VMM_TRACE_DOORBELL, 7, i, 0, 0);
    uint64_t position = 0, lost = 0;
    vmm_trace_event events[100];
    CHECK_EQUAL(vmm_trace_read(vm, UINT32_MAX, &position, events, 100, &lost), 64);
    CHECK_EQUAL(lost, 936);
    CHECK_EQUAL(events[0].address, 936);
    CHECK_EQUAL(position, 1000);
    vmm_vm_destroy(vm);
}

static void *write_many(void *opaque)
{
    /* Every field says which event it is: a torn one shows. */
    for (uint32_t i = 0; i < EVENTS; i++)
        vmm_trace_io(opaque, VMM_TRACE_REQUESTS, i, i, i, 0);
    return NULL;
}

static void test_a_writer_that_overtakes_its_reader_tears_nothing(void)
{
    vmm_vm *vm = machine_create();
    CHECK_EQUAL(vmm_trace_start(vm, 256), 0);
    pthread_t writer;
    CHECK(pthread_create(&writer, NULL, write_many, vm) == 0);
    uint64_t position = 0, lost = 0, seen = 0, next = 0;
    vmm_trace_event events[200];
    while (position < EVENTS) {
        uint32_t n = vmm_trace_read(vm, UINT32_MAX, &position, events, 200, &lost);
        for (uint32_t i = 0; i < n; i++) {
            CHECK(events[i].address >= next);
            CHECK_EQUAL(events[i].value, events[i].address);
            CHECK_EQUAL(events[i].tag, events[i].address);
            next = events[i].address + 1;
        }
        seen += n;
    }
    CHECK_EQUAL(seen + lost, EVENTS);
    pthread_join(writer, NULL);
    vmm_vm_destroy(vm);
}

static void test_sizes_that_cannot_be_are_refused(void)
{
    vmm_vm *vm = machine_create();
    const uint32_t bad[] = {0, 1, 63, 65, 3000, 1u << 25};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK(vmm_trace_start(vm, bad[i]) < 0);
    vmm_vm_destroy(vm);
}

int main(void)
{
    test_a_reader_that_keeps_up_sees_every_event_once();
    test_a_reader_that_sleeps_is_told_how_many_it_lost();
    test_a_writer_that_overtakes_its_reader_tears_nothing();
    test_sizes_that_cannot_be_are_refused();
    return 0;
}
