/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A KVM that the test plays: the run loop, the bus and the dirty log without /dev/kvm, on every host, under every
 * sanitizer, and with each race placed where the test wants it. For one file of a program; CMakeLists.txt links it
 * so that ioctl and sched_yield come here first.
 *
 *     vmm_vm *vm = fake_machine(1);
 *     struct fake_vcpu *v = fake_vcpu(0);
 *     v->guest = reads_a_port;            a function called for each entry that is not refused
 *     ... vmm_vcpu_run(v->vcpu) on a thread ...
 *
 * What KVM_RUN does here is what Linux's Documentation/virt/kvm/api.rst promises of it, in this order: the result of
 * the last I/O exit is written into the registers (section 5, KVM_EXIT_IO and KVM_EXIT_MMIO); an access in several
 * fragments exits for the next of them; with immediate_exit set, or a signal pending, it fails with EINTR; the guest
 * runs. A guest here has one register, RAX.
 */
#ifndef VMM_TESTS_FAKE_KVM_H
#define VMM_TESTS_FAKE_KVM_H

#include "check.h"
#include "vmmcore.h"

#include <errno.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    FAKE_VCPUS = 4,
    FAKE_RUN_SIZE = 3 * 4096,
    FAKE_DATA_AT = 4096, /* of a port access, in the run structure: KVM_PIO_PAGE_OFFSET */
    FAKE_PORT = 0x10,
    FAKE_RAM = 1 << 20
};
#define FAKE_REGISTER 0x80000000ull /* an address for memory-mapped accesses, outside FAKE_RAM */

enum fake_exit { FAKE_EXITS, FAKE_COMPUTES };

struct fake_vcpu {
    vmm_vcpu *vcpu;
    struct kvm_run *run;
    int fd;
    unsigned index; /* of the order of creation */
    uint64_t rax;
    /* The guest, for one entry: FAKE_EXITS with the exit in *run, or FAKE_COMPUTES until a signal comes. */
    enum fake_exit (*guest)(struct fake_vcpu *v);
    /* In user space, on the way into KVM_RUN, before KVM looks at immediate_exit and at signals. May be NULL. */
    void (*entering)(struct fake_vcpu *v);
    void *opaque;
    unsigned fragments;         /* of the access in progress: so many more exits before it is complete */
    _Atomic unsigned computing; /* times that the guest began to compute */
    bool unfinished;            /* the last exit's result is not yet in rax */
};

static struct {
    struct fake_vcpu vcpus[FAKE_VCPUS];
    unsigned n;
} fake;

/* Times that some thread gave its processor away: how a test knows that one waits (bus.c). With fake_spins it keeps it:
 * a busy host would give it back much later than what is waited for takes. */
static _Atomic unsigned fake_yields;
static bool fake_spins;
int __real_sched_yield(void);
int __wrap_sched_yield(void);
int __wrap_sched_yield(void)
{
    atomic_fetch_add(&fake_yields, 1);
    if (!fake_spins)
        return __real_sched_yield();
    __builtin_ia32_pause();
    return 0;
}

/* PATIENCE_MS, or less for native/tests/mutations.py, where what must come does not. */
static inline int patience_ms(void)
{
    const char *text = getenv("VMM_TEST_PATIENCE_MS");
    return text ? atoi(text) : PATIENCE_MS;
}

static inline struct timespec fake_deadline(void)
{
    struct timespec at;
    clock_gettime(CLOCK_REALTIME,
                  &at); /* of sem_timedwait, which ThreadSanitizer knows; sem_clockwait it does not */
    at.tv_sec += patience_ms() / 1000 + 1;
    return at;
}

static inline void fake_wait(sem_t *semaphore)
{
    const struct timespec deadline = fake_deadline();
    while (sem_timedwait(semaphore, &deadline) != 0)
        CHECK_EQUAL(errno, EINTR); /* by a kick, on a vCPU's thread */
}

static inline pthread_t fake_start(void *(*function)(void *), void *opaque)
{
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, function, opaque), 0);
    return thread;
}

static inline void fake_join(pthread_t thread)
{
    const struct timespec deadline = fake_deadline();
    CHECK_EQUAL(pthread_timedjoin_np(thread, NULL, &deadline), 0);
}

static inline struct fake_vcpu *fake_vcpu(unsigned i)
{
    CHECK(i < fake.n);
    return &fake.vcpus[i];
}

/* ---- exits, for guests to return ---- */

static inline enum fake_exit fake_in(struct fake_vcpu *v, uint16_t port)
{
    v->run->exit_reason = KVM_EXIT_IO;
    v->run->io.direction = KVM_EXIT_IO_IN;
    v->run->io.size = 1;
    v->run->io.port = port;
    v->run->io.count = 1;
    v->run->io.data_offset = FAKE_DATA_AT;
    v->unfinished = true;
    return FAKE_EXITS;
}

static inline enum fake_exit fake_load(struct fake_vcpu *v, uint64_t address)
{
    v->run->exit_reason = KVM_EXIT_MMIO;
    v->run->mmio.phys_addr = address;
    v->run->mmio.len = 1;
    v->run->mmio.is_write = 0;
    v->unfinished = true;
    return FAKE_EXITS;
}

