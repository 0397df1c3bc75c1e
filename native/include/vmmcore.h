/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmmcore: the native half of pyvmm, and its manual.
 *
 * Everything Python may call is declared here with its contract; nothing else crosses the boundary. The library
 * is plain C11, knows no Python, and calls up only through (function, opaque) pairs given to it. Two machines in
 * one process share nothing but the kick signal's empty handler.
 *
 * Order of calls
 *   vmm_vm_create -> vmm_vm_add_memory -> vmm_bus_attach ... -> vmm_vcpu_create -> set CPUID, registers
 *   -> vmm_vcpu_run on one thread per vCPU -> vmm_vm_stop -> every vmm_vcpu_run has returned -> vmm_vm_destroy
 *
 * Returns
 *   Functions of type int answer 0 (or a documented non-negative number) for success and -errno for failure;
 *   vmm_error_text() then says, for the calling thread, what was being attempted. Pointers returned belong to
 *   the library unless the contract says otherwise.
 *
 * Threads
 *   Unless stated otherwise a function may be called from any thread. A vCPU is run by one thread at a time.
 *   Device ops are called on the vCPU's thread, outside any lock of the library, by several vCPUs at once.
 */
#ifndef VMMCORE_H
#define VMMCORE_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* ---- errors ------------------------------------------------------------------------------------------------ */

/* What the last failing call on this thread was doing, e.g. "KVM_CREATE_VM". Never NULL; valid until the next. */
const char *vmm_error_text(void);

/*
 * Where the -errno that the last failing call on this thread returned comes from: the same number is the host's answer
 * to a system call in one case (-ENOSPC: a full disk) and the library's own refusal in another (-ENOSPC: a limit).
 * UNTOLD: that call returned another number, and its text is not about `code`.
 */
enum vmm_error_source { VMM_ERROR_UNTOLD = 0, VMM_ERROR_REFUSED = 1, VMM_ERROR_HOST = 2 };
int vmm_error_source(int code);

/* ---- the virtual machine ----------------------------------------------------------------------------------- */

typedef struct vmm_vm vmm_vm;
typedef struct vmm_vcpu vmm_vcpu;

/* What KVM models. It is there from the first vmm_vcpu_create on; a line driven before leads nowhere. */
enum vmm_vm_flags {
    VMM_VM_IRQCHIP = 1, /* in-kernel PIC, I/O APIC and local APICs */
    VMM_VM_PIT = 2,     /* in-kernel i8254 and port 0x61 (needs VMM_VM_IRQCHIP) */
};

/*
 * Open `kvm_path` ("/dev/kvm"), check that it speaks KVM API 12, create a machine.
 * -ENOENT, -EACCES, -ENODEV, -EBUSY ...: from open; -EPROTO: another API version; else the ioctl's error.
 * *out is to be given to vmm_vm_destroy.
 */
int vmm_vm_create(const char *kvm_path, uint32_t flags, vmm_vm **out);

/* Free everything the machine owns: vCPUs, memory, lines, bus. No vmm_vcpu_run may be in progress. NULL is fine. */
void vmm_vm_destroy(vmm_vm *vm);

/* KVM_CHECK_EXTENSION on the machine: 0 when absent, else KVM's number. */
int vmm_vm_check_extension(vmm_vm *vm, uint32_t capability);

/* KVM_ENABLE_CAP with four arguments. */
int vmm_vm_enable_cap(vmm_vm *vm, uint32_t capability, uint64_t arg0, uint64_t arg1, uint64_t arg2,
                      uint64_t arg3);

/*
 * `say` is called, from whatever thread it happens on, when a device has something to tell a person: the guest broke
 * a rule, a disk answers with errors, a network peer went away. Set it before the first run.
 */
void vmm_vm_on_message(vmm_vm *vm, void (*say)(void *opaque, const char *text), void *opaque);

/* ---- guest memory ------------------------------------------------------------------------------------------ */

enum vmm_memory_flags {
    VMM_MEMORY_HUGE_2M = 1,   /* memfd from the 2 MiB huge page pool */
    VMM_MEMORY_DIRTY_LOG = 2, /* let KVM record which pages the guest writes */
    VMM_MEMORY_READONLY = 4,  /* guest writes exit as MMIO */
    VMM_MEMORY_PRIVATE = 8,   /* set by vmm_vm_add_memory_file and vmm_vm_freeze_memory */
};

