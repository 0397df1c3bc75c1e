/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor of a roll-back: the least a monitor can do to run a guest that writes PAGES pages, and take it back.
 *
 *   floor_rollback GUEST PAGES ROUNDS
 *
 * GUEST is flat 32-bit code, put at 1 MiB of 64 MiB, that ends by writing to port 0xf4. The machine is one of ours:
 * in-kernel interrupt controllers and PIT, dirty logging, supported CPUID. A roll-back is KVM_GET_DIRTY_LOG, a copy
 * of each page that was written, and every KVM_SET_ there is for a vCPU and the chips, of what was read once in the
 * beginning. Prints, of ROUNDS rounds, the median of a roll-back in ns, the least, and rounds a second.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { DEBUG_EXIT = 0xf4, CODE = 1 << 20, PAGE = 4096, CPUID_MAX = 256, MSRS_MAX = 512, CHIPS = 3 };

static const uint64_t MEMORY = 64ull << 20, TSS_ADDRESS = 0xfffbd000;

static int kvm, vm, vcpu;
static uint8_t *memory, *copy;
static uint64_t dirty[(64u << 20) / PAGE / 64];

static struct {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_xsave xsave;
    struct kvm_lapic_state lapic;
    struct kvm_vcpu_events events;
    struct kvm_debugregs debug;
    struct kvm_mp_state mp;
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[MSRS_MAX];
    } msrs;
    struct kvm_irqchip chips[CHIPS];
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
} saved;

static int must(int rc, const char *what)
{
    if (rc < 0)
        err(2, "%s", what);
    return rc;
}

#define DO(fd, request, argument) must(ioctl(fd, request, argument), #request)

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* ---- the machine ---- */

static void *map(uint64_t size, int flags, int fd)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED)
        err(2, "mmap");
    return at;
}

