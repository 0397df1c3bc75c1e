/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Instructions in real mode against results and flags of the manual (Intel SDM vol. 2), for a KVM that emulates real
 * mode and for ones that run it: arithmetic, shifts, BCD, strings, stack, far transfers, segments, interrupts and what
 * real mode does not have. Written for this purpose; the image lies as low as those of other real-mode test programs.
 *
 * Command line:
 *   decimal=0   without DAA, AAA and AAS: KVM's emulator does not have them
 */
#include "guest.h"

enum { CF = 1, PF = 4, AF = 0x10, ZF = 0x40, SF = 0x80, IF = 0x200, DF = 0x400, OF = 0x800 };
enum { ARITHMETIC = CF | PF | AF | ZF | SF | OF, VECTOR_DE = 0, VECTOR_BP = 3, VECTOR_OF = 4, VECTOR_UD = 6 };
enum { SCRATCH = PORT_SERIAL + 7, FAR_SEGMENT = 0x1000 };

static struct registers {
    uint32_t eax, ebx, ecx, edx, esi, edi, flags;
} r;

extern volatile uint16_t caught_vector, caught_ip, caught_flags, caught_times, resume;
extern volatile uint16_t interrupt_vectors[32][2]; /* offset and segment of each, from address 0 on */
extern const char command_line[];
extern const char vector_stubs[], far_function[];

static uint32_t stack_before, stack_after;

/* Execute with r's registers and flags, and have both in r afterwards; the stack is where it was. */
#define RUN(assembly)                                                                                        \
    do {                                                                                                     \
        __asm__ volatile("pushl %6; popfl; movl %%esp, %7; " assembly                                        \
                         "; movl %%esp, %8; movl %7, %%esp; pushfl; cld; popl %6"                            \
                         : "+a"(r.eax), "+b"(r.ebx), "+c"(r.ecx), "+d"(r.edx), "+S"(r.esi), "+D"(r.edi),     \
                           "+m"(r.flags), "=m"(stack_before), "=m"(stack_after)                              \
                         :                                                                                   \
                         : "memory", "cc");                                                                  \
        if (stack_before != stack_after)                                                                     \
            guest_fail_eq(EXIT_CHECK, __FILE__, __LINE__, assembly, stack_before, stack_after);              \
    } while (0)

/* The same, of what raises an exception: on it goes behind the assembly, which is not to end. */
#define RUN_TRAPPED(assembly)                                                                                \
    do {                                                                                                     \
        caught_vector = 0xffff;                                                                              \
        __asm__ volatile("movw $9f, resume; " assembly "; 9: movw $0, resume"                                \
                         : "+a"(r.eax), "+b"(r.ebx), "+c"(r.ecx), "+d"(r.edx)                                \
                         :                                                                                   \
                         : "memory", "cc");                                                                  \
    } while (0)

static void set(uint32_t eax, uint32_t ebx, uint32_t flags)
{
    r = (struct registers){.eax = eax, .ebx = ebx, .flags = flags | 2};
}

/* eax op= ebx: the result, and the flags it leaves. */
#define BINARY(assembly, left, right, before, result, after)                                                 \
    BINARY_OF(assembly, left, right, before, result, after, ARITHMETIC)
#define BINARY_OF(assembly, left, right, before, result, after, mask)                                        \
    do {                                                                                                     \
        set(left, right, before);                                                                            \
        RUN(assembly);                                                                                       \
        same(assembly, r.eax, result, r.flags &(mask), after);                                               \
    } while (0)

static void same(const char *what, uint32_t value, uint32_t right, uint32_t flags, uint32_t right_flags)
{
    if (value != right || flags != right_flags)
        print("%s: %x, not %x; flags %x, not %x\n", what, value, right, flags, right_flags);
    CHECK(value == right && flags == right_flags);
}

