/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host compatibility: what this room's files say to each other.
 *
 * On some hosts KVM runs guest CPL 0 code in its instruction emulator, which lacks instructions, and leaves
 * SYSCALL at CPL 3. Two remedies live here, both off unless vmm_compat_enable() asks for them:
 *
 *   complete   an instruction KVM gave up on is decoded (insn.c), done here (integer.c, system.c, fpu.c, x87.c) on
 *              the vCPU's registers and, through its page tables (paging.c), its memory; the guest goes on
 *   syscall    a SYSCALL that faulted at its entry point is moved to where it should have gone (syscall.c)
 *
 * Files call only those above them in this list:
 *
 *   insn, completion           decoding; registers, exceptions and CPUID of one completion
 *   paging                     guest memory by linear address
 *   operands, descriptors      the ModRM operand, in a register or in memory; segment descriptors and gates
 *   integer, system, fpu, x87, transfers
 *                              what instructions do
 *   table                      which instruction is which: complete()
 *   vcpu                       a vCPU's registers into a completion, and its outcome back to KVM
 *   syscall                    the SYSCALL repair
 *   exits                      completing at KVM_EXIT_INTERNAL_ERROR
 *   compat                     switching the remedies on
 *
 * Completing is pure: it turns a struct completion into another and touches KVM only through its `source`, so
 * that tests run it on plain memory. Anything not known is COMPLETE_UNKNOWN, and the run ends: never a guess.
 */
#ifndef VMM_COMPAT_H
#define VMM_COMPAT_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- decoding (insn.c) ---- */

enum { INSN_MAX = 15 }; /* bytes in the longest legal instruction */

enum insn_map { MAP_PRIMARY = 0, MAP_0F = 1, MAP_0F38 = 2, MAP_0F3A = 3 };

enum segment_register { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_NONE };

enum { REG_NONE = 0xff, REG_RSP = 4, REG_RBP = 5 };

/* One instruction, as encoded. Register numbers are the encoding's (0 rax, 1 rcx, 2 rdx, 3 rbx, 4 rsp ...). */
struct insn {
    uint8_t length;
    uint8_t map, opcode;
    uint8_t prefix; /* what selects between instructions: 0xf3 or 0xf2 (the last one), else 0x66, else 0 */
    uint8_t operand_size; /* of general registers: 2, 4 or 8, as prefixes, REX/VEX.W and mode have it */
    uint8_t address_size; /* 2, 4 or 8 */
    uint8_t segment;      /* of the memory operand, overrides applied */
    bool long_mode, opsize, lock, rex, vex, w;
    uint8_t vvvv, vector_256;
    bool has_modrm, memory; /* memory: the r/m operand is in memory */
    uint8_t reg, rm, mod;   /* with REX/VEX extension bits; rm is meaningful only when !memory */
    uint8_t base, index, scale;
    bool rip_relative;
    int32_t displacement;
    uint8_t immediate_size;
    uint64_t immediate; /* sign-extended where imm8 and imm32 are */
};

enum cpu_mode { CPU_16, CPU_32, CPU_64 };

/* False when the bytes are too few, too many (over 15), or not of a form this decoder has. */
bool insn_decode(struct insn *insn, const uint8_t *bytes, size_t n, enum cpu_mode mode);

/* ---- one completion ---- */

enum outcome {
    COMPLETE_DONE,    /* go on at the next instruction */
    COMPLETE_JUMPED,  /* regs.rip is set already */
    COMPLETE_FAULT,   /* deliver `event`, RIP unchanged */
    COMPLETE_TRAP,    /* deliver `event` after the instruction (INT n, INT3) */
    COMPLETE_UNKNOWN, /* not ours to complete */
};

/* Where XSAVE components lie: CPUID leaf 0xd of the processor underneath, which KVM's XSAVE area follows. */
struct xsave_layout {
    uint32_t offset[32], size[32]; /* size 0: no such component */
    uint32_t aligned;              /* bit n: 64-byte aligned in the compacted format */
};

/*
 * CPUID's feature bits, as far as an instruction hangs on one: word << 5 | bit. Only what the guest's CPUID offers is
 * completed; the rest is #UD, as it is on a processor without it.
 */
