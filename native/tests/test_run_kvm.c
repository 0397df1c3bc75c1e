/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The promises of KVM_RUN that fake_kvm.h plays, by KVM itself: an entry with immediate_exit set writes the last I/O
 * exit's result into the registers and runs no instruction; a kick fetches a guest out that never exits.
 */
#include "check.h"
#include "vmmcore.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { SKIPPED = 77, RAM = 1 << 20, CODE = 0x1000, PORT = 0x10, PAUSES = 200, READS = 20 };

static vmm_vm *vm;
static vmm_vcpu *vcpu;
static _Atomic unsigned last; /* what the port read as */

static uint64_t count_read(void *opaque, uint64_t offset, uint32_t size)
{
    (void)opaque;
    (void)offset;
    (void)size;
    return (uint8_t)(atomic_fetch_add(&last, 1) + 1);
}

static void ignore_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    (void)opaque;
    (void)offset;
    (void)size;
    (void)value;
}

static void *run(void *opaque)
{
    (void)opaque;
    vmm_vcpu_run(vcpu);
    return NULL;
}

/* One vCPU in real mode at `code`. */
static pthread_t start(const char *code, size_t size)
{
    static const vmm_device_ops ops = {count_read, ignore_write};
    void *host;
    int memfd;
    vmm_sregs sregs;
    const vmm_regs regs = {.rip = CODE, .rflags = 2};
    pthread_t thread;
    CHECK_EQUAL(vmm_vm_create("/dev/kvm", 0, &vm), 0);
    CHECK_EQUAL(vmm_vm_add_memory(vm, 0, RAM, 0, &host, &memfd), 0);
    CHECK_EQUAL(vmm_bus_attach(vm, VMM_PIO, PORT, 1, &ops, NULL, 0), 0);
    memcpy((char *)host + CODE, code, size);
    CHECK_EQUAL(vmm_vcpu_create(vm, 0, &vcpu), 0);
    CHECK_EQUAL(vmm_vcpu_get_sregs(vcpu, &sregs), 0);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    CHECK_EQUAL(vmm_vcpu_set_sregs(vcpu, &sregs), 0);
    CHECK_EQUAL(vmm_vcpu_set_regs(vcpu, &regs), 0);
    CHECK_EQUAL(pthread_create(&thread, NULL, run, NULL), 0);
    return thread;
}

static void pause_all(void)
{
    CHECK_EQUAL(vmm_vm_request_pause(vm), 0);
    CHECK_EQUAL(vmm_vm_await_pause(vm, PATIENCE_MS), 1);
}

static void stop_and_destroy(pthread_t thread)
{
    vmm_vm_stop(vm, VMM_STOP_HOST, 0);
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    vmm_vm_destroy(vm);
}

static void a_pause_finds_the_result_of_the_last_read_in_its_register(void)
{
    static const char code[] = "\xe4\x10\xeb\xfc"; /* 1: in al, 0x10; jmp 1b */
    vmm_regs regs;
    const pthread_t thread = start(code, sizeof(code));
    for (int i = 0; i < PAUSES; i++) {
        const unsigned before = last;
        for (int waited = 0; atomic_load(&last) - before < READS; waited++) {
            CHECK(waited < PATIENCE_MS);
            poll(NULL, 0, 1);
        }
        pause_all();
        CHECK_EQUAL(vmm_vcpu_get_regs(vcpu, &regs), 0);
        CHECK_EQUAL(regs.rax & 0xff, last & 0xff);
        CHECK_EQUAL(vmm_vm_resume(vm), 0);
    }
    stop_and_destroy(thread);
}

static void a_guest_that_never_exits_is_fetched_out(void)
{
    static const char code[] = "\xeb\xfe"; /* 1: jmp 1b */
    vmm_regs regs;
    const pthread_t thread = start(code, sizeof(code));
    for (int i = 0; i < PAUSES; i++) {
        pause_all();
        CHECK_EQUAL(vmm_vcpu_get_regs(vcpu, &regs), 0);
        CHECK_EQUAL(regs.rip, CODE);
        CHECK_EQUAL(vmm_vm_resume(vm), 0);
    }
    stop_and_destroy(thread);
}

int main(void)
{
    if (access("/dev/kvm", R_OK | W_OK) < 0) {
        printf("/dev/kvm is missing or may not be opened\n");
        return SKIPPED;
    }
    a_pause_finds_the_result_of_the_last_read_in_its_register();
    a_guest_that_never_exits_is_fetched_out();
    return 0;
}