static inline enum fake_exit fake_halt(struct fake_vcpu *v)
{
    v->run->exit_reason = KVM_EXIT_HLT;
    return FAKE_EXITS;
}

/* ---- the ioctls ---- */

static void fake_complete(struct fake_vcpu *v)
{
    if (!v->unfinished)
        return;
    v->unfinished = false;
    if (v->run->exit_reason == KVM_EXIT_IO)
        v->rax = *((uint8_t *)v->run + FAKE_DATA_AT);
    else
        v->rax = v->run->mmio.data[0];
}

/* Signals are blocked from the look at immediate_exit to ppoll, which lets them in: KVM looks at both with interrupts
 * off (vcpu_enter_guest), so none falls between. */
static int fake_compute(struct fake_vcpu *v)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int ms = patience_ms();
    const struct timespec most = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    int rc = -1;
    atomic_fetch_add(&v->computing, 1);
    if (!__atomic_load_n(&v->run->immediate_exit, __ATOMIC_SEQ_CST))
        rc = ppoll(NULL, 0, &most, &before);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0) {
        fprintf(stderr, "a vCPU computes, and nothing asked it to leave the guest for %d ms\n", ms);
        exit(1);
    }
    errno = EINTR;
    return -1;
}

static int fake_run(struct fake_vcpu *v)
{
    if (v->entering)
        v->entering(v);
    fake_complete(v);
    if (v->fragments) {
        v->fragments--;
        fake_load(v, v->run->mmio.phys_addr + 1);
        return 0;
    }
    if (__atomic_load_n(&v->run->immediate_exit, __ATOMIC_SEQ_CST)) {
        errno = EINTR;
        return -1;
    }
    return v->guest(v) == FAKE_COMPUTES ? fake_compute(v) : 0;
}

static int fake_create_vcpu(void)
{
    CHECK(fake.n < FAKE_VCPUS);
    struct fake_vcpu *v = &fake.vcpus[fake.n++];
    *v = (struct fake_vcpu){.index = fake.n - 1,
                            .fd = memfd_create("fake-vcpu", MFD_CLOEXEC)}; /* the library closes it */
    CHECK(v->fd >= 0 && ftruncate(v->fd, FAKE_RUN_SIZE) == 0);
    v->run = mmap(NULL, FAKE_RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    CHECK(v->run != MAP_FAILED);
    return v->fd;
}

static int fake_vcpu_ioctl(struct fake_vcpu *v, unsigned long request, void *arg)
{
    switch (request) {
    case KVM_RUN:
        return fake_run(v);
    case KVM_GET_REGS:
        *(struct kvm_regs *)arg = (struct kvm_regs){.rax = v->rax};
        return 0;
    default:
        errno = EINVAL;
        return -1;
    }
}

int __real_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
    for (unsigned i = 0; i < fake.n; i++)
        if (fake.vcpus[i].fd == fd)
            return fake_vcpu_ioctl(&fake.vcpus[i], request, arg);
    switch (request) {
    case KVM_GET_API_VERSION:
        return KVM_API_VERSION;
    case KVM_GET_VCPU_MMAP_SIZE:
        return FAKE_RUN_SIZE;
    case KVM_CREATE_VM:
        return memfd_create("fake-machine", MFD_CLOEXEC);
    case KVM_CREATE_VCPU:
        return fake_create_vcpu();
    case KVM_GET_CLOCK:
        memset(arg, 0, sizeof(struct kvm_clock_data));
        return 0;
    case KVM_CHECK_EXTENSION:        /* none */
    case KVM_SET_USER_MEMORY_REGION: /* nothing runs in it */
    case KVM_GET_DIRTY_LOG:          /* and so nothing is written */
        return 0;
    default:
        return __real_ioctl(fd, request, arg);
    }
}

/* ---- a machine on it ---- */

/* FAKE_RAM bytes at 0 and so many vCPUs; fake_destroy ends it. One at a time. */
static inline vmm_vm *fake_machine(unsigned vcpus)
{
    vmm_vm *vm;
    void *host;
    int memfd;
    CHECK_EQUAL(vmm_vm_create("/dev/null", 0, &vm), 0);
    CHECK_EQUAL(vmm_vm_add_memory(vm, 0, FAKE_RAM, 0, &host, &memfd), 0);
    for (unsigned i = 0; i < vcpus; i++)
        CHECK_EQUAL(vmm_vcpu_create(vm, i, &fake.vcpus[i].vcpu), 0);
    return vm;
}

/* Run the vCPU on a thread of its own, for fake_join. */
static inline void *fake_run_loop(void *opaque)
{
    vmm_vcpu_run(opaque);
    return NULL;
}

static inline pthread_t fake_start_vcpu(unsigned i)
{
    return fake_start(fake_run_loop, fake_vcpu(i)->vcpu);
}

static inline void fake_destroy(vmm_vm *vm)
{
    vmm_vm_destroy(vm);
    while (fake.n)
        munmap(fake.vcpus[--fake.n].run, FAKE_RUN_SIZE);
}

#endif