/*
 * Create `size` bytes of guest RAM at guest-physical address `gpa`, on a memfd of its own, mapped once. Nothing is
 * touched: memory the guest never writes costs nothing. Both numbers are multiples of 4 KiB (2 MiB with HUGE_2M).
 * *host points at the first byte and stays valid until vmm_vm_destroy. At most 32 regions.
 * -EEXIST: overlaps a region; -EINVAL: unaligned, empty or wrapping; -ENOMEM; -ENOSPC: too many regions.
 */
int vmm_vm_add_memory(vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags, void **host, int *memfd);

/*
 * The same from the content of a file at `offset` (a multiple of 4 KiB), which is never written: a page is the file's
 * until the guest or a device writes it, and is read when it is first looked at. The file must not change from now on,
 * nor shrink (a page behind its end is SIGBUS). `fd` stays the caller's. No server in another process (a share) sees
 * such memory. -EINVAL: also for flags, which must be 0, and for a file that is too short.
 */
int vmm_vm_add_memory_file(vmm_vm *vm, uint64_t gpa, uint64_t size, int fd, uint64_t offset, uint32_t flags,
                           void **host);

/* The file behind a region of memory, in the order they were added; the library's. -EINVAL: there is none such. */
int vmm_vm_memory_fd(vmm_vm *vm, uint32_t region);

/*
 * Freeze all memory as it is into one file per region, for other machines to start from; this one goes on with private
 * pages over them. *fds, room for each region, are the library's, and written by nobody any more: so no other process
 * may have been given them. Not twice, nor where memory is from a file (-EALREADY), nor in huge pages (-ENOTSUP). The
 * machine is paused or does not run.
 */
int vmm_vm_freeze_memory(vmm_vm *vm, int *fds);

/* The pages of a region that are not all zeros, as a bitmap (vmmsnapshot.h); what was never touched is not touched now.
 * While the machine is paused. Answers how many. -EINVAL: no such region. */
int64_t vmm_vm_pages_in_use(vmm_vm *vm, uint32_t region, uint64_t *bitmap);

/* The only way from a guest-physical range to a host pointer: NULL unless one region holds all of it. */
void *vmm_vm_gpa(vmm_vm *vm, uint64_t gpa, uint64_t size);

/* ---- which pages change ------------------------------------------------------------------------------------ */

/*
 * A log of the pages of guest memory that were written: by the guest (KVM's dirty log), by devices, by host code that
 * says so. Any number at once, each with its own idea of what is clean. Another process that maps guest memory (a
 * share's server) is not seen. Open one while the machine is paused or not started.
 */
typedef struct vmm_dirty vmm_dirty;

/* Every page is clean in it from now on. -ENOMEM; else KVM's refusal to log. */
int vmm_dirty_open(vmm_vm *vm, vmm_dirty **out);
void vmm_dirty_close(vmm_dirty *log); /* before vmm_vm_destroy; NULL is fine */

/* Fetch what was written meanwhile. Answers how many pages are dirty in this log now. */
int64_t vmm_dirty_collect(vmm_dirty *log);

/*
 * Move a region's bitmap (bit n of word n / 64: its n-th page of 4 KiB) out of the log, which has it clean from now
 * on; nothing is fetched. Answers the pages set. -EINVAL: no such region; -EMSGSIZE: `words` is not its size.
 */
int64_t vmm_dirty_take(vmm_dirty *log, uint32_t region, uint64_t *bitmap, size_t words);

/* The monitor has written guest memory; after the write. Devices in C say so by themselves. */
void vmm_vm_dirty(vmm_vm *vm, uint64_t gpa, uint64_t size);

/* ---- interrupt lines --------------------------------------------------------------------------------------- */

/* One wire. A device is given a line; whether an irqchip, a test or nothing is behind it is not its business. */
typedef struct vmm_line {
    void (*set)(void *opaque, uint32_t n, int level);
    void *opaque;
    uint32_t n;
} vmm_line;

/* The machine's wire `gsi` into the in-kernel irqchip. The machine's; valid until vmm_vm_destroy. NULL: gsi > 4095. */
const vmm_line *vmm_vm_line(vmm_vm *vm, uint32_t gsi);

/* Drive a line from Python. */
void vmm_line_set(const vmm_line *line, int level);

/* ---- the bus ----------------------------------------------------------------------------------------------- */