enum cpuid_word {
    CPUID_1_ECX,
    CPUID_1_EDX,
    CPUID_7_EBX,
    CPUID_7_ECX,
    CPUID_7_EDX,
    CPUID_D1_EAX, /* leaf 0xd, index 1 */
    CPUID_80000001_ECX,
    CPUID_80000001_EDX,
    CPUID_80000008_EBX,
    N_CPUID_WORDS,
};
enum feature {
    MONITOR = CPUID_1_ECX << 5 | 3,
    CX16 = CPUID_1_ECX << 5 | 13,
    SSE42 = CPUID_1_ECX << 5 | 20,
    MOVBE = CPUID_1_ECX << 5 | 22,
    POPCNT = CPUID_1_ECX << 5 | 23,
    XSAVE = CPUID_1_ECX << 5 | 26,
    RDRAND = CPUID_1_ECX << 5 | 30,
    CX8 = CPUID_1_EDX << 5 | 8,
    CLFSH = CPUID_1_EDX << 5 | 19,
    MMX = CPUID_1_EDX << 5 | 23,
    SSE = CPUID_1_EDX << 5 | 25,
    FSGSBASE = CPUID_7_EBX << 5 | 0,
    SGX = CPUID_7_EBX << 5 | 2,
    BMI1 = CPUID_7_EBX << 5 | 3,
    BMI2 = CPUID_7_EBX << 5 | 8,
    INVPCID = CPUID_7_EBX << 5 | 10,
    RTM = CPUID_7_EBX << 5 | 11,
    RDSEED = CPUID_7_EBX << 5 | 18,
    ADX = CPUID_7_EBX << 5 | 19,
    SMAP = CPUID_7_EBX << 5 | 20,
    CLFLUSHOPT = CPUID_7_EBX << 5 | 23,
    CLWB = CPUID_7_EBX << 5 | 24,
    PKU = CPUID_7_ECX << 5 | 3,
    RDPID = CPUID_7_ECX << 5 | 22,
    SERIALIZE = CPUID_7_EDX << 5 | 14,
    PCONFIG = CPUID_7_EDX << 5 | 18,
    XSAVEOPT = CPUID_D1_EAX << 5 | 0,
    XSAVEC = CPUID_D1_EAX << 5 | 1,
    XGETBV1 = CPUID_D1_EAX << 5 | 2,
    XSAVES = CPUID_D1_EAX << 5 | 3,
    LZCNT = CPUID_80000001_ECX << 5 | 5,
    MONITORX = CPUID_80000001_ECX << 5 | 29,
    RDTSCP = CPUID_80000001_EDX << 5 | 27,
    CLZERO = CPUID_80000008_EBX << 5 | 0,
    INVLPGB = CPUID_80000008_EBX << 5 | 3,
    RDPRU = CPUID_80000008_EBX << 5 | 4,
    NO_FEATURE = 0xffff,
};

/* Where a completion gets what registers and memory do not hold. Functions answer false when the host
 * refuses. */
struct completion_source {
    void *opaque;
    void *(*memory)(void *opaque, uint64_t gpa, uint64_t size); /* NULL unless all of it is RAM */
    void (*wrote)(void *opaque, const void *at, size_t n);      /* of that memory; may be NULL */
    bool (*get_xsave)(void *opaque, void *area);                /* 4 KiB, standard format */
    bool (*set_xsave)(void *opaque, const void *area);
    bool (*get_xcr0)(void *opaque, uint64_t *xcr0);
    bool (*get_msr)(void *opaque, uint32_t index, uint64_t *value);
    bool (*flush_tlb)(void *opaque);
    struct xsave_layout layout;
    uint32_t cpuid[N_CPUID_WORDS]; /* the guest's */
};

static inline void completion_wrote(const struct completion_source *source, const void *at, size_t n)
{
    if (source->wrote)
        source->wrote(source->opaque, at, n);
}

struct completion {
    const struct completion_source *source;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    bool sregs_changed;
    bool unmasks_nmi; /* an IRET was completed */
    struct insn insn;
    struct {
        uint8_t vector;
        bool has_error, software; /* software: INT n, delivered as an interrupt */
        uint32_t error;
        uint64_t address; /* CR2 when vector is #PF */
    } event;
};