static void check_arithmetic(void)
{
    BINARY("addb %%bl, %%al", 0x7f, 1, 0, 0x80, AF | SF | OF);
    BINARY("addw %%bx, %%ax", 0x1ffff, 1, 0, 0x10000, CF | PF | AF | ZF);
    BINARY("addl %%ebx, %%eax", 0xffffffff, 2, 0, 1, CF | AF);
    BINARY("adcw %%bx, %%ax", 0xfffe, 1, CF, 0, CF | PF | AF | ZF);
    BINARY("subb %%bl, %%al", 0x80, 1, 0, 0x7f, AF | OF);
    BINARY("subl %%ebx, %%eax", 1, 2, 0, 0xffffffff, CF | PF | AF | SF);
    BINARY("sbbw %%bx, %%ax", 5, 4, CF, 0, PF | ZF);
    BINARY("cmpw %%bx, %%ax", 4, 4, CF, 4, PF | ZF);
    BINARY("incw %%ax", 0x7fff, 0, CF, 0x8000, CF | PF | AF | SF | OF);
    BINARY("decl %%eax", 0, 0, CF, 0xffffffff, CF | PF | AF | SF);
    BINARY("negb %%al", 0x80, 0, 0, 0x80, CF | SF | OF);
    BINARY("notw %%ax", 0xff, 0, CF, 0xff00, CF);
    BINARY_OF("andw %%bx, %%ax", 0xf0f0, 0x8080, CF | OF, 0x8080, SF, ARITHMETIC & ~AF);
    BINARY_OF("orb %%bl, %%al", 3, 0xc, 0, 0xf, PF, ARITHMETIC & ~AF);
    BINARY_OF("xorl %%eax, %%eax", 77, 0, CF, 0, PF | ZF, ARITHMETIC & ~AF);
    BINARY_OF("testb %%bl, %%al", 0x81, 0x80, CF, 0x81, SF, ARITHMETIC & ~AF);
    BINARY("xaddw %%bx, %%ax", 1, 2, 0, 3, PF);
    CHECK_EQ(r.ebx, 1);
    BINARY("cmpxchgw %%bx, %%ax", 5, 9, 0, 9, PF | ZF);
    BINARY_OF("bswapl %%eax", 0x11223344, 0, 0, 0x44332211, 0, 0);
}

static void check_shifts(void)
{
    BINARY_OF("shlb $1, %%al", 0xc0, 0, 0, 0x80, CF | SF, CF | ZF | SF | OF);
    BINARY_OF("shrw $1, %%ax", 0x8001, 0, 0, 0x4000, CF | OF, CF | ZF | SF | OF);
    BINARY_OF("sarl $4, %%eax", 0x80000000, 0, 0, 0xf8000000, SF, CF | ZF | SF);
    BINARY_OF("rolw $4, %%ax", 0x1234, 0, 0, 0x2341, CF, CF);
    BINARY_OF("rorb $1, %%al", 1, 0, 0, 0x80, CF | OF, CF | OF);
    BINARY_OF("rclw $1, %%ax", 0x8000, 0, CF, 1, CF | OF, CF | OF);
    BINARY_OF("rcrl $1, %%eax", 1, 0, CF, 0x80000000, CF | OF, CF | OF);
    BINARY_OF("shldw $4, %%bx, %%ax", 0x1234, 0xabcd, 0, 0x234a, CF, CF | ZF | SF);
    BINARY_OF("shrdl $8, %%ebx, %%eax", 0x11223344, 0x55667788, 0, 0x88112233, SF, CF | ZF | SF);
    BINARY_OF("btw $3, %%ax", 8, 0, 0, 8, CF, CF);
    BINARY_OF("btsw %%bx, %%ax", 0, 17, CF, 2, 0, CF);
    BINARY_OF("btrl $31, %%eax", 0x80000001, 0, 0, 1, CF, CF);
    BINARY_OF("btcw $0, %%ax", 1, 0, 0, 0, CF, CF);
    BINARY_OF("bsfw %%bx, %%ax", 0, 0x50, 0, 4, 0, ZF);
    BINARY_OF("bsrl %%ebx, %%eax", 0, 0x50, 0, 6, 0, ZF);
    BINARY_OF("bsrl %%ebx, %%ecx", 7, 0, 0, 7, ZF, ZF);
}

static void check_multiplication(void)
{
    BINARY_OF("mulb %%bl", 0x80, 0x80, 0, 0x4000, CF | OF, CF | OF);
    BINARY_OF("imulb %%bl", 0xff, 2, 0, 0xfffe, 0, CF | OF);
    set(0xffff, 0xffff, 0);
    RUN("mulw %%bx");
    CHECK(r.eax == 1 && r.edx == 0xfffe);
    BINARY_OF("imulw $100, %%bx, %%ax", 0, 1000, 0, 0x86a0, CF | OF, CF | OF);
    BINARY_OF("imull %%ebx, %%eax", 0xfffffffe, 3, 0, 0xfffffffa, 0, CF | OF);
    set(0x0101, 0x10, 0);
    RUN("divb %%bl");
    CHECK_EQ(r.eax, 0x0110);
    set(0x0001, 7, 0);
    r.edx = 1;
    RUN("divw %%bx");
    CHECK(r.eax == 9362 && r.edx == 3);
    set(0xfffffff9, 2, 0);
    r.edx = 0xffffffff;
    RUN("idivl %%ebx");
    CHECK(r.eax == 0xfffffffd && r.edx == 0xffffffff);
    set(0x8000, 0, 0);
    RUN_TRAPPED("divb %%bl");
    CHECK(caught_vector == VECTOR_DE && r.eax == 0x8000);
    set(0x4000, 1, 0);
    RUN_TRAPPED("idivb %%bl"); /* the quotient does not fit */
    CHECK_EQ(caught_vector, VECTOR_DE);
}