/*
 * A device is two functions over (offset, size); it knows no address. size is 1, 2, 4 or 8 (MMIO may also carry 3,
 * 5, 6 or 7 where a guest access was split at a page or range end: such accesses are delivered byte by byte).
 * A read's bits above size are ignored.
 */
typedef struct vmm_device_ops {
    uint64_t (*read)(void *opaque, uint64_t offset, uint32_t size);
    void (*write)(void *opaque, uint64_t offset, uint32_t size, uint64_t value);
} vmm_device_ops;

enum vmm_space { VMM_PIO = 0, VMM_MMIO = 1 };

/*
 * Claim [base, base+size) of a space for a device. `ops` and `opaque` must outlive the attachment; `tag` is the
 * caller's name for it (traces). Safe while vCPUs run. At most 4096 ranges a space.
 * -EEXIST: overlaps another range (or RAM); -EINVAL: empty, wrapping, or beyond 64 Ki ports; -ENOSPC.
 */
int vmm_bus_attach(vmm_vm *vm, int space, uint64_t base, uint64_t size, const vmm_device_ops *ops,
                   void *opaque, uint32_t tag);

/* Give a range up. On return no vCPU is inside its ops, except the calling one. -ENOENT: no range starts there. */
int vmm_bus_detach(vmm_vm *vm, int space, uint64_t base);

/* One access as a vCPU would make it, for tests and the monitor. Unclaimed bytes read as ones. size 1..8. */
uint64_t vmm_bus_read(vmm_vm *vm, int space, uint64_t address, uint32_t size);
void vmm_bus_write(vmm_vm *vm, int space, uint64_t address, uint32_t size, uint64_t value);

/* Accesses that nobody claimed, since creation. */
uint64_t vmm_bus_unclaimed(vmm_vm *vm);

/* ---- vCPUs ------------------------------------------------------------------------------------------------- */

int vmm_vcpu_create(vmm_vm *vm, uint32_t id, vmm_vcpu **out);

/* Layouts are KVM's (checked at compile time); they are for calls, never for files. */
typedef struct vmm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
} vmm_regs;

typedef struct vmm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
} vmm_segment;

typedef struct vmm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
} vmm_dtable;

typedef struct vmm_sregs {
    vmm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    vmm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t interrupt_bitmap[4];
} vmm_sregs;

typedef struct vmm_cpuid_entry {
    uint32_t function, index, flags, eax, ebx, ecx, edx, padding[3];
} vmm_cpuid_entry;

/*
 * A vCPU's registers and state, from here to vmm_vcpu_set_state, are of one that does not run (created, paused or
 * stopped), or are asked for on its own thread: -EBUSY otherwise.
 */
int vmm_vcpu_get_regs(vmm_vcpu *vcpu, vmm_regs *regs);
int vmm_vcpu_set_regs(vmm_vcpu *vcpu, const vmm_regs *regs);
int vmm_vcpu_get_sregs(vmm_vcpu *vcpu, vmm_sregs *sregs);
int vmm_vcpu_set_sregs(vmm_vcpu *vcpu, const vmm_sregs *sregs);

/* KVM_GET_SUPPORTED_CPUID: fills at most `max` entries, answers how many there are. -E2BIG: max is too small. */
int vmm_vm_supported_cpuid(vmm_vm *vm, vmm_cpuid_entry *entries, uint32_t max);
int vmm_vcpu_set_cpuid(vmm_vcpu *vcpu, const vmm_cpuid_entry *entries, uint32_t n);

/* n model-specific registers by index. Answers how many were taken: the first KVM refuses ends the list. */
int vmm_vcpu_get_msrs(vmm_vcpu *vcpu, const uint32_t *index, uint64_t *value, uint32_t n);
int vmm_vcpu_set_msrs(vmm_vcpu *vcpu, const uint32_t *index, const uint64_t *value, uint32_t n);

/* Linear to physical through the vCPU's page tables as KVM walks them. -EFAULT: not mapped. */
int vmm_vcpu_translate(vmm_vcpu *vcpu, uint64_t linear, uint64_t *gpa);

