/* SPDX-License-Identifier: Apache-2.0 */
/* What KVM makes of PCI: MSI-X messages arrive in a local APIC, wires keep theirs, doorbells are ioeventfds. */
#include "pci_rig.h"

#include "core/eventfd.h"

#include <errno.h>
#include <time.h>

#define MESSAGE_ADDRESS 0xfee00000ull /* to the local APIC with id 0, edge-triggered */
#define SPURIOUS 0xf0
#define IRR 0x200

static vmm_vcpu *vcpu;

static uint32_t *apic_register(struct kvm_lapic_state *apic, unsigned offset)
{
    return (uint32_t *)(void *)(apic->regs + offset);
}

/* A machine with interrupt chips, one vCPU whose local APIC takes interrupts, and room for rings. */
static vmm_vm *machine_with_kvm(void)
{
    vmm_vm *vm;
    void *host;
    int memfd;
    struct kvm_lapic_state apic;
    if (access("/dev/kvm", R_OK | W_OK) < 0) {
        printf("/dev/kvm is missing or may not be opened\n");
        exit(77);
    }
    CHECK_EQUAL(vmm_vm_create("/dev/kvm", VMM_VM_IRQCHIP, &vm), 0);
    CHECK_EQUAL(vmm_vm_add_memory(vm, 0, 0x10000, 0, &host, &memfd), 0);
    CHECK_EQUAL(vmm_vcpu_create(vm, 0, &vcpu), 0);
    CHECK_EQUAL(vmm_vcpu_get_state(vcpu, VMM_STATE_LAPIC, &apic, sizeof(apic)), 0);
    *apic_register(&apic, SPURIOUS) = 0x1ff;
    CHECK_EQUAL(vmm_vcpu_set_state(vcpu, VMM_STATE_LAPIC, &apic, sizeof(apic)), 0);
    return vm;
}

static bool requested(unsigned interrupt)
{
    struct kvm_lapic_state apic;
    CHECK_EQUAL(vmm_vcpu_get_state(vcpu, VMM_STATE_LAPIC, &apic, sizeof(apic)), 0);
    return *apic_register(&apic, IRR + interrupt / 32 * 16) >> interrupt % 32 & 1;
}

/* KVM may deliver from a work queue of its own. */
static bool arrives(unsigned interrupt)
{
    for (int i = 0; i < 1000; i++) {
        if (requested(interrupt))
            return true;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return false;
}

static bool stays_away(unsigned interrupt)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    return !requested(interrupt);
}

static void set_message(rig *r, unsigned vector, uint64_t address, uint32_t data)
{
    out(r, TABLE + vector * 16 + 12, 4, 1);
    out(r, TABLE + vector * 16, 8, address);
    out(r, TABLE + vector * 16 + 8, 4, data);
    out(r, TABLE + vector * 16 + 12, 4, 0);
}

/* Queue 0 on vector 1, which sends interrupt 0x41. */
static void drive_with_msix(rig *r)
{
    drive(r);
    set_config(r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    out(r, QUEUE_VECTOR, 2, 1);
    set_message(r, 1, MESSAGE_ADDRESS, 0x41);
}

static uint64_t updates(rig *r)
{
    return vmm_msi_updates(vmm_pci_msi(r->host));
}

static void a_used_buffer_interrupts_with_the_message_of_its_vector(void)
{
    rig r;
    set_up(&r, machine_with_kvm());
    drive_with_msix(&r);
    CHECK(stays_away(0x41));
    use_buffer(&r, 0);
    CHECK(arrives(0x41));
    set_message(&r, 1, MESSAGE_ADDRESS, 0x5a);
    CHECK(!requested(0x5a));
    use_buffer(&r, 0);
    CHECK(arrives(0x5a));
    tear_down(&r);
}

static void what_happened_under_a_mask_arrives_when_it_is_lifted(void)
{
    rig r;
    set_up(&r, machine_with_kvm());
    drive_with_msix(&r);
    out(&r, TABLE + 16 + 12, 4, 1);
    use_buffer(&r, 0);
    CHECK(stays_away(0x41));
    out(&r, TABLE + 16 + 12, 4, 0);
    CHECK(arrives(0x41));
    set_message(&r, 1, MESSAGE_ADDRESS, 0x42);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE | MSIX_MASK);
    use_buffer(&r, 0);
    CHECK(stays_away(0x42));
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK(arrives(0x42));
    tear_down(&r);
}

static void the_routing_table_is_given_to_kvm_only_for_a_new_message(void)
{
    rig r;
    set_up(&r, machine_with_kvm());
    drive(&r);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(updates(&r), 0); /* every vector is masked */
    set_message(&r, 1, MESSAGE_ADDRESS, 0x41);
    CHECK_EQUAL(updates(&r), 1);
    for (int i = 0; i < 10; i++)
        set_message(&r, 1, MESSAGE_ADDRESS, 0x41);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE | MSIX_MASK);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(updates(&r), 1);
    set_message(&r, 1, MESSAGE_ADDRESS, 0x42);
    CHECK_EQUAL(updates(&r), 2);
    tear_down(&r);
}