enum vector {
    V_DB = 1,
    V_BP = 3,
    V_OF = 4,
    V_UD = 6,
    V_NM = 7,
    V_NP = 11,
    V_SS = 12,
    V_GP = 13,
    V_PF = 14,
    V_MF = 16,
    V_AC = 17,
    V_XM = 19
};

enum rflags {
    FLAG_CF = 1,
    FLAG_PF = 4,
    FLAG_AF = 0x10,
    FLAG_ZF = 0x40,
    FLAG_SF = 0x80,
    FLAG_TF = 0x100,
    FLAG_IF = 0x200,
    FLAG_DF = 0x400,
    FLAG_OF = 0x800,
    FLAG_IOPL = 0x3000,
    FLAG_NT = 0x4000,
    FLAG_RF = 0x10000,
    FLAG_VM = 0x20000,
    FLAG_AC = 0x40000,
    FLAG_VIF = 0x80000,
    FLAG_VIP = 0x100000,
    FLAG_ID = 0x200000,
    FLAG_ARITHMETIC = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF,
};

enum { CR0_PE = 1, CR0_MP = 2, CR0_EM = 4, CR0_TS = 8, CR0_NE = 0x20, CR0_WP = 0x10000 };
#define CR0_PG 0x80000000u
enum {
    CR4_TSD = 4,
    CR4_PSE = 0x10,
    CR4_PAE = 0x20,
    CR4_PGE = 0x80,
    CR4_OSFXSR = 0x200,
    CR4_OSXMMEXCPT = 0x400,
    CR4_LA57 = 0x1000,
    CR4_FSGSBASE = 0x10000,
    CR4_PCIDE = 0x20000,
    CR4_OSXSAVE = 0x40000,
    CR4_SMEP = 0x100000,
    CR4_SMAP = 0x200000,
    CR4_PKE = 0x400000,
    CR4_CET = 0x800000,
    CR4_PKS = 0x1000000,
};
enum { EFER_SCE = 1, EFER_LMA = 0x400, EFER_NXE = 0x800 };

/* ---- registers, exceptions and CPUID (completion.c) ---- */

enum cpu_mode completion_mode(const struct completion *c);
/* With four levels of paging, the only ones modelled. */
static inline bool canonical(uint64_t address)
{
    return (int64_t)(address << 16) >> 16 == (int64_t)address;
}

/* Where the next instruction is. */
uint64_t completion_linear_rip(const struct completion *c);

static inline unsigned completion_cpl(const struct completion *c)
{
    return c->sregs.ss.dpl;
}

/* Record an exception; they answer COMPLETE_FAULT, to be returned. */
enum outcome fault(struct completion *c, uint8_t vector);
enum outcome fault_error(struct completion *c, uint8_t vector, uint32_t error);

/* General registers by encoding number. A 32-bit write clears the upper half, as the architecture has it. */
uint64_t gpr_read(const struct completion *c, unsigned reg, unsigned size);
void gpr_write(struct completion *c, unsigned reg, unsigned size, uint64_t value);

/* Whether the guest's CPUID has the feature. */
bool offered(const struct completion *c, enum feature feature);

/* ---- guest memory by linear address (paging.c) ---- */

enum access { ACCESS_READ = 0, ACCESS_WRITE = 2, ACCESS_USER = 4, ACCESS_FETCH = 16 };

/* A linear range, in at most two pages. */
struct span {
    uint8_t *part[2];
    size_t size[2];
    const struct completion_source *source;
};

enum { SPAN_MAX = 4096 };

/* Check and find [linear, linear+size), size at most SPAN_MAX, as an explicit access at the current CPL. */
enum outcome linear_span(struct completion *c, uint64_t linear, size_t size, enum access access,
                         struct span *span);

void span_read(const struct span *span, size_t offset, void *to, size_t n);
void span_write(const struct span *span, size_t offset, const void *from, size_t n);

/* One page-table walk, of the low 32 bits outside long mode. */
enum outcome linear_translate(struct completion *c, uint64_t linear, unsigned access, uint64_t *gpa);