/* The other state KVM keeps, as KVM's own structs: sizes are checked, -EMSGSIZE when `size` is not KVM's. */
enum vmm_state {
    VMM_STATE_MP = 0,          /* vCPU: struct kvm_mp_state */
    VMM_STATE_EVENTS = 1,      /* vCPU: struct kvm_vcpu_events */
    VMM_STATE_DEBUGREGS = 2,   /* vCPU: struct kvm_debugregs */
    VMM_STATE_LAPIC = 3,       /* vCPU: struct kvm_lapic_state */
    VMM_STATE_FPU = 4,         /* vCPU: struct kvm_fpu */
    VMM_STATE_XSAVE = 5,       /* vCPU: struct kvm_xsave (4 KiB) */
    VMM_STATE_XCRS = 6,        /* vCPU: struct kvm_xcrs */
    VMM_STATE_REGS = 7,        /* vCPU: struct kvm_regs */
    VMM_STATE_SREGS = 8,       /* vCPU: struct kvm_sregs */
    VMM_STATE_CLOCK = 16,      /* machine: struct kvm_clock_data */
    VMM_STATE_PIT = 17,        /* machine: struct kvm_pit_state2 */
    VMM_STATE_PIC_MASTER = 18, /* machine: struct kvm_irqchip, chip 0 */
    VMM_STATE_PIC_SLAVE = 19,  /* machine: struct kvm_irqchip, chip 1 */
    VMM_STATE_IOAPIC = 20,     /* machine: struct kvm_irqchip, chip 2 */
};
int vmm_state_size(int kind);
int vmm_vcpu_get_state(vmm_vcpu *vcpu, int kind, void *buffer, size_t size);
int vmm_vcpu_set_state(vmm_vcpu *vcpu, int kind, const void *buffer, size_t size);
int vmm_vm_get_state(vmm_vm *vm, int kind, void *buffer, size_t size);

/* A file with KVM's own counters of a vCPU (KVM_GET_STATS_FD, Linux 5.14), the caller's to close. -errno. */
int vmm_vcpu_stats_fd(vmm_vcpu *vcpu);

/* ---- all of a machine's processors, as a value ---------------------------------------------------------------- */

/* Layouts of these are KVM's, too, where they have a counterpart. */
typedef struct vmm_events { /* struct kvm_vcpu_events */
    uint8_t exception_injected, exception_nr, exception_has_error_code, exception_pending;
    uint32_t exception_error_code;
    uint8_t interrupt_injected, interrupt_nr, interrupt_soft, interrupt_shadow;
    uint8_t nmi_injected, nmi_pending, nmi_masked, padding;
    uint32_t sipi_vector, flags;
    uint8_t smi_smm, smi_pending, smi_smm_inside_nmi, smi_latched_init;
    uint8_t triple_fault_pending, reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
} vmm_events;

typedef struct vmm_debug_registers { /* struct kvm_debugregs */
    uint64_t db[4], dr6, dr7, flags, reserved[9];
} vmm_debug_registers;

enum { VMM_STATE_MSRS_MAX = 512, VMM_UNLISTED_MSRS = 161 };
typedef struct vmm_msr {
    uint32_t index;
    uint64_t value;
} vmm_msr;

typedef struct vmm_vcpu_state {
    vmm_regs regs;
    vmm_sregs sregs;
    vmm_events events;
    vmm_debug_registers debug;
    uint32_t mp_state; /* KVM_MP_STATE_... */
    uint32_t tsc_khz;
    uint64_t tsc; /* as if every vCPU's had been read at one moment */
    uint64_t tsc_deadline;
    uint64_t xcr0;
    uint8_t lapic[1024]; /* the register page (SDM vol. 3, table 10-1) */
    uint8_t xsave[4096]; /* standard format (SDM vol. 1, 13.4) */
    uint32_t n_msrs;
    vmm_msr msrs[VMM_STATE_MSRS_MAX];
} vmm_vcpu_state;

typedef struct vmm_pic { /* struct kvm_pic_state */
    uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
        auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask;
} vmm_pic;

typedef struct vmm_ioapic { /* struct kvm_ioapic_state */
    uint64_t base_address;
    uint32_t select, id, irr, padding;
    uint64_t redirection[24];
} vmm_ioapic;

typedef struct vmm_pit_channel { /* struct kvm_pit_channel_state */
    uint32_t count;
    uint16_t latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd,
        gate;
    int64_t count_load_time;
} vmm_pit_channel;

typedef struct vmm_pit { /* struct kvm_pit_state2 */
    vmm_pit_channel channels[3];
    uint32_t flags, reserved[9];
} vmm_pit;