static void a_message_that_kvm_refuses_makes_its_vector_mute_and_no_other(void)
{
    rig r;
    vmm_vm *vm = machine_with_kvm();
    /* With 32-bit destinations the low byte of the upper address half is reserved, and KVM says so. */
    if (vmm_vm_enable_cap(vm, KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS, 0, 0, 0) < 0)
        printf("no KVM_CAP_X2APIC_API: KVM refuses no message here\n");
    set_up(&r, vm);
    drive_with_msix(&r);
    set_message(&r, 0, MESSAGE_ADDRESS | 0x1ull << 32, 0x43);
    out(&r, 16, 2, 0);
    use_buffer(&r, 0);
    CHECK(arrives(0x41));
    set_message(&r, 2, MESSAGE_ADDRESS, 0x44); /* the table still goes through */
    out(&r, QUEUE_VECTOR, 2, 2);
    use_buffer(&r, 0);
    CHECK(arrives(0x44));
    change_configuration(&r);
    CHECK(stays_away(0x43));
    set_message(&r, 0, MESSAGE_ADDRESS, 0x45);
    change_configuration(&r);
    CHECK(arrives(0x45));
    tear_down(&r);
}

static void wires_still_reach_the_interrupt_chips_beside_messages(void)
{
    rig r;
    struct kvm_irqchip chip;
    vmm_vm *vm = machine_with_kvm();
    set_up(&r, vm);
    drive(&r);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    set_message(&r, 1, MESSAGE_ADDRESS, 0x41);
    set_config(&r, 1, MSIX_CONTROL, 2, 0);
    use_buffer(&r, 0); /* on the pin: slot 1 is wired to 17 */
    vmm_line_set(vmm_vm_line(vm, 3), 1);
    vmm_line_set(vmm_vm_line(vm, 12), 1);
    CHECK_EQUAL(vmm_vm_get_state(vm, VMM_STATE_IOAPIC, &chip, sizeof(chip)), 0);
    CHECK_EQUAL(chip.chip.ioapic.irr, 1 << 17 | 1 << 12 | 1 << ISA_IRQ | 1 << 3);
    CHECK_EQUAL(vmm_vm_get_state(vm, VMM_STATE_PIC_MASTER, &chip, sizeof(chip)), 0);
    CHECK(chip.chip.pic.irr & 1 << 3);
    CHECK_EQUAL(vmm_vm_get_state(vm, VMM_STATE_PIC_SLAVE, &chip, sizeof(chip)), 0);
    CHECK_EQUAL(chip.chip.pic.irr, 1 << (12 - 8) | 1 << (ISA_IRQ - 8));
    tear_down(&r);
}

/* KVM refuses a second ioeventfd in one place: whether the transport has one there. */
static bool has_doorbell(rig *r, uint64_t address)
{
    int rc = vmm_vm_ioeventfd(r->vm, VMM_MMIO, address, 0, false, 0, r->kicked, true);
    CHECK(rc == 0 || rc == -EEXIST);
    if (rc == 0)
        CHECK_EQUAL(vmm_vm_ioeventfd(r->vm, VMM_MMIO, address, 0, false, 0, r->kicked, false), 0);
    return rc == -EEXIST;
}

static void doorbells_are_where_the_bar_is_while_the_driver_is_ready(void)
{
    rig r;
    const uint64_t there = WINDOW + NOTIFY, elsewhere = WINDOW + 0x100000 + NOTIFY;
    set_up(&r, machine_with_kvm());
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    CHECK(!has_doorbell(&r, there));
    drive(&r);
    CHECK(has_doorbell(&r, there) && has_doorbell(&r, there + 4) && !has_doorbell(&r, there + 8));
    set_config(&r, 1, VMM_PCI_BAR0, 4, WINDOW + 0x100000);
    CHECK(!has_doorbell(&r, there) && has_doorbell(&r, elsewhere) && has_doorbell(&r, elsewhere + 4));
    set_config(&r, 1, VMM_PCI_COMMAND, 2, 0);
    CHECK(!has_doorbell(&r, elsewhere));
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    CHECK(has_doorbell(&r, elsewhere));
    vmm_bus_write(r.vm, VMM_MMIO, WINDOW + 0x100000 + STATUS, 1, 0);
    CHECK(!has_doorbell(&r, elsewhere) && !has_doorbell(&r, elsewhere + 4));
    tear_down(&r);
}

static void ioeventfds_that_cannot_be_are_refused(void)
{
    vmm_vm *vm = machine_with_kvm();
    int fd = eventfd(0, 0);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, 2, 0x100, 2, false, 0, fd, true), -EINVAL);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 0, true, 1, fd, true), -EINVAL);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 3, false, 0, fd, true), -EINVAL);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 2, true, 1, fd, true), 0);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 2, true, 2, fd, true), 0);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 2, true, 1, fd, true), -EEXIST);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 2, true, 1, fd, false), 0);
    CHECK_EQUAL(vmm_vm_ioeventfd(vm, VMM_PIO, 0x100, 2, true, 1, fd, false), -ENOENT);
    vmm_vm_destroy(vm);
    close(fd);
}

int main(void)
{
    a_used_buffer_interrupts_with_the_message_of_its_vector();
    what_happened_under_a_mask_arrives_when_it_is_lifted();
    the_routing_table_is_given_to_kvm_only_for_a_new_message();
    a_message_that_kvm_refuses_makes_its_vector_mute_and_no_other();
    wires_still_reach_the_interrupt_chips_beside_messages();
    doorbells_are_where_the_bar_is_while_the_driver_is_ready();
    ioeventfds_that_cannot_be_are_refused();
    return 0;
}
