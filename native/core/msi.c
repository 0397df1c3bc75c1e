/* SPDX-License-Identifier: Apache-2.0 */
#include "core/msi.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* What kvm_setup_default_irq_routing sets: I/O APIC inputs 0..23; lines 0..15 reach the 8259s as well. */
#define DEFAULT_ROUTES (VMM_MSI_FIRST_GSI + 16)
#define PIC_LINES 8

struct vmm_msi {
    struct vmm_vm *vm;
    pthread_mutex_t lock; /* innermost but for KVM's own */
    struct vmm_msi_vector **vectors;
    uint32_t n, next_gsi;
    struct kvm_irq_routing *table; /* room for the default routes and every vector */
    uint64_t updates;
};

int vmm_msi_create(struct vmm_vm *vm, struct vmm_msi **out)
{
    *out = calloc(1, sizeof(**out));
    if (!*out)
        return vmm_error_set(-ENOMEM, "no memory for interrupt routes");
    (*out)->vm = vm;
    (*out)->next_gsi = VMM_MSI_FIRST_GSI;
    pthread_mutex_init(&(*out)->lock, NULL);
    return 0;
}

void vmm_msi_destroy(struct vmm_msi *msi)
{
    if (!msi)
        return;
    pthread_mutex_destroy(&msi->lock);
    free(msi->vectors);
    free(msi->table);
    free(msi);
}

static int make_room(struct vmm_msi *msi)
{
    if (msi->next_gsi == VMM_MAX_LINES || msi->n + DEFAULT_ROUTES == VMM_MAX_LINES)
        return vmm_error_set(-ENOSPC, "more than %d interrupt routes", VMM_MAX_LINES);
    void *vectors = realloc(msi->vectors, (msi->n + 1) * sizeof(*msi->vectors));
    if (vectors)
        msi->vectors = vectors;
    void *table = realloc(msi->table, sizeof(*msi->table) +
                                          (DEFAULT_ROUTES + msi->n + 1) * sizeof(msi->table->entries[0]));
    if (table)
        msi->table = table;
    return vectors && table ? 0 : vmm_error_set(-ENOMEM, "no memory for interrupt routes");
}

int vmm_msi_open(struct vmm_msi *msi, struct vmm_msi_vector *vector)
{
    *vector = (struct vmm_msi_vector){.fd = -1};
    int rc = make_room(msi);
    if (rc < 0)
        return rc;
    vector->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (vector->fd < 0)
        return vmm_error_errno("eventfd of an interrupt");
    vector->gsi = msi->next_gsi++;
    msi->vectors[msi->n++] = vector;
    return 0;
}

void vmm_msi_close(struct vmm_msi *msi, struct vmm_msi_vector *vector)
{
    for (uint32_t i = 0; i < msi->n; i++)
        if (msi->vectors[i] == vector) {
            msi->vectors[i] = msi->vectors[--msi->n];
            break;
        }
    if (vector->fd >= 0)
        close(vector->fd); /* the irqfd, if there still is one, goes with it */
    vector->fd = -1;
}

static void add(struct kvm_irq_routing *table, struct kvm_irq_routing_entry entry)
{
    table->entries[table->nr++] = entry;
}

static void add_default_routes(struct kvm_irq_routing *table)
{
    for (uint32_t line = 0; line < VMM_MSI_FIRST_GSI; line++) {
        add(table, (struct kvm_irq_routing_entry){
                       .gsi = line,
                       .type = KVM_IRQ_ROUTING_IRQCHIP,
                       .u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = line},
                   });
        if (line >= 2 * PIC_LINES)
            continue;
        uint32_t chip = line < PIC_LINES ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
        add(table, (struct kvm_irq_routing_entry){
                       .gsi = line,
                       .type = KVM_IRQ_ROUTING_IRQCHIP,
                       .u.irqchip = {.irqchip = chip, .pin = line % PIC_LINES},
                   });
    }
}

static int give_table(struct vmm_msi *msi)
{
    struct kvm_irq_routing *table = msi->table;
    table->nr = table->flags = 0;
    add_default_routes(table);
    for (uint32_t i = 0; i < msi->n; i++) {
        const struct vmm_msi_vector *v = msi->vectors[i];
        if (v->routed)
            add(table, (struct kvm_irq_routing_entry){
                           .gsi = v->gsi,
                           .type = KVM_IRQ_ROUTING_MSI,
                           .u.msi = {.address_lo = (uint32_t)v->address,
                                     .address_hi = (uint32_t)(v->address >> 32),
                                     .data = v->data},
                       });
    }
    msi->updates++;
    return msi->vm->engine->ops->routing(msi->vm->engine, table);
}

/* Not earlier than the first route: KVM has irqfds only once the interrupt chips are there. */
static int attach(struct vmm_msi *msi, struct vmm_msi_vector *vector)
{
    struct vmm_engine *engine = msi->vm->engine;
    const int rc = vector->attached ? 0 : engine->ops->irqfd(engine, vector->fd, vector->gsi);
    vector->attached = rc == 0;
    return rc;
}

int vmm_msi_route(struct vmm_msi *msi, struct vmm_msi_vector *vector, uint64_t address, uint32_t data)
{
    pthread_mutex_lock(&msi->lock);
    int rc = 0;
    if (!vector->routed || vector->address != address || vector->data != data) {
        vector->routed = true;
        vector->address = address;
        vector->data = data;
        if (data >> 8 & 6) /* neither fixed nor lowest priority (Intel SDM 3A, 11.11.2) */
            atomic_store(&msi->vm->wakes_by_message, true);
        rc = give_table(msi);
        if (rc == 0)
            rc = attach(msi, vector);
        if (rc < 0)
            vector->routed = false; /* KVM may keep an older route: nothing signals it */
    }
    pthread_mutex_unlock(&msi->lock);
    return rc;
}

void vmm_msi_signal(const struct vmm_msi_vector *vector)
{
    if (vector->routed)
        eventfd_write(vector->fd, 1); /* fails only when 2^64 - 1 are waiting */
}

uint64_t vmm_msi_updates(struct vmm_msi *msi)
{
    pthread_mutex_lock(&msi->lock);
    uint64_t updates = msi->updates;
    pthread_mutex_unlock(&msi->lock);
    return updates;
}