typedef struct vmm_chips_state {
    uint8_t has_irqchip, has_pit;
    vmm_pic pic[2];
    vmm_ioapic ioapic;
    vmm_pit pit;
    uint64_t clock;    /* kvmclock, ns */
    uint64_t realtime; /* the host's clock at that moment, ns since 1970 */
} vmm_chips_state;

/*
 * Everything KVM keeps of all vCPUs (in the order they were created; `vcpus` has room for them) and of its chips.
 * The machine is paused or does not run. Time stands still in what was saved: a guest that is loaded goes on with the
 * TSC and the kvmclock it was saved with; `ahead`: with what they would be by now, if they had gone on with the host's
 * clock (they never go back). All vCPUs' TSCs are set as of one moment, and agree as they did. load answers -EINVAL when
 * KVM refuses a part; vmm_error_text names it, and the machine is then of no use but to be loaded again.
 */
int vmm_vm_save(vmm_vm *vm, vmm_vcpu_state *vcpus, vmm_chips_state *chips);
int vmm_vm_load(vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips, int ahead);

/*
 * The MSRs that are saved, as far as a vCPU has them: KVM_GET_MSR_INDEX_LIST, and VMM_UNLISTED_MSRS that KVM leaves out
 * of it. Answers how many; one may be there twice. -E2BIG: more than max.
 */
int vmm_vm_saved_msrs(vmm_vm *vm, uint32_t *indices, uint32_t max);

/* ---- checkpoints and roll-back --------------------------------------------------------------------------------- */

/*
 * A copy of guest memory, and what vmm_vm_save gives. Rolling back copies the pages that were written since the
 * checkpoint was made or last rolled back to. All of it on a machine that is paused or does not run; devices are the
 * caller's. Any number at once.
 */
typedef struct vmm_checkpoint vmm_checkpoint;
int vmm_checkpoint_create(vmm_vm *vm, vmm_checkpoint **out);
void vmm_checkpoint_destroy(vmm_checkpoint *checkpoint); /* before vmm_vm_destroy; NULL is fine */

/* Memory. Answers how many pages were copied. */
int64_t vmm_checkpoint_restore_memory(vmm_checkpoint *checkpoint);
/* vCPUs and chips; after the devices, which drive the lines of the latter. */
int vmm_checkpoint_restore_processors(vmm_checkpoint *checkpoint);

/* ---- running ----------------------------------------------------------------------------------------------- */

/* Why a run ended. The first reason given to a machine is the one it keeps. */
enum vmm_stop_reason {
    VMM_STOP_NONE = 0,
    VMM_STOP_HOST = 1,          /* the monitor asked (code: the caller's) */
    VMM_STOP_POWEROFF = 2,      /* the guest powered off */
    VMM_STOP_RESET = 3,         /* the guest asked for a reset */
    VMM_STOP_DEBUG_EXIT = 4,    /* isa-debug-exit (code: the value written) */
    VMM_STOP_PANIC = 5,         /* pvpanic (code: the event bits) */
    VMM_STOP_TRIPLE_FAULT = 6,  /* KVM_EXIT_SHUTDOWN */
    VMM_STOP_EMULATION = 7,     /* KVM_EXIT_INTERNAL_ERROR (code: suberror) */
    VMM_STOP_FAIL_ENTRY = 8,    /* KVM_EXIT_FAIL_ENTRY (code: hardware reason) */
    VMM_STOP_HALT = 9,          /* halted, and nothing can wake it */
    VMM_STOP_SYSTEM_EVENT = 10, /* KVM_EXIT_SYSTEM_EVENT (code: type) */
    VMM_STOP_UNKNOWN_EXIT = 11, /* an exit reason the loop has no answer to (code: reason) */
    VMM_STOP_RUN_FAILED = 12,   /* KVM_RUN itself failed (code: errno) */
    VMM_STOP_CALLBACK = 13,     /* a device's own code failed (an exception waits above) */
    VMM_STOP_DEBUG = 14,        /* KVM_EXIT_DEBUG that nobody claimed (code: exception vector) */
    VMM_STOP_NO_BIOS = 16,      /* the guest called a BIOS, and there is none */
    VMM_STOP_MEMORY = 15,       /* guest memory that was still to come will not (vmmlazy.h) */
};

