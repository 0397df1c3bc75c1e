/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Small CPL 0 and CPL 3 guests that need the compat remedies where KVM emulates, and must come to the same
 * end where it does not. Skipped without /dev/kvm.
 */
#include "compat_cases.h"
#include "vmmcore.h"

#include <errno.h>
#include <time.h>

enum { SKIPPED = 77 };
enum {
    MEMORY_SIZE = 4 << 20,
    GDT = 0x500,
    TSS = 0x700,
    PML4 = 0x1000,
    PDPT = 0x2000,
    PD = 0x3000,
    KERNEL_PDPT = 0x4000,
    IDT = 0x5000,
    KERNEL_PD = 0x6000,
    STACK_TOP = 0xf000,
    CODE = 0x10000,
    USER_CODE = 0x18000,
    HANDLERS = 0x20000,
    DATA = 0x28000,
};
#define KERNEL_BASE 0xffffffff80000000ull

static struct machine {
    vmm_vm *vm;
    vmm_vcpu *vcpu;
    uint8_t *memory;
    vmm_sregs sregs;
} m;

static void need(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "%s: %s (%s)\n", what, vmm_error_text(), strerror(-rc));
        exit(1);
    }
}

static void put64(uint64_t at, uint64_t value)
{
    memcpy(m.memory + at, &value, 8);
}

