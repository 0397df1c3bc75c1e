/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio, as Python sees it: a device, its transport, its queues. A continuation of vmmcore.h, under the same rules.
 *
 * Order of calls
 *   vmm_<device>_create(vm, ...) or vmm_virtio_create -> vmm_virtio_mmio_create or vmm_virtio_pci_create
 *   -> run ... -> vmm_virtio_reset -> vmm_vm_destroy -> vmm_<transport>_destroy -> vmm_<device>_destroy
 */
#ifndef VMMVIRTIO_H
#define VMMVIRTIO_H

#include "vmmcore.h"

/* cdef: begin */

typedef struct vmm_virtio vmm_virtio;

/*
 * What a device does. Called with the device's lock held (it is recursive). start and stop come on a vCPU's
 * thread or the caller's, kick on the machine's I/O thread. Any may be NULL.
 */
typedef struct vmm_virtio_ops {
    void (*start)(void *opaque);                /* DRIVER_OK: features are agreed, queues are ready */
    void (*kick)(void *opaque, uint32_t queue); /* the driver offers buffers */
    void (*stop)(void *opaque);    /* reset or broken: after it, nothing of before touches guest memory */
    void (*quiesce)(void *opaque); /* finish or take back what is in flight; the rings then hold everything */
    /* The driver takes one queue back, after quiesce: what is remembered of its requests is void. */
    void (*forget)(void *opaque, uint32_t queue);
    /* The driver enables a queue while the device runs: one that it took back before. */
    void (*renew)(void *opaque, uint32_t queue);
    /* The driver wrote its configuration space: within config_size; the bytes are stored already. */
    void (*config)(void *opaque, uint32_t offset, uint32_t size);
    /* What the device remembers of its driver's requests and commands, in VMM_VIRTIO_OWN numbers. */
    void (*save)(void *opaque, uint64_t *own);
    int (*load)(void *opaque, const uint64_t *own); /* after start. -EINVAL: no such device remembers that */
    /* After a load, when the machine goes on: tell the driver what is not so any more (a link, a size). */
    void (*resumed)(void *opaque);
} vmm_virtio_ops;

/* A device whose model is the caller's (Python). Arguments as for vmm_virtio_init in native/virtio/virtio.h. */
int vmm_virtio_create(vmm_vm *vm, const vmm_virtio_ops *ops, void *opaque, uint32_t id, const char *name,
                      uint64_t features, uint32_t n_queues, const uint16_t *size_max, uint32_t config_size,
                      vmm_virtio **out);
void vmm_virtio_destroy(vmm_virtio *dev); /* only what vmm_virtio_create made */

/* Power-on state; nothing in flight afterwards. */
void vmm_virtio_reset(vmm_virtio *dev);

/* The name of the device in traces: the tag of its range on the bus. */
void vmm_virtio_set_tag(vmm_virtio *dev, uint32_t tag);

/* What a driver has made of it. */
typedef struct vmm_virtio_info {
    uint32_t id, n_queues, config_size, generation;
    uint64_t offered, agreed;
    uint8_t status;
    const char *name, *fault; /* fault: "" or why the device needs a reset */
} vmm_virtio_info;
void vmm_virtio_get_info(vmm_virtio *dev, vmm_virtio_info *info);

typedef struct vmm_queue_stats {
    uint64_t requests, bytes_out, bytes_in; /* chains taken; bytes read from and written to the guest */
    uint64_t doorbells, interrupts;
    uint16_t size, in_flight;
    uint8_t enabled;
} vmm_queue_stats;
int vmm_virtio_queue_stats(vmm_virtio *dev, uint32_t queue,
                           vmm_queue_stats *stats); /* -EINVAL: no such queue */

/* Configuration space, the monitor's side. -EINVAL: outside it. Writing raises the interrupt. */
int vmm_virtio_config_get(vmm_virtio *dev, uint32_t offset, void *bytes, uint32_t size);
int vmm_virtio_config_set(vmm_virtio *dev, uint32_t offset, const void *bytes, uint32_t size);

/* ---- the state of a device, of a machine that is paused ---- */

/* Nothing is in flight in a saved queue: the rings hold everything, and one position is the device's in both. */
typedef struct vmm_queue_state {
    uint64_t desc, driver, device; /* guest-physical */
    uint16_t size;
    uint16_t
        position; /* split: the index, free-running; packed: slot, wrap counter in bit 15; 0 if not enabled */
    uint8_t enabled;
} vmm_queue_state;