/*
 * Run a vCPU on the calling thread until the machine stops. All signals but the kick are blocked on that thread
 * from then on. A pause parks the thread inside this call. Answers the machine's vmm_stop_reason.
 */
int vmm_vcpu_run(vmm_vcpu *vcpu);

/* End the run: the first reason wins, every vCPU is kicked. Does not wait. Also for device ops. */
void vmm_vm_stop(vmm_vm *vm, int reason, uint64_t code);

/* What ended the run, which vCPU (UINT32_MAX: none in particular), and an eventfd that turns readable then. */
int vmm_vm_stop_reason(vmm_vm *vm, uint64_t *code, uint32_t *vcpu_id);
int vmm_vm_stop_fd(vmm_vm *vm);

/*
 * Pause: returns when no vCPU is inside KVM_RUN or a device op, with every exit's result written back, so that
 * registers and memory are consistent. Nests: resume as often. -EDEADLK: called from a device op on a vCPU thread.
 *
 * A device op may take as long as it likes. For callers that have to look up meanwhile (signals) vmm_vm_request_pause
 * asks only, and vmm_vm_await_pause waits at most `timeout_ms` (less than 0: as long as it takes): 1 once all stand, 0
 * not yet. A request that is given up is undone by vmm_vm_resume. -EBUSY: nothing was requested.
 */
int vmm_vm_pause(vmm_vm *vm);
int vmm_vm_request_pause(vmm_vm *vm);
int vmm_vm_await_pause(vmm_vm *vm, int timeout_ms);
int vmm_vm_resume(vmm_vm *vm);

/* Make the machine runnable again after every vmm_vcpu_run returned: forgets the stop reason. */
int vmm_vm_rearm(vmm_vm *vm);

/*
 * Stop with VMM_STOP_HALT once nothing can wake the machine: every vCPU is halted with interrupts off, and no NMI, SMI or
 * INIT can come. Found a second or more after the guest's last exit; where there is doubt, it runs on, as it does
 * while it is paused or a debugger is open. After each start; the I/O thread watches. -errno.
 * looks: how often the vCPUs were stopped, all together, to find out.
 */
int vmm_vm_watch_halt(vmm_vm *vm);
uint64_t vmm_vm_halt_looks(vmm_vm *vm);

/* ---- what happened ----------------------------------------------------------------------------------------- */

/* One exit, as kept in each vCPU's ring of the last 64. reason is KVM's exit reason. */
typedef struct vmm_exit_record {
    uint64_t address; /* port or guest-physical address; MSR index; else 0 */
    uint64_t value;   /* what was read or written */
    uint32_t reason;
    uint16_t size;   /* bytes of one access */
    uint8_t write;   /* 1: the guest wrote */
    uint8_t claimed; /* 1: a device answered */
    uint32_t count;  /* accesses in a string instruction, else 1 */
    uint32_t tag;    /* of the range that answered */
} vmm_exit_record;

/* Copies the newest exits, oldest first; answers how many. For a vCPU that is not running (else approximate). */
uint32_t vmm_vcpu_last_exits(vmm_vcpu *vcpu, vmm_exit_record *records, uint32_t max);

/* How many exits there were for vmm_vcpu_last_exits ever. Those that are recorded are the guest's own deeds. */
uint64_t vmm_vcpu_recorded(vmm_vcpu *vcpu);

/* Exits so far by KVM's exit reason; reasons above 63 are counted at 63. */
uint64_t vmm_vcpu_exit_count(vmm_vcpu *vcpu, uint32_t reason);

/* After VMM_STOP_EMULATION: the instruction bytes KVM reported. Answers how many (0..15). */
uint32_t vmm_vcpu_failed_instruction(vmm_vcpu *vcpu, uint8_t bytes[16]);

/* After VMM_STOP_EMULATION with another suberror than KVM_INTERNAL_ERROR_EMULATION (1): what KVM gave with it, whose
 * meaning is the suberror's. Answers how many (0..16). */
uint32_t vmm_vcpu_internal_error(vmm_vcpu *vcpu, uint64_t data[16]);

/* ---- host compatibility (native/compat; see docs/architecture.md) ------------------------------------------- */