static struct kvm_run *create(void)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[CPUID_MAX];
    } cpuid = {.head.nent = CPUID_MAX};
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    vm = DO(kvm, KVM_CREATE_VM, 0);
    int fd = must(memfd_create("guest-memory", MFD_CLOEXEC), "memfd_create");
    must(ftruncate(fd, (off_t)MEMORY), "ftruncate");
    memory = map(MEMORY, MAP_SHARED, fd);
    copy = map(MEMORY, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    struct kvm_userspace_memory_region region = {
        .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    DO(vm, KVM_SET_USER_MEMORY_REGION, &region);
    DO(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS);
    DO(vm, KVM_CREATE_IRQCHIP, 0);
    DO(vm, KVM_CREATE_PIT2, &pit);
    vcpu = DO(vm, KVM_CREATE_VCPU, 0);
    DO(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    DO(vcpu, KVM_SET_CPUID2, &cpuid);
    return map((uint64_t)DO(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), MAP_SHARED, vcpu);
}

static void load(const char *path)
{
    int file = must(open(path, O_RDONLY | O_CLOEXEC), path);
    must((int)read(file, memory + CODE, PAGE), path);
    close(file);
    DO(vcpu, KVM_GET_SREGS, &saved.sregs);
    struct kvm_sregs *s = &saved.sregs;
    s->cs = s->ds = s->es = s->ss = (struct kvm_segment){
        .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    s->cs.selector = 0x10;
    s->cs.type = 0xb;
    s->cr0 = 0x33;
    DO(vcpu, KVM_SET_SREGS, s);
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    DO(vcpu, KVM_SET_REGS, &regs);
}

static void run(struct kvm_run *state)
{
    DO(vcpu, KVM_RUN, 0);
    if (state->exit_reason != KVM_EXIT_IO || state->io.port != DEBUG_EXIT)
        errx(2, "the guest ended with exit reason %u", state->exit_reason);
}

/* ---- its state ---- */

/* Those of KVM's list that it takes back. */
static void save_msrs(void)
{
    static struct {
        struct kvm_msr_list head;
        uint32_t indices[MSRS_MAX];
    } list = {.head.nmsrs = MSRS_MAX};
    DO(kvm, KVM_GET_MSR_INDEX_LIST, &list);
    uint32_t n = 0;
    for (uint32_t i = 0; i < list.head.nmsrs; i++) {
        struct {
            struct kvm_msrs head;
            struct kvm_msr_entry entry;
        } one = {.head.nmsrs = 1, .entry.index = list.indices[i]};
        if (ioctl(vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(vcpu, KVM_SET_MSRS, &one) == 1)
            saved.msrs.entries[n++] = one.entry;
    }
    saved.msrs.head.nmsrs = n;
}

static void save(void)
{
    DO(vcpu, KVM_GET_REGS, &saved.regs);
    DO(vcpu, KVM_GET_SREGS, &saved.sregs);
    DO(vcpu, KVM_GET_XCRS, &saved.xcrs);
    DO(vcpu, KVM_GET_XSAVE, &saved.xsave);
    DO(vcpu, KVM_GET_LAPIC, &saved.lapic);
    DO(vcpu, KVM_GET_VCPU_EVENTS, &saved.events);
    DO(vcpu, KVM_GET_DEBUGREGS, &saved.debug);
    DO(vcpu, KVM_GET_MP_STATE, &saved.mp);
    save_msrs();
    for (uint32_t i = 0; i < CHIPS; i++) {
        saved.chips[i].chip_id = i;
        DO(vm, KVM_GET_IRQCHIP, &saved.chips[i]);
    }
    DO(vm, KVM_GET_PIT2, &saved.pit);
    DO(vm, KVM_GET_CLOCK, &saved.clock);
    saved.clock.flags = 0;
    memcpy(copy, memory, MEMORY);
}

static unsigned copy_back(void)
{
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = dirty};
    unsigned pages = 0;
    DO(vm, KVM_GET_DIRTY_LOG, &log);
    for (size_t word = 0; word < sizeof(dirty) / sizeof(dirty[0]); word++)
        for (uint64_t bits = dirty[word]; bits; bits &= bits - 1, pages++) {
            const size_t at = (64 * word + (unsigned)__builtin_ctzll(bits)) * PAGE;
            memcpy(memory + at, copy + at, PAGE);
        }
    return pages;
}

static unsigned roll_back(void)
{
    const unsigned pages = copy_back();
    DO(vm, KVM_SET_CLOCK, &saved.clock);
    DO(vm, KVM_SET_PIT2, &saved.pit);
    for (uint32_t i = 0; i < CHIPS; i++)
        DO(vm, KVM_SET_IRQCHIP, &saved.chips[i]);
    DO(vcpu, KVM_SET_SREGS, &saved.sregs);
    DO(vcpu, KVM_SET_XCRS, &saved.xcrs);
    DO(vcpu, KVM_SET_XSAVE, &saved.xsave);
    if (DO(vcpu, KVM_SET_MSRS, &saved.msrs) != (int)saved.msrs.head.nmsrs)
        errx(2, "KVM_SET_MSRS");
    DO(vcpu, KVM_SET_LAPIC, &saved.lapic);
    DO(vcpu, KVM_SET_DEBUGREGS, &saved.debug);
    DO(vcpu, KVM_SET_MP_STATE, &saved.mp);
    DO(vcpu, KVM_SET_REGS, &saved.regs);
    DO(vcpu, KVM_SET_VCPU_EVENTS, &saved.events);
    return pages;
}

/* ---- rounds ---- */

static int by_size(const void *a, const void *b)
{
    const int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;
    return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        errx(2, "usage: floor_rollback GUEST PAGES ROUNDS");
    const unsigned pages = (unsigned)atoi(argv[2]), rounds = (unsigned)atoi(argv[3]);
    int64_t *took = calloc(rounds + 1, sizeof(*took));
    struct kvm_run *state = create();
    load(argv[1]);
    save();
    run(state);
    roll_back(); /* what the host wrote, and first touches */
    const int64_t start = now();
    for (unsigned i = 0; i < rounds; i++) {
        run(state);
        const int64_t before = now();
        if (roll_back() != pages)
            errx(2, "the guest did not write %u pages", pages);
        took[i] = now() - before;
    }
    const int64_t end = now();
    qsort(took, rounds, sizeof(*took), by_size);
    printf("%lld %lld %.1f\n", (long long)took[rounds / 2], (long long)took[0],
           rounds * 1e9 / (double)(end - start));
    return 0;
}