static bool told(const char *word)
{
    const size_t n = strlen(word);
    for (const char *at = command_line; *at; at++)
        if (!memcmp(at, word, n))
            return true;
    return false;
}

static void check_decimal(void)
{
    if (!told("decimal=0")) {
        BINARY_OF("daa", 0x9a, 0, 0, 0, CF | PF | AF | ZF, CF | PF | AF | ZF);
        BINARY_OF("aaa", 0x000b, 0, 0, 0x101, CF | AF, CF | AF);
        BINARY_OF("aas", 0x02ff, 0, 0, 0x0109, CF | AF, CF | AF);
    }
    BINARY_OF("das", 0x0f, 0, AF, 9, AF, CF | AF);
    BINARY_OF("aam", 0x004f, 0, 0, 0x0709, 0, ZF | SF);
    BINARY_OF("aad", 0x0709, 0, 0, 0x004f, 0, ZF | SF);
    set(5, 0, 0);
    RUN_TRAPPED(".byte 0xd4, 0"); /* aam by 0 */
    CHECK_EQ(caught_vector, VECTOR_DE);
}

static void check_conversions(void)
{
    static uint8_t table[4] = {10, 11, 12, 13};
    BINARY_OF("cbtw", 0x80, 0, 0, 0xff80, 0, 0);
    BINARY_OF("cwtl", 0x8000, 0, 0, 0xffff8000, 0, 0);
    set(0x8000, 0, 0);
    RUN("cwtd");
    CHECK_EQ(r.edx, 0xffff);
    set(0x80000000, 0, 0);
    RUN("cltd");
    CHECK_EQ(r.edx, 0xffffffff);
    BINARY_OF("movzbw %%bl, %%ax", 0xffffffff, 0xfe, 0, 0xffff00fe, 0, 0);
    BINARY_OF("movsbl %%bl, %%eax", 0, 0xfe, 0, 0xfffffffe, 0, 0);
    BINARY_OF("movzwl %%bx, %%eax", 0xffffffff, 0x8000, 0, 0x8000, 0, 0);
    BINARY_OF("xlat", 2, (uint32_t)(uintptr_t)table, 0, 12, 0, 0);
    BINARY_OF("sahf", 0xd500, 0, 0, 0xd500, CF | PF | AF | ZF | SF, CF | PF | AF | ZF | SF);
    BINARY_OF("lahf", 0, 0, CF | SF, 0x8300, 0, 0);
    BINARY_OF(".byte 0xd6", 0, 0, CF, 0xff, 0, 0); /* salc */
    BINARY_OF("setc %%al; sets %%ah", 0x7777, 0, CF, 0x0001, 0, 0);
    BINARY_OF("cmovcw %%bx, %%ax", 1, 2, CF, 2, 0, 0);
    BINARY_OF("cmovzl %%ebx, %%eax", 1, 2, CF, 1, 0, 0);
    BINARY_OF("cmc", 0, 0, CF, 0, 0, CF);
    BINARY_OF("std", 0, 0, 0, 0, DF, DF);
}

static void check_stack(void)
{
    static uint16_t words[9];
    set(0x1234, 0x89abcdef, 0);
    RUN("mov %%esp, %%edi; pushw %%ax; pushl %%ebx; pushw $-2; mov %%esp, %%esi; popw %%dx; popl %%eax; popw "
        "%%cx");
    CHECK(r.edi - r.esi == 8 && (r.edx & 0xffff) == 0xfffe && r.eax == 0x89abcdef &&
          (r.ecx & 0xffff) == 0x1234);
    set(1, 2, 0);
    r.ecx = 3;
    r.edi = 7;
    RUN("pushaw; mov $0, %%ax; mov $0, %%bx; mov $0, %%di; popaw");
    CHECK(r.eax == 1 && r.ebx == 2 && r.ecx == 3 && r.edi == 7);
    RUN("pushal; mov $0, %%eax; mov $0, %%ecx; popal");
    CHECK(r.eax == 1 && r.ecx == 3);
    set(0, 0, CF | ZF);
    RUN("pushfw; popw %%ax");
    CHECK_EQ(r.eax & (CF | ZF | 2), CF | ZF | 2);
    set(0, 0, 0);
    RUN("pushl %%ebp; mov %%esp, %%esi; mov %%esp, %%ebp; enterw $16, $0; mov %%esp, %%edi; leavew; "
        "mov %%esp, %%ebx; popl %%ebp");
    CHECK(r.esi - r.edi == 18 && r.ebx == r.esi);
    set((uint32_t)(uintptr_t)words, 0, 0);
    RUN("pushw $0x55; popw 4(%%eax)"); /* 32-bit addresses in 16-bit code */
    CHECK_EQ(words[2], 0x55);
}

