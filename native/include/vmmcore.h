/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmmcore: the native half of pyvmm, and its manual.
 *
 * Everything Python may call is declared in include/vmm, a header a subject, with its contract; nothing else crosses the boundary. The library
 * is plain C11, knows no Python, and calls up only through (function, opaque) pairs given to it. Two machines in
 * one process share nothing but the kick signal's empty handler.
 *
 * Order of calls
 *   vmm_vm_create -> vmm_vm_add_memory -> vmm_bus_attach ... -> vmm_vcpu_create -> set CPUID, registers
 *   -> vmm_vcpu_run on one thread per vCPU -> vmm_vm_stop -> every vmm_vcpu_run has returned -> vmm_vm_destroy
 *
 * Returns
 *   Functions of type int return 0 (or a documented non-negative number) for success and -errno for failure;
 *   vmm_error_text() then says, for the calling thread, what was being attempted. Pointers returned belong to
 *   the library unless the contract says otherwise.
 *
 * Threads
 *   Unless stated otherwise a function may be called from any thread. A vCPU is run by one thread at a time.
 *   Device ops are called on the vCPU's thread, outside any lock of the library, by several vCPUs at once.
 */
#ifndef VMMCORE_H
#define VMMCORE_H

#include "vmm/bus.h"
#include "vmm/checkpoint.h"
#include "vmm/compat.h"
#include "vmm/console.h"
#include "vmm/dirty.h"
#include "vmm/error.h"
#include "vmm/history.h"
#include "vmm/line.h"
#include "vmm/memory.h"
#include "vmm/run.h"
#include "vmm/state.h"
#include "vmm/uart.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

#endif