typedef struct vmm_virtio_state {
    uint64_t driver_features; /* agreed, once FEATURES_OK is in the status */
    uint32_t n_queues, config_size, generation;
    uint8_t status;
    char fault[160]; /* with NEEDS_RESET: why */
    uint8_t config[256];
    vmm_queue_state queues[64];
} vmm_virtio_state;

/*
 * Has the device finish or take back what is in flight, which may write guest memory and interrupt: save devices
 * before interrupt controllers, vCPUs and memory. -EBUSY: a queue's requests are held by somebody (a device in Python,
 * another process), and the text says which.
 */
int vmm_virtio_save(vmm_virtio *dev, vmm_virtio_state *state);

/*
 * Become that; what is in flight now is forgotten, and what waits in a ring is looked at when the machine goes on. Guest
 * memory is loaded after it, where something may be under way (a roll-back). A device that runs before and after keeps
 * its doorbells: no system call that waits. The state may come from anywhere: -EINVAL says what no such device can be
 * in, and nothing has changed. The driver is not told of anything, and the transport is loaded after it.
 */
int vmm_virtio_load(vmm_virtio *dev, const vmm_virtio_state *state);

/* The device's own numbers (ops->save and load), those it does not have 0. Load after vmm_virtio_load. */
enum { VMM_VIRTIO_OWN = 8 };
void vmm_virtio_save_own(vmm_virtio *dev, uint64_t *own);
int vmm_virtio_load_own(vmm_virtio *dev, const uint64_t *own);

/* ---- requests, for devices written in Python ---- */

typedef struct vmm_chain vmm_chain;
vmm_chain *vmm_chain_create(void);
void vmm_chain_destroy(vmm_chain *chain);
/* 1: *chain holds the next request; 0: none. A broken ring breaks the device, and returns 0. */
int vmm_virtio_take(vmm_virtio *dev, uint32_t queue, vmm_chain *chain);
uint64_t vmm_chain_size(const vmm_chain *chain, int in); /* bytes the device may read (in = 0) or write (1) */
size_t vmm_chain_get(const vmm_chain *chain, uint64_t at, void *to, size_t n);
size_t vmm_chain_put(const vmm_chain *chain, uint64_t at, const void *from, size_t n);
/* Answer it. The driver sees it, and its interrupt, at vmm_virtio_flush. */
void vmm_virtio_answer(vmm_virtio *dev, uint32_t queue, const vmm_chain *chain, uint32_t written);
/* 1: more requests wait (no doorbell will ring for them). */
int vmm_virtio_flush(vmm_virtio *dev, uint32_t queue);
/* Ring a queue's doorbell from this side: kick follows on the I/O thread. Any queue number is fine. */
void vmm_virtio_ring(vmm_virtio *dev, uint32_t queue);
/* The device's lock, for several calls that belong together. It is recursive; do not wait for anything under it. */
void vmm_virtio_hold(vmm_virtio *dev);
void vmm_virtio_release(vmm_virtio *dev);

/* ---- virtio-mmio, version 2 (virtio 1.2, 4.2) ---- */

typedef struct vmm_virtio_mmio vmm_virtio_mmio;
/* Registers for a range of 512 bytes or more; `line` is level-triggered. Attach ops with the transport as opaque at
 * `address`, which is where its ioeventfds go. */
int vmm_virtio_mmio_create(vmm_virtio *dev, uint64_t address, const vmm_line *line, vmm_virtio_mmio **out);
void vmm_virtio_mmio_destroy(vmm_virtio_mmio *transport);
const vmm_device_ops *vmm_virtio_mmio_ops(void);

/* What the transport adds to the state of its device. The line follows `isr`: load before the interrupt controllers. */
typedef struct vmm_virtio_mmio_state {
    uint32_t device_select, driver_select, queue_select, isr;
} vmm_virtio_mmio_state;
void vmm_virtio_mmio_save(vmm_virtio_mmio *transport, vmm_virtio_mmio_state *state);
int vmm_virtio_mmio_load(vmm_virtio_mmio *transport, const vmm_virtio_mmio_state *state); /* -EINVAL */

/* cdef: end */

#endif