static void check_transfers(void)
{
    set(0, 0, 0);
    RUN("callw 1f; jmp 2f; 1: mov $7, %%ax; retw; 2:");
    CHECK_EQ(r.eax, 7);
    RUN("pushw $9; pushw %%cs; callw 1f; jmp 3f; 1: mov $8, %%ax; lretw $2; 3:");
    CHECK_EQ(r.eax, 8);
    set(0, (uint32_t)(uintptr_t)far_function, 0);
    RUN("pushw $0x4321; pushw %%cs; callw *%%bx");
    CHECK_EQ(r.eax, 0x4321);
    RUN("pushw $0x1111; lcallw $0, $far_function");
    CHECK_EQ(r.eax, 0x1111);
    r.ecx = 5;
    RUN("xor %%ax, %%ax; 1: inc %%ax; loopw 1b");
    CHECK(r.eax == 5 && !r.ecx);
    r.ecx = 5;
    RUN("xor %%ax, %%ax; 1: inc %%ax; cmp $3, %%ax; loopnew 1b");
    CHECK(r.eax == 3 && r.ecx == 2);
    r.ecx = 0;
    RUN("mov $1, %%ax; jcxz 1f; mov $2, %%ax; 1:");
    CHECK_EQ(r.eax & 0xffff, 1);
    r.ecx = 0x10000;
    RUN("mov $1, %%ax; jecxz 1f; mov $2, %%ax; 1:");
    CHECK_EQ(r.eax & 0xffff, 2);
    set(0, 0, CF);
    RUN("jc 1f; mov $1, %%al; 1: jnc 2f; mov $2, %%ah; 2:");
    CHECK_EQ(r.eax, 0x200);
}

static void check_strings(void)
{
    static char from[16] = "0123456789abcde", to[16];
    const uint32_t source = (uint32_t)(uintptr_t)from, target = (uint32_t)(uintptr_t)to;
    set(0, 0, 0);
    r.esi = source, r.edi = target, r.ecx = 8;
    RUN("rep movsb");
    CHECK(r.esi == source + 8 && r.edi == target + 8 && !r.ecx && !memcmp(to, "01234567", 8));
    r.esi = source + 14, r.edi = target + 14, r.ecx = 3, r.flags |= DF;
    RUN("rep movsw");
    CHECK(r.esi == source + 8 && !memcmp(to + 10, "abcde", 6));
    set('4', 0, 0);
    r.edi = source, r.ecx = 16;
    RUN("repne scasb");
    CHECK(r.edi == source + 5 && r.ecx == 11 && r.flags & ZF);
    set(0, 0, 0);
    r.esi = source, r.edi = target, r.ecx = 16;
    RUN("repe cmpsb");
    CHECK(r.ecx == 7 && !(r.flags & ZF)); /* the ninth byte was not copied */
    set(0x5a5a5a5a, 0, 0);
    r.edi = target, r.ecx = 3;
    RUN("rep stosl");
    CHECK(r.edi == target + 12 && to[11] == 0x5a && to[12] == 'c');
    r.esi = source + 1;
    RUN("lodsw");
    CHECK((r.eax & 0xffff) == ('2' << 8 | '1') && r.esi == source + 3);
    r.ecx = 0, r.edi = target;
    RUN("rep stosb");
    CHECK_EQ(r.edi, target);
}