enum vmm_compat_flags {
    VMM_COMPAT_COMPLETE = 1,  /* complete instructions KVM's emulator lacks */
    VMM_COMPAT_SYSCALL = 2,   /* repair SYSCALL that stays at CPL 3 */
    VMM_COMPAT_HYPERCALL = 8, /* KVM's emulator executes a hypercall for ever: have it raise #UD */
    VMM_COMPAT_SHADOW = 4,    /* KVM shadows page tables: have it forget them when memory was put back */
};

/* Switch remedies on, before the first run. -ENOTSUP names the capability this needs. */
int vmm_compat_enable(vmm_vm *vm, uint32_t flags);

/* How often: instructions completed; SYSCALL and INT n entries repaired; other #PF and #UD stepped over. */
typedef struct vmm_compat_stats {
    uint64_t completed, syscalls, faults;
} vmm_compat_stats;
void vmm_compat_get_stats(vmm_vm *vm, vmm_compat_stats *stats);

/* ---- console: bytes between a guest's serial device and whoever listens ------------------------------------- */

/*
 * Two queues. Output is a log: the guest appends, host readers keep positions of their own and nothing is lost
 * while they are within `log_limit` bytes of the end. A reader that must not lose bytes registers as the pump
 * (vmm_console_set_pump): then the guest sees its transmitter busy while the pump is `high_water` behind. Input is
 * bounded: send takes what there is room for.
 */
typedef struct vmm_console vmm_console;
int vmm_console_create(size_t input_limit, size_t log_limit, size_t high_water, vmm_console **out);
void vmm_console_destroy(vmm_console *console); /* after every device that uses it */

/* Host side. Input: bytes taken. */
size_t vmm_console_send(vmm_console *console, const uint8_t *bytes, size_t n);
size_t vmm_console_input_room(vmm_console *console);
/* Output: copy from absolute position *position; if that is gone already, *position moves to the oldest kept. */
size_t vmm_console_read(vmm_console *console, uint64_t *position, uint8_t *bytes, size_t n);
uint64_t vmm_console_end(vmm_console *console); /* bytes ever written by the guest */
/* Wait until end() > position, closed, or the time is up (ms; -1: for ever). 1: there is more; 0: there is not. */
int vmm_console_wait(vmm_console *console, uint64_t position, int timeout_ms);
/* The same for event loops: an eventfd that turns readable once end() > position, or closed. One waiter: each call
 * forgets the one before. */
int vmm_console_await(vmm_console *console, uint64_t position);
/* The pump's position: everything before it has been written out. UINT64_MAX: no pump. */
void vmm_console_set_pump(vmm_console *console, uint64_t position);
/* eventfds: readable when output arrived past the pump's position; when input room opened after send took less. */
int vmm_console_output_fd(vmm_console *console);
int vmm_console_room_fd(vmm_console *console);
/* No more output will come: waiters return. Until it is opened again, for a machine that goes on. */
void vmm_console_close(vmm_console *console);
void vmm_console_reopen(vmm_console *console);
int vmm_console_closed(vmm_console *console);

/* Device side. put: 0 when the pump is too far behind (try again after on_room). get: -1 when there is none. */
int vmm_console_put(vmm_console *console, uint8_t byte);
int vmm_console_get(vmm_console *console);
/* Called (from the host's threads, outside locks) when input arrives, and when put would succeed again. */
void vmm_console_listen(vmm_console *console, void (*on_input)(void *opaque), void (*on_room)(void *opaque),
                        void *opaque);

/* ---- uart: 16550A -------------------------------------------------------------------------------------------- */

typedef struct vmm_uart vmm_uart;
/* Eight byte-wide registers. line and console stay the caller's and outlive the uart. */
int vmm_uart_create(const vmm_line *line, vmm_console *console, vmm_uart **out);
void vmm_uart_destroy(vmm_uart *uart);
void vmm_uart_reset(vmm_uart *uart);
const vmm_device_ops *vmm_uart_ops(void); /* opaque is the vmm_uart */

/* Everything a 16550A remembers, as plain numbers. */
typedef struct vmm_uart_state {
    uint8_t ier, iir, fcr, lcr, mcr, lsr, msr, scr, dll, dlm;
    uint8_t thr_empty_pending, timeout_pending, rx_count, rx_trigger;
    uint8_t rx[16];
} vmm_uart_state;
void vmm_uart_save(vmm_uart *uart, vmm_uart_state *state);
int vmm_uart_load(vmm_uart *uart, const vmm_uart_state *state); /* -EINVAL: not a state a uart can be in */

/* cdef: end */

#endif
