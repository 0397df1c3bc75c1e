/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor: the least a monitor can do for a PVH guest that prints on a UART and leaves by isa-debug-exit.
 * What pyvmm, or any other monitor, takes beyond this is its own doing.
 *
 *   floor GUEST [COMMAND-LINE]
 *   floor --chips-first GUEST    creates them before memory, as monitors usually do
 *
 * The same calls to KVM as a machine of ours (in-kernel interrupt controllers and PIT, guest memory on a
 * memfd, supported CPUID) and then a bare loop around KVM_RUN: a switch, a few bytes copied, back in.
 * Registers nobody models read as zero. Standard output is the guest's serial line; at the end one line on
 * standard error:
 *
 *   first-exit NS    from just before open("/dev/kvm") to the return from the first KVM_RUN
 *
 * Exits with the guest's verdict, or 2 and the call that failed.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { UART_DATA = 0x3f8, UART_LSR = 0x3fd, DEBUG_EXIT = 0xf4 };
enum { LSR_EMPTY = 0x60 };
enum { START_INFO = 0x6000, COMMAND_LINE = 0x7000, COMMAND_LINE_ROOM = 0x1000 };
enum { CPUID_MAX = 256, PHYS32_ENTRY = 18 };

static const uint64_t MEMORY = 256ull << 20;
static const uint64_t TSS_ADDRESS =
    0xfffbd000; /* below the BIOS area, as KVM_SET_TSS_ADDR wants it on Intel */

static uint8_t *memory;

static int must(int rc, const char *what)
{
    if (rc < 0)
        err(2, "%s", what);
    return rc;
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* ---- the machine ---- */

static void add_memory(int vm)
{
    int fd = must(memfd_create("guest-memory", MFD_CLOEXEC), "memfd_create");
    must(ftruncate(fd, (off_t)MEMORY), "ftruncate");
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (memory == MAP_FAILED)
        err(2, "mmap of guest memory");
    struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

/* After memory: KVM_SET_USER_MEMORY_REGION waits for the SRCU grace period that these leave pending, 4 to 7
 * ms. */
static void create_chips(int vm)
{
    must(ioctl(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS), "KVM_SET_TSS_ADDR");
    must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    must(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
}

static struct kvm_run *add_vcpu(int kvm, int vm, int *vcpu)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[CPUID_MAX];
    } cpuid = {.head.nent = CPUID_MAX};

    size_t size = (size_t)must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    *vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *vcpu, 0);
    if (run == MAP_FAILED)
        err(2, "mmap of kvm_run");
    must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    must(ioctl(*vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    return run;
}

/* ---- the image: ELF64 segments at their physical addresses, entered at the PVH note ---- */

static void read_at(int file, void *to, size_t size, uint64_t offset)
{
    if (pread(file, to, size, (off_t)offset) != (ssize_t)size)
        errx(2, "the guest's image is truncated");
}

static uint32_t pvh_entry(int file, const Elf64_Phdr *note)
{
    struct {
        Elf64_Nhdr head;
        char name[4];
        uint32_t entry;
    } pvh;
    if (note->p_filesz < sizeof(pvh))
        return 0;
    read_at(file, &pvh, sizeof(pvh), note->p_offset);
    return pvh.head.n_type == PHYS32_ENTRY && !memcmp(pvh.name, "Xen", 4) ? pvh.entry : 0;
}

/* Answers the PVH entry point. */
static uint32_t load(const char *path)
{
    int file = must(open(path, O_RDONLY | O_CLOEXEC), path);
    Elf64_Ehdr head;
    read_at(file, &head, sizeof(head), 0);
    if (memcmp(head.e_ident, ELFMAG, SELFMAG) || head.e_ident[EI_CLASS] != ELFCLASS64)
        errx(2, "%s: not an ELF64 file", path);
    uint32_t entry = 0;
    for (unsigned i = 0; i < head.e_phnum; i++) {
        Elf64_Phdr segment;
        read_at(file, &segment, sizeof(segment), head.e_phoff + i * sizeof(segment));
        if (segment.p_type == PT_NOTE && !entry)
            entry = pvh_entry(file, &segment);
        if (segment.p_type != PT_LOAD)
            continue;
        if (segment.p_paddr > MEMORY || segment.p_filesz > MEMORY - segment.p_paddr)
            errx(2, "%s: a segment is outside memory", path);
        read_at(file, memory + segment.p_paddr, segment.p_filesz, segment.p_offset);
    }
    close(file);
    if (!entry)
        errx(2, "%s: no PVH note", path);
    return entry;
}

/* Xen public headers, arch-x86/hvm/start_info.h: only what the guests look at. */
static void write_start_info(const char *command_line)
{
    struct {
        uint32_t magic, version, flags, modules;
        uint64_t module_list, command_line, rsdp;
    } info = {.magic = 0x336ec578, .command_line = COMMAND_LINE};
    memcpy(memory + START_INFO, &info, sizeof(info));
    if (strlen(command_line) >= COMMAND_LINE_ROOM)
        errx(2, "the command line is too long");
    strcpy((char *)memory + COMMAND_LINE, command_line);
}

/* 32-bit protected mode, flat, paging off, EBX = start info (Xen docs/misc/pvh.pandoc). */
static void set_registers(int vcpu, uint32_t entry)
{
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.cs = data;
    sregs.cs.selector = 0x10;
    sregs.cs.type = 0xb;
    sregs.tr = (struct kvm_segment){.limit = 0x67, .selector = 0x20, .type = 0xb, .present = 1};
    sregs.cr0 = 0x33; /* PE, MP, ET, NE */
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = entry, .rbx = START_INFO, .rflags = 2};
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

/* ---- the loop ---- */

/* One access to a port. True: the guest is done. */
static bool port(struct kvm_run *run)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    if (run->io.direction == KVM_EXIT_IO_IN) {
        memset(data, run->io.port == UART_LSR ? LSR_EMPTY : 0, run->io.size);
    } else if (run->io.port == UART_DATA) {
        if (write(STDOUT_FILENO, data, 1) != 1)
            err(2, "standard output");
    }
    return run->io.port == DEBUG_EXIT;
}

/* Until the guest is done: answers its verdict. */
static int loop(int vcpu, struct kvm_run *run)
{
    for (;;) {
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (port(run))
                return *((uint8_t *)run + run->io.data_offset) << 1 | 1;
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0, run->mmio.len);
            break;
        default:
            errx(2, "the guest ended with exit reason %u", run->exit_reason);
        }
        must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    }
}

int main(int argc, char **argv)
{
    bool chips_first = argc > 1 && !strcmp(argv[1], "--chips-first");
    argc -= chips_first;
    argv += chips_first;
    if (argc < 2 || argc > 3)
        errx(2, "usage: floor [--chips-first] GUEST [COMMAND-LINE]");
    int64_t start = now();
    int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm"), vcpu;
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    if (chips_first)
        create_chips(vm);
    add_memory(vm);
    if (!chips_first)
        create_chips(vm);
    struct kvm_run *run = add_vcpu(kvm, vm, &vcpu);
    uint32_t entry = load(argv[1]);
    write_start_info(argc == 3 ? argv[2] : "");
    set_registers(vcpu, entry);
    must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    int64_t end = now();
    int verdict = loop(vcpu, run);
    int khz = must(ioctl(vcpu, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ");
    fprintf(stderr, "first-exit %lld\ntsc-khz %d\n", (long long)(end - start), khz);
    return verdict;
}