static void check_segments(void)
{
    static struct {
        uint16_t offset, segment;
    } __attribute__((packed)) pointer = {0x10, FAR_SEGMENT};
    volatile uint8_t *linear = (uint8_t *)0xfff0; /* the same as FAR_SEGMENT - 1 : 0 */
    linear[0] = 0x3c;
    set((uint32_t)(uintptr_t)&pointer, 0, 0);
    RUN("pushw %%es; lesw (%%eax), %%bx; mov %%es, %%cx; popw %%es");
    CHECK(r.ebx == 0x10 && (r.ecx & 0xffff) == FAR_SEGMENT);
    set(0, FAR_SEGMENT - 1, 0);
    RUN("mov %%bx, %%fs; movb %%fs:0, %%al; movb $0x4d, %%fs:1; mov %%ax, %%bx; xor %%cx, %%cx; mov %%cx, "
        "%%fs");
    CHECK(r.eax == 0x3c && linear[1] == 0x4d);
    set(0, FAR_SEGMENT - 1, 0);
    r.esi = 1;
    RUN("pushw %%ds; mov %%bx, %%gs; gs lodsb; xor %%cx, %%cx; mov %%cx, %%gs; popw %%ds");
    CHECK_EQ(r.eax, 0x4d);
    set(0, (FAR_SEGMENT - 1) << 4, 0);
    r.ecx = 1;
    RUN("movb (%%ebx, %%ecx, 1), %%al");
    CHECK_EQ(r.eax, 0x4d);
    RUN("lea -1(%%bx), %%ax");
    CHECK_EQ(r.eax & 0xffff, 0xffef);
    RUN("mov %%sp, %%dx; pushw %%ss; popw %%ss; mov %%sp, %%cx");
    CHECK_EQ(r.ecx & 0xffff, r.edx & 0xffff);
}

static void check_interrupts(void)
{
    const uint16_t times = caught_times;
    set(0, 0, CF | IF);
    RUN("int $0x10");
    CHECK(caught_times == (uint16_t)(times + 1) && caught_vector == 0x10 && r.flags & CF);
    CHECK_EQ(caught_flags & (CF | IF), CF | IF);
    CHECK_EQ(r.flags & IF, IF); /* IRET brought it back */
    set(0, 0, 0);
    RUN("int3");
    CHECK_EQ(caught_vector, VECTOR_BP);
    set(0, 0, 0);
    RUN("into");
    CHECK_EQ(caught_vector, VECTOR_BP);
    set(0, 0, OF);
    RUN("into");
    CHECK_EQ(caught_vector, VECTOR_OF);
    set(0, 0, 0);
    RUN_TRAPPED("ud2");
    CHECK_EQ(caught_vector, VECTOR_UD);
    RUN_TRAPPED("sldt %%ax"); /* real mode has neither (SDM vol. 2) */
    CHECK_EQ(caught_vector, VECTOR_UD);
    RUN_TRAPPED("str %%ax");
    CHECK_EQ(caught_vector, VECTOR_UD);
    RUN("pushfw; pushw %%cs; pushw $1f; iretw; ud2; 1: movb $3, %%al");
    CHECK_EQ(r.eax & 0xff, 3);
}

static void check_system(void)
{
    static struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) table;
    set((uint32_t)(uintptr_t)&table, 0, 0);
    RUN("sidt (%%eax)");
    CHECK(table.limit == 0x3ff && !table.base);
    RUN("sgdt (%%eax)");
    CHECK_EQ(table.limit, 23);
    RUN("smsw %%bx");
    CHECK_EQ(r.ebx & 1, 0);
    RUN("mov %%cr0, %%ecx");
    CHECK_EQ(r.ecx & 1, 0);
    set(0, 0, 0);
    RUN("cpuid");
    CHECK(r.eax >= 1 && r.ebx);
    set(0x5a, 0, 0);
    r.edx = SCRATCH;
    RUN("outb %%al, %%dx; xor %%al, %%al; inb %%dx, %%al");
    CHECK_EQ(r.eax, 0x5a);
    static uint8_t bytes[2] = {0x11, 0x22}, back[2];
    r.esi = (uint32_t)(uintptr_t)bytes, r.ecx = 2;
    RUN("rep outsb");
    r.edi = (uint32_t)(uintptr_t)back, r.ecx = 2;
    RUN("rep insb");
    CHECK(back[0] == 0x22 && back[1] == 0x22 && !r.ecx);
    set(0, 0, 0);
    RUN("fninit; fnstsw %%ax");
    CHECK_EQ(r.eax & 0xffff, 0);
}

void guest_main(void)
{
    outb(0x21, 0xff); /* no interrupt of a device: nothing has told the PICs which vectors are theirs */
    outb(0xa1, 0xff);
    for (unsigned vector = 0; vector < 32; vector++) {
        interrupt_vectors[vector][0] = (uint16_t)((uintptr_t)vector_stubs + vector * 8);
        interrupt_vectors[vector][1] = 0;
    }
    check_arithmetic();
    check_shifts();
    check_multiplication();
    check_decimal();
    check_conversions();
    check_stack();
    check_transfers();
    check_strings();
    check_segments();
    check_interrupts();
    check_system();
    print("real mode: %u interrupts\n", caught_times);
}
