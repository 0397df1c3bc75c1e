/* SPDX-License-Identifier: Apache-2.0 */
#include "cpu.h"

extern uint64_t gdt[], page_map[], page_directories[];
extern const char trap_stubs[], user_done[], user_exit[], gdt_pointer[];
extern char tss[];

enum {
    GATE_INTERRUPT = 0x8e,
    GATE_DPL3 = 0x60,
    STUB_SIZE = 16,
    TSS_SIZE = 104,
    TSS_PORT_MAP = 102,            /* where the TSS says where its I/O permission map is */
    PORT_MAP_SIZE = 65536 / 8 + 1, /* a byte of ones ends it, Intel SDM 1, 19.5.2 */
    TSS_AVAILABLE = 0x89
};

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};
_Static_assert(sizeof(struct gate) == 16, "Intel SDM 3A, 6.14.1");

static struct gate idt[VECTORS];
trap_handler *trap_handlers[VECTORS];
volatile struct caught_trap caught;
volatile uint64_t trap_resume, trap_stack;

void idt_load(void)
{
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

void user_ports(bool allowed)
{
    /* Beyond the limit there is no map, and without one no port. */
    *(volatile uint16_t *)(tss + TSS_PORT_MAP) = allowed ? TSS_SIZE : 0xffff;
}

uint64_t enter_user_with_ports(uint64_t (*function)(uint64_t), uint64_t argument)
{
    user_ports(true);
    return enter_user(function, argument, RFLAGS_FIXED | RFLAGS_IOPL3);
}

void cpu_init(void)
{
    boot_info(); /* while the loader's memory is still what it was */

    for (unsigned vector = 0; vector < VECTORS; vector++) {
        uint32_t stub = (uint32_t)(uintptr_t)trap_stubs + vector * STUB_SIZE;
        uint8_t type = vector == VECTOR_USER ? GATE_INTERRUPT | GATE_DPL3 : GATE_INTERRUPT;
        idt[vector] = (struct gate){(uint16_t)stub, SELECTOR_CODE, 0, type, (uint16_t)(stub >> 16), 0, 0};
    }
    uint64_t base = (uint64_t)tss;
    tss[TSS_SIZE + PORT_MAP_SIZE - 1] = (char)0xff;
    user_ports(false);
    gdt[SELECTOR_TSS / 8] = (TSS_SIZE + PORT_MAP_SIZE - 1) | (base & 0xffffff) << 16 |
                            (uint64_t)TSS_AVAILABLE << 40 | (base >> 24) << 56;

    write_cr3((uint64_t)page_map);
    __asm__ volatile("lgdt (%0)\n\t"
                     "pushq %1\n\t"
                     "lea 1f(%%rip), %%rax\n\t"
                     "push %%rax\n\t"
                     "lretq\n"
                     "1: mov %2, %%ds\n\t"
                     "mov %2, %%es\n\t"
                     "mov %2, %%ss\n\t"
                     "ltr %w3" ::"r"(gdt_pointer),
                     "i"(SELECTOR_CODE), "r"(SELECTOR_DATA), "r"(SELECTOR_TSS)
                     : "rax", "memory");
    idt_load();
}

static void remember(const struct trap_frame *frame)
{
    caught.vector = (int)frame->vector;
    caught.error = frame->error;
    caught.rip = frame->rip;
    caught.cr2 = frame->vector == 14 ? read_cr2() : 0;
}

static void leave_user(struct trap_frame *frame)
{
    frame->cs = SELECTOR_CODE;
    frame->ss = SELECTOR_DATA;
    frame->rip = (uint64_t)user_exit;
    frame->rflags = RFLAGS_FIXED;
}

void trap_user_exit(struct trap_frame *frame)
{
    remember(frame);
    leave_user(frame);
}

void trap_dispatch(struct trap_frame *frame);
void trap_dispatch(struct trap_frame *frame)
{
    if (frame->vector == VECTOR_UD && frame->rip == (uint64_t)user_done) {
        leave_user(frame);
    } else if (trap_handlers[frame->vector]) {
        trap_handlers[frame->vector](frame);
    } else if (trap_resume && frame->vector != VECTOR_SPURIOUS) {
        remember(frame);
        frame->rip = trap_resume;
        frame->rsp = trap_stack; /* a call may have pushed before its target faulted */
        frame->rflags &= ~(uint64_t)RFLAGS_TF;
        trap_resume = 0;
    } else if (frame->vector != VECTOR_SPURIOUS) {
        print("FAIL vector %lu, error 0x%lx, rip 0x%lx, cs 0x%lx, rflags 0x%lx, cr2 0x%lx\n", frame->vector,
              frame->error, frame->rip, frame->cs, frame->rflags, read_cr2());
        guest_exit(EXIT_EXCEPTION);
    }
}

void page_set(uintptr_t address, uint64_t entry)
{
    enum { SPLITS_MAX = 4 };
    static uint64_t tables[SPLITS_MAX][512] __attribute__((aligned(4096)));
    static unsigned splits;

    uint64_t *directory_entry = &page_directories[address >> 21];
    if (*directory_entry & PAGE_LARGE) {
        REQUIRE(EXIT_EXCEPTION, splits < SPLITS_MAX);
        uint64_t *table = tables[splits++];
        uint64_t base = *directory_entry & ~(uint64_t)PAGE_LARGE;
        for (unsigned i = 0; i < 512; i++)
            table[i] = base + i * 4096;
        *directory_entry = (uint64_t)table | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    }
    uint64_t *table = (uint64_t *)(*directory_entry & ~0xfffull);
    table[address >> 12 & 511] = entry;
    /* A full flush: invlpg of the small page need not drop the large one it came from on every CPU. */
    write_cr3(read_cr3());
}

void *physical_window(uint64_t gpa)
{
    static uint64_t pointers[512] __attribute__((aligned(4096))),
        directory[512] __attribute__((aligned(4096)));
    static char *const window = (char *)(1ull << 39); /* the second entry of the top level */

    page_map[1] = (uint64_t)pointers | PAGE_PRESENT | PAGE_WRITE;
    pointers[0] = (uint64_t)directory | PAGE_PRESENT | PAGE_WRITE;
    directory[0] = (gpa & ~0x1fffffull) | PAGE_PRESENT | PAGE_WRITE | PAGE_LARGE;
    __asm__ volatile("invlpg (%0)" ::"r"(window) : "memory");
    return window + (gpa & 0x1fffff);
}