/* Read as the processor reads descriptors and what it pushed: with supervisor rights, whatever the CPL. */
enum outcome system_read(struct completion *c, uint64_t linear, void *to, size_t n);

/* ---- descriptors (descriptors.c) ---- */

/* A gate of the IDT. `valid`: within the table's limit and of a type that leads somewhere in this mode. */
struct gate {
    uint64_t entry; /* offset in the segment `selector` names */
    uint16_t selector;
    uint8_t type, dpl;
    bool present, valid;
};
enum gate_type {
    GATE_TASK = 5,
    GATE_INTERRUPT_16 = 6,
    GATE_TRAP_16 = 7,
    GATE_INTERRUPT = 14,
    GATE_TRAP = 15,
};

/* The descriptor that a selector names; *found is false for the null selector and beyond the table. */
enum outcome descriptor_read(struct completion *c, uint16_t selector, uint64_t *descriptor, bool *found);

/* What a segment register holds after loading it. */
struct kvm_segment descriptor_segment(uint16_t selector, uint64_t descriptor);

/* Set the accessed flag, in the table and in *segment. */
enum outcome descriptor_mark_accessed(struct completion *c, struct kvm_segment *segment);

enum outcome gate_read(struct completion *c, uint8_t vector, struct gate *gate);

/* ---- the ModRM operand (operands.c) ---- */

/* The memory operand's linear address; segment limits and canonical form checked for `size` bytes. */
enum outcome operand_linear(struct completion *c, size_t size, enum access access, uint64_t *linear);

enum outcome operand_span(struct completion *c, size_t size, enum access access, struct span *span);

/* The r/m operand, in a register or in memory. COMPLETE_DONE or why not. */
enum outcome rm_read(struct completion *c, unsigned size, uint64_t *value);
enum outcome rm_write(struct completion *c, unsigned size, uint64_t value);

/* ---- what instructions do ---- */

typedef enum outcome completer(struct completion *c);

/* integer.c */
completer complete_popcnt, complete_lzcnt, complete_tzcnt, complete_andn, complete_bextr, complete_bls,
    complete_bzhi, complete_pdep, complete_pext, complete_mulx, complete_rorx, complete_shiftx, complete_adcx,
    complete_adox, complete_movbe_load, complete_movbe_store, complete_crc32, complete_cmpxchg8b16b,
    complete_rdrand;

/* system.c */
completer complete_nop, complete_memory_nop, complete_undefined, complete_clac, complete_stac, complete_cld,
    complete_push, complete_invpcid, complete_xgetbv, complete_fsgsbase, complete_rdpid, complete_rdtscp,
    complete_segment_query, complete_idle_hint;

/* transfers.c */
completer complete_int3, complete_int, complete_int1, complete_into, complete_iret, complete_retf;

/* IRET with operands of `size` bytes: COMPLETE_JUMPED, or why not. */
enum outcome interrupt_return(struct completion *c, unsigned size);

/* fpu.c */
void xsave_layout_init(struct xsave_layout *layout);
completer complete_x87_control, complete_fwait, complete_mxcsr, complete_xsave, complete_xrstor;

/* x87.c */
completer complete_x87;

/* ---- which instruction is which (table.c) ---- */

/* Decode `n` bytes found at RIP and complete them. On UNKNOWN the guest has not been touched. */
enum outcome complete(struct completion *c, const uint8_t *bytes, size_t n);

/* The table, for its test. */
enum { NP = 0, ANY_PREFIX = 1, ANY = 8 };
enum form {
    LEGACY = 0,
    VEX = 1,         /* encoded with VEX, L = 0 */
    RM_REGISTER = 2, /* r/m must be a register */
    RM_MEMORY = 4,   /* r/m must be in memory */
    LOCKABLE = 8,    /* LOCK is not #UD */
    W1 = 16,         /* REX.W or VEX.W must be set */
    ELSE_UD = 32,    /* r/m of the other kind, or L = 1, is #UD */
};
struct instruction {
    uint8_t map, opcode, mask, prefix, extension, rm, form;
    uint16_t feature; /* enum feature */
    completer *complete;
};
extern const struct instruction instructions[];
extern const size_t n_instructions;

#endif