static void gate(unsigned vector, uint64_t handler, unsigned dpl)
{
    put64(IDT + 16 * vector,
          (handler & 0xffff) | 0x10 << 16 | (0x8eull | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48);
    put64(IDT + 16 * vector + 8, handler >> 32);
}

/* Memory at 0 for user and supervisor, the same at KERNEL_BASE for the supervisor alone. */
static void machine_create(uint32_t compat)
{
    need(vmm_vm_create("/dev/kvm", 0, &m.vm), "vmm_vm_create");
    need(vmm_compat_enable(m.vm, compat), "vmm_compat_enable");
    int memfd;
    need(vmm_vm_add_memory(m.vm, 0, MEMORY_SIZE, 0, (void **)&m.memory, &memfd), "vmm_vm_add_memory");
    need(vmm_vcpu_create(m.vm, 0, &m.vcpu), "vmm_vcpu_create");
    static vmm_cpuid_entry cpuid[256];
    int n = vmm_vm_supported_cpuid(m.vm, cpuid, 256);
    need(n, "vmm_vm_supported_cpuid");
    need(vmm_vcpu_set_cpuid(m.vcpu, cpuid, (uint32_t)n), "vmm_vcpu_set_cpuid");

    put64(PML4, PDPT | 7);
    put64(PML4 + 511 * 8, KERNEL_PDPT | 3);
    put64(PDPT, PD | 7);
    put64(KERNEL_PDPT + 510 * 8, KERNEL_PD | 3);
    for (uint64_t i = 0; i < MEMORY_SIZE >> 21; i++) {
        put64(PD + 8 * i, i << 21 | 0x87);
        put64(KERNEL_PD + 8 * i, i << 21 | 0x83);
    }
    static const uint64_t gdt[] = {0,
                                   0,
                                   0x00af9b000000ffff,
                                   0x00cf93000000ffff,
                                   0x00cffb000000ffff,
                                   0x00cff3000000ffff,
                                   0x00affb000000ffff,
                                   0x0000890007000067,
                                   0};
    memcpy(m.memory + GDT, gdt, sizeof gdt);
    put64(TSS + 4, STACK_TOP + KERNEL_BASE);
    for (unsigned vector = 0; vector < 256; vector++) { /* mov $vector, %al; hlt */
        const uint8_t handler[4] = {0xb0, (uint8_t)vector, 0xf4, 0xcc};
        memcpy(m.memory + HANDLERS + 4 * vector, handler, 4);
        gate(vector, KERNEL_BASE + HANDLERS + 4 * vector, 3);
    }
    need(vmm_vcpu_get_sregs(m.vcpu, &m.sregs), "vmm_vcpu_get_sregs");
    const vmm_segment code = {
        .limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    const vmm_segment data = {
        .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    m.sregs.cs = code;
    m.sregs.ds = m.sregs.es = m.sregs.fs = m.sregs.gs = m.sregs.ss = data;
    m.sregs.tr = (vmm_segment){.base = TSS, .limit = 0x67, .selector = 0x38, .type = 11, .present = 1};
    m.sregs.gdt = (vmm_dtable){.base = GDT, .limit = sizeof gdt - 1};
    m.sregs.idt = (vmm_dtable){.base = IDT, .limit = 4095};
    m.sregs.cr0 = 0x80010033;
    m.sregs.cr3 = PML4;
    m.sregs.cr4 = 0x40620; /* PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
    m.sregs.efer = 0xd01;  /* SCE, LME, LMA, NXE */
    need(vmm_vcpu_set_sregs(m.vcpu, &m.sregs), "vmm_vcpu_set_sregs");
}

static void machine_destroy(void)
{
    vmm_vm_destroy(m.vm);
    m = (struct machine){0};
}

/* Run until HLT; anything else is a failure, told with the bytes KVM stopped at. */
static bool run_to_halt(const char *name)
{
    need(vmm_vm_rearm(m.vm), "vmm_vm_rearm");
    int reason = vmm_vcpu_run(m.vcpu);
    if (reason == VMM_STOP_HALT)
        return true;
    uint8_t bytes[16] = {0};
    uint32_t n = vmm_vcpu_failed_instruction(m.vcpu, bytes);
    vmm_regs regs;
    vmm_vcpu_get_regs(m.vcpu, &regs);
    fprintf(stderr, "%s: stopped for reason %d at %llx:", name, reason, (unsigned long long)regs.rip);
    for (uint32_t i = 0; i < n; i++)
        fprintf(stderr, " %02x", bytes[i]);
    fprintf(stderr, "\n");
    return false;
}

static void place(uint64_t at, const uint8_t *bytes, size_t n)
{
    memcpy(m.memory + at, bytes, n);
    m.memory[at + n] = 0xf4; /* HLT */
}

static int instructions_agree_with_the_processor(void)
{
    int failures = 0;
    uint64_t seed = 88172645463325252ull;
    machine_create(VMM_COMPAT_COMPLETE);
    for (int i = 0; i < N_COMPAT_CASES; i++) {
        const struct compat_case *test = &compat_cases[i];
        if (test->misread || !processor_has(test->needs))
            continue;
        size_t n = (size_t)(test->end - test->bytes);
        place(CODE, test->bytes, n);
        for (int trial = 0; trial < 20; trial++) {
            struct native_state native, guest;
            _Alignas(64) uint8_t memory[64];
            random_start(&seed, &native, memory);
            memcpy(m.memory + DATA, memory, 64);
            struct kvm_regs regs;
            state_to_regs(&native, &regs);
            regs.rip = CODE;
            regs.rsp = STACK_TOP;
            regs.rsi = DATA;
            need(vmm_vcpu_set_regs(m.vcpu, (const vmm_regs *)&regs), "vmm_vcpu_set_regs");
            native.gpr[6] = (uintptr_t)memory;
            native_execute(&native, test->bytes, n);
            if (!run_to_halt(test->name)) {
                failures++;
                break;
            }
            need(vmm_vcpu_get_regs(m.vcpu, (vmm_regs *)&regs), "vmm_vcpu_get_regs");
            regs_to_state(&regs, &guest);
            if (regs.rip != CODE + n + 1 || !same_end(test, &native, &guest) ||
                memcmp(memory, m.memory + DATA, 64) != 0) {
                fprintf(stderr, "%s: trial %d differs (rip %llx)\n", test->name, trial,
                        (unsigned long long)regs.rip);
                print_state("processor", &native);
                print_state("guest", &guest);
                failures++;
                break;
            }
        }
    }
    machine_destroy();
    return failures;
}

/* Sequences that end in HLT with RAX telling. */
#define SEQUENCES(X)                                                                                         \
    /* an INT3 handler returns behind the instruction: INT3's frame is a trap's */                           \
    X(int3, "int3\n inc %rax\n hlt\n", 0x43)                                                                 \
    X(int_n, "int $0x41\n inc %rax\n hlt\n", 0x43)                                                           \
    X(stac_clac, "stac\n pushfq\n pop %rax\n clac\n pushfq\n pop %rbx\n xor %rbx, %rax\n hlt\n", 0x40000)    \
    X(ud2, "ud2\n", 6)                                                                                       \
    X(ud1, "ud1 %eax, %eax\n", 6)                                                                            \
    X(lock_is_refused, ".byte 0xf0, 0xf3, 0x48, 0x0f, 0xb8, 0xc0\n hlt\n", 6)                                \
    X(cmpxchg16b_unaligned, "cmpxchg16b 8(%rsi)\n hlt\n", 13)                                                \
    X(page_fault, "mov $0x7f0000000000, %rbx\n popcnt (%rbx), %rax\n hlt\n", 14)                             \
    X(noncanonical, "mov $0x8000000000000000, %rbx\n popcnt (%rbx), %rax\n hlt\n", 13)                       \
    X(noncanonical_stack, "mov $0x8000000000000000, %rbp\n popcnt (%rbp), %rax\n hlt\n", 12)                 \
    X(xsetbv_xgetbv,                                                                                         \
      "mov $7, %eax\n xor %edx, %edx\n xor %ecx, %ecx\n xsetbv\n xor %eax, %eax\n xgetbv\n hlt\n", 7)        \
    X(mxcsr, "movl $0x1fa0, (%rsi)\n ldmxcsr (%rsi)\n stmxcsr 4(%rsi)\n mov 4(%rsi), %eax\n hlt\n", 0x1fa0)  \
    X(mxcsr_reserved, "movl $0x80001f80, (%rsi)\n ldmxcsr (%rsi)\n hlt\n", 13)                               \
    /* registers go to memory, are lost, and come back */                                                    \
    X(xsave_xrstor,                                                                                          \
      "movdqu (%rsi), %xmm3\n mov $7, %eax\n xor %edx, %edx\n xsave64 0x1000(%rsi)\n"                        \
      "movdqu 16(%rsi), %xmm3\n xrstor64 0x1000(%rsi)\n movdqu %xmm3, 32(%rsi)\n"                            \
      "mov 32(%rsi), %rax\n sub (%rsi), %rax\n or 0x1200(%rsi), %rax\n hlt\n",                               \
      2)                                                                                                     \
    X(xsavec_xrstor,                                                                                         \
      "movdqu (%rsi), %xmm3\n mov $7, %eax\n xor %edx, %edx\n xsavec64 0x1000(%rsi)\n"                       \
      "movdqu 16(%rsi), %xmm3\n xrstor64 0x1000(%rsi)\n movdqu %xmm3, 32(%rsi)\n"                            \
      "mov 32(%rsi), %rax\n sub (%rsi), %rax\n hlt\n",                                                       \
      0)                                                                                                     \
    X(xrstor_bad_header,                                                                                     \
      "movq $0, 0x1200(%rsi)\n movq $1, 0x1208(%rsi)\n mov $7, %eax\n xor %edx, %edx\n"                      \
      "xrstor64 0x1000(%rsi)\n hlt\n",                                                                       \
      13)                                                                                                    \
    X(xsave_unaligned, "mov $7, %eax\n xor %edx, %edx\n xsave64 8(%rsi)\n hlt\n", 13)                        \
    X(fldcw, "movw $0x27f, (%rsi)\n fninit\n fldcw (%rsi)\n fnstcw 8(%rsi)\n movzwl 8(%rsi), %eax\n hlt\n",  \
      0x27f)                                                                                                 \
    X(fnstsw, "fninit\n fnclex\n mov $-1, %eax\n fnstsw %ax\n hlt\n", 0xffff0000)                            \
    X(emms, "emms\n mov $0x41, %eax\n hlt\n", 0x41)                                                          \
    X(verw, "mov $0x18, %eax\n verw %ax\n setz %al\n movzbl %al, %eax\n hlt\n", 1)                           \
    X(verw_null, "xor %eax, %eax\n verw %ax\n setz %al\n movzbl %al, %eax\n hlt\n", 0)                       \
    X(lsl, "mov $0x38, %ebx\n lsl %bx, %eax\n hlt\n", 0x67)                                                  \
    X(lar, "mov $0x10, %ebx\n lar %bx, %eax\n and $0xff00, %eax\n hlt\n", 0x9b00)

#define SEQUENCE_BYTES(name, text, expected)                                                                 \
    extern const uint8_t sequence_##name[], sequence_end_##name[];                                           \
    __asm__(".pushsection .rodata\nsequence_" #name ": " text "\nsequence_end_" #name ":\n.popsection");
SEQUENCES(SEQUENCE_BYTES)
#define SEQUENCE_ROW(id, text, expected) {#id, sequence_##id, sequence_end_##id, expected},
static const struct {
    const char *name;
    const uint8_t *bytes, *end;
    uint64_t rax;
} sequences[] = {SEQUENCES(SEQUENCE_ROW)};

static int sequences_end_as_the_architecture_says(void)
{
    int failures = 0;
    machine_create(VMM_COMPAT_COMPLETE);
    static const uint8_t return_0x42[] = {0x48, 0xc7, 0xc0, 0x42, 0,
                                          0,    0,    0x48, 0xcf}; /* mov $0x42,%rax; iretq */
    memcpy(m.memory + HANDLERS + 0x1000, return_0x42, sizeof return_0x42);
    gate(3, KERNEL_BASE + HANDLERS + 0x1000, 0);
    gate(0x41, KERNEL_BASE + HANDLERS + 0x1000, 0);
    for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
        place(CODE, sequences[i].bytes, (size_t)(sequences[i].end - sequences[i].bytes));
        uint64_t seed = 1;
        for (int n = 0; n < 64; n += 8)
            put64(DATA + (uint64_t)n, next_random(&seed));
        vmm_regs regs = {.rip = CODE, .rsp = STACK_TOP, .rsi = DATA, .rflags = 2};
        need(vmm_vcpu_set_sregs(m.vcpu, &m.sregs), "vmm_vcpu_set_sregs");
        need(vmm_vcpu_set_regs(m.vcpu, &regs), "vmm_vcpu_set_regs");
        if (!run_to_halt(sequences[i].name)) {
            failures++;
            continue;
        }
        need(vmm_vcpu_get_regs(m.vcpu, &regs), "vmm_vcpu_get_regs");
        uint64_t rax = sequences[i].rax < 32 && regs.rip > KERNEL_BASE ? regs.rax & 0xff : regs.rax;
        if (rax != sequences[i].rax) {
            fprintf(stderr, "%s: rax %llx, not %llx (rip %llx)\n", sequences[i].name, (unsigned long long)rax,
                    (unsigned long long)sequences[i].rax, (unsigned long long)regs.rip);
            failures++;
        }
    }
    machine_destroy();
    return failures;
}

/* CPL 3: RBX system calls, each checked by the kernel, and a page fault of its own between them. */
__asm__(".pushsection .rodata\n"
        "user_program:\n"
        "1:  mov %rsp, %r12\n"
        "    stc\n"
        "    syscall\n"
        "2:  jnc 3f\n" /* SYSRET gives RFLAGS back */
        "    cmp %rsp, %r12\n"
        "    jne 3f\n"
        "    mov 0x40000000, %r14\n" /* not mapped: the handler skips these eight bytes */
        "    dec %rbx\n"
        "    jnz 1b\n"
        "    mov $1, %edi\n"
        "    syscall\n" /* exit */
        "3:  ud2\n"
        "user_program_end:\n"
        "kernel_entry:\n"
        "    cmp $1, %edi\n"
        "    je 4f\n"
        "    mov %cs, %eax\n"
        "    test $3, %al\n"
        "    jnz 5f\n"
        "    mov %ss, %eax\n"
        "    cmp $0x18, %eax\n"
        "    jne 5f\n"
        "    inc %r15\n"
        "    sysretq\n"
        "4:  mov $0x42, %eax\n"
        "    hlt\n"
        "5:  mov $0xbad, %eax\n"
        "    hlt\n"
        "kernel_entry_end:\n"
        "page_fault_handler:\n"
        "    clac\n"
        "    inc %r13\n"
        "    addq $8, 8(%rsp)\n"
        "    add $8, %rsp\n"
        "    iretq\n"
        "page_fault_handler_end:\n"
        /* the same without CLAC at its head, and an instruction only a single step gets past */
        "stepped_handler:\n"
        "    lea 1(%r13), %r13\n"
        "    addq $8, 8(%rsp)\n"
        "    add $8, %rsp\n"
        "    iretq\n"
        "stepped_handler_end:\n"
        ".popsection\n");
extern const uint8_t user_program[], user_program_end[], kernel_entry[], kernel_entry_end[],
    page_fault_handler[], page_fault_handler_end[], stepped_handler[], stepped_handler_end[];

/*
 * CPL 3's other ways in, each leaving its mark: INT 0x80 from 64-bit code, then, by a far return, SYSCALL and
 * INT 0x80 from 32-bit code. R8 is not theirs to keep below 64 bits, so the marks are in memory.
 */
__asm__(".pushsection .rodata\n"
        "other_ways:\n"
        "    mov $5, %eax\n"
        "    int $0x80\n"
        "    cmp $6, %eax\n"
        "    jne 3f\n"
        "    lea 2f(%rip), %rax\n"
        "    pushq $0x23\n"
        "    push %rax\n"
        "    lretq\n"
        "3:  ud2\n"
        ".code32\n"
        "2:  mov $7, %eax\n"
        "    mov %esp, %esi\n"
        "    syscall\n"
        "    cmp $9, %eax\n"
        "    jne 4f\n"
        "    cmp %esp, %esi\n"
        "    jne 4f\n"
        "    mov $0x30, %eax\n"
        "    int $0x80\n"
        "    cmp $0x31, %eax\n"
        "    jne 4f\n"
        "    int $0x81\n" /* ends it; HLT in its handler */
        "4:  ud2\n"
        ".code64\n"
        "other_ways_end:\n"
        "increment_and_return:\n"
        "    inc %eax\n"
        "    iretq\n"
        "increment_and_return_end:\n"
        "compat_entry:\n"
        "    mov %cs, %edi\n"
        "    test $3, %dil\n"
        "    jnz 5f\n"
        "    add $2, %eax\n"
        "5:  sysretl\n"
        "compat_entry_end:\n"
        ".popsection\n");
extern const uint8_t other_ways[], other_ways_end[], increment_and_return[], increment_and_return_end[],
    compat_entry[], compat_entry_end[];

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int system_calls(const char *name, const uint8_t *handler, const uint8_t *handler_end)
{
    enum { CALLS = 1000, ENTRY = 0x24000, FAULTS = 0x25000 };
    machine_create(VMM_COMPAT_COMPLETE | VMM_COMPAT_SYSCALL | VMM_COMPAT_LSTAR);
    memcpy(m.memory + USER_CODE, user_program, (size_t)(user_program_end - user_program));
    memcpy(m.memory + ENTRY, kernel_entry, (size_t)(kernel_entry_end - kernel_entry));
    memcpy(m.memory + FAULTS, handler, (size_t)(handler_end - handler));
    gate(14, KERNEL_BASE + FAULTS, 0);

    /* The kernel half sets the MSRs itself, as a kernel does, and goes to CPL 3 by SYSRET. */
    static const uint8_t set_msrs[] = {
        0xb9, 0x81, 0x00, 0x00, 0xc0,                         /* mov $STAR, %ecx */
        0x31, 0xc0,                                           /* xor %eax, %eax */
        0xba, 0x10, 0x00, 0x20, 0x00, 0x0f, 0x30,             /* mov $0x00200010, %edx; wrmsr */
        0xb9, 0x84, 0x00, 0x00, 0xc0,                         /* mov $SFMASK, %ecx */
        0xb8, 0x00, 0x07, 0x00, 0x00, 0x31, 0xd2, 0x0f, 0x30, /* mov $0x700, %eax; xor %edx, %edx; wrmsr */
        0xb9, 0x82, 0x00, 0x00, 0xc0,                         /* mov $LSTAR, %ecx */
        0xb8, 0x00, 0x40, 0x02, 0x80, 0xba, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x30, /* KERNEL_BASE + ENTRY */
        0xb9, 0x00, 0x80, 0x01, 0x00,                                           /* mov $USER_CODE, %ecx */
        0x41, 0xbb, 0x02, 0x02, 0x00, 0x00,                                     /* mov $0x202, %r11d */
        0x48, 0x0f, 0x07,                                                       /* sysretq */
    };
    memcpy(m.memory + CODE, set_msrs, sizeof set_msrs);
    vmm_regs regs = {.rip = KERNEL_BASE + CODE, .rsp = 0xe000, .rflags = 2, .rbx = CALLS};
    need(vmm_vcpu_set_regs(m.vcpu, &regs), "vmm_vcpu_set_regs");
    double start = seconds();
    int failures = !run_to_halt(name);
    double took = seconds() - start;
    need(vmm_vcpu_get_regs(m.vcpu, &regs), "vmm_vcpu_get_regs");
    if (!failures && (regs.rax != 0x42 || regs.r15 != CALLS || regs.r13 != CALLS)) {
        fprintf(stderr, "%s: rax %llx, %llu calls, %llu faults, rip %llx\n", name,
                (unsigned long long)regs.rax, (unsigned long long)regs.r15, (unsigned long long)regs.r13,
                (unsigned long long)regs.rip);
        failures++;
    }
    vmm_compat_stats stats;
    vmm_compat_get_stats(m.vm, &stats);
    printf("%s: %d calls and faults in %.1f ms; completed %llu, repaired %llu, stepped over %llu\n", name,
           CALLS, took * 1e3, (unsigned long long)stats.completed, (unsigned long long)stats.syscalls,
           (unsigned long long)stats.faults);
    machine_destroy();
    return failures;
}

/* mov $index, %ecx; mov $low, %eax; mov $high, %edx; wrmsr */
static uint64_t put_wrmsr(uint64_t at, uint32_t index, uint64_t value)
{
    uint8_t code[17] = {0xb9, 0, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xba, 0, 0, 0, 0, 0x0f, 0x30};
    const uint32_t low = (uint32_t)value, high = (uint32_t)(value >> 32);
    memcpy(code + 1, &index, 4);
    memcpy(code + 6, &low, 4);
    memcpy(code + 11, &high, 4);
    memcpy(m.memory + at, code, sizeof code);
    return at + sizeof code;
}

static int cpl3_gets_in_every_way(void)
{
    enum { COMPAT_ENTRY = 0x24000, INT_HANDLER = 0x25000 };
    if (!processor_has("sse4a")) {
        printf("skipped: SYSCALL from 32-bit code is AMD's alone\n");
        return 0;
    }
    machine_create(VMM_COMPAT_COMPLETE | VMM_COMPAT_SYSCALL | VMM_COMPAT_LSTAR);
    memcpy(m.memory + USER_CODE, other_ways, (size_t)(other_ways_end - other_ways));
    memcpy(m.memory + INT_HANDLER, increment_and_return,
           (size_t)(increment_and_return_end - increment_and_return));
    memcpy(m.memory + COMPAT_ENTRY, compat_entry, (size_t)(compat_entry_end - compat_entry));
    gate(0x80, KERNEL_BASE + INT_HANDLER, 3);
    uint64_t at = put_wrmsr(CODE, 0xc0000081, 0x0020001000000000);
    at = put_wrmsr(at, 0xc0000083, KERNEL_BASE + COMPAT_ENTRY);
    at = put_wrmsr(at, 0xc0000084, 0x700);
    at = put_wrmsr(at, 0xc0000082, KERNEL_BASE + COMPAT_ENTRY);
    static const uint8_t leave[] = {0xb9, 0x00, 0x80, 0x01, 0x00,       /* mov $USER_CODE, %ecx */
                                    0x41, 0xbb, 0x02, 0x02, 0x00, 0x00, /* mov $0x202, %r11d */
                                    0x48, 0x0f, 0x07};                  /* sysretq */
    memcpy(m.memory + at, leave, sizeof leave);
    vmm_regs regs = {.rip = KERNEL_BASE + CODE, .rsp = 0xe000, .rflags = 2};
    need(vmm_vcpu_set_regs(m.vcpu, &regs), "vmm_vcpu_set_regs");
    int failures = !run_to_halt("other ways into the kernel");
    need(vmm_vcpu_get_regs(m.vcpu, &regs), "vmm_vcpu_get_regs");
    if ((regs.rax & 0xff) != 0x81) {
        fprintf(stderr, "other ways into the kernel: rax %llx rip %llx rcx %llx\n",
                (unsigned long long)regs.rax, (unsigned long long)regs.rip, (unsigned long long)regs.rcx);
        for (uint64_t a = regs.rsp; a < regs.rsp + 48; a += 8)
            fprintf(stderr, "  %llx\n", (unsigned long long)*(uint64_t *)(void *)(m.memory + (a & 0xfffff)));
        failures++;
    }
    machine_destroy();
    return failures;
}

int main(void)
{
    vmm_vm *vm;
    int rc = vmm_vm_create("/dev/kvm", 0, &vm);
    if (rc == -ENOENT || rc == -EACCES || rc == -ENODEV) {
        printf("skipped: /dev/kvm: %s\n", strerror(-rc));
        return SKIPPED;
    }
    need(rc, "vmm_vm_create");
    vmm_vm_destroy(vm);
    int failures = instructions_agree_with_the_processor();
    failures += sequences_end_as_the_architecture_says();
    failures += system_calls("system calls, #PF handler beginning with CLAC", page_fault_handler,
                             page_fault_handler_end);
    failures +=
        system_calls("system calls, #PF handler beginning with LEA", stepped_handler, stepped_handler_end);
    failures += cpl3_gets_in_every_way();
    printf("%d failures\n", failures);
    return failures != 0;
}
