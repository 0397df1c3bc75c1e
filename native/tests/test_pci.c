/* SPDX-License-Identifier: Apache-2.0 */
/* PCI as a guest meets it: configuration space, BARs, pins, MSI-X, and the virtio transport; no KVM. */
#include "pci_rig.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

/* ---- configuration space ---- */

static uint64_t port_config(rig *r, uint32_t address, unsigned lane, unsigned size)
{
    vmm_bus_write(r->vm, VMM_PIO, PORTS, 4, address);
    return vmm_bus_read(r->vm, VMM_PIO, PORTS + 4 + lane, size);
}

static void both_ways_into_configuration_space_agree(void)
{
    rig r;
    set_up(&r, NULL);
    CHECK_EQUAL(config(&r, 0, VMM_PCI_CLASS, 1), 0);
    CHECK_EQUAL(config(&r, 0, 0x0a, 2), 0x0600); /* what Linux looks for before it believes the ports */
    CHECK_EQUAL(config(&r, 1, 0, 4), 0x10441af4);
    CHECK_EQUAL(config(&r, 1, VMM_PCI_REVISION, 1), 1);
    CHECK(config(&r, 1, VMM_PCI_SUBSYSTEM, 2) >= 0x40);
    for (unsigned slot = 0; slot < 3; slot++)
        for (unsigned offset = 0; offset < 256; offset++)
            for (unsigned size = 1; size <= 4 - offset % 4 && size != 3; size *= 2)
                CHECK_EQUAL(port_config(&r, 1u << 31 | slot << 11 | (offset & 0xfc), offset % 4, size),
                            config(&r, slot, offset, size));
    tear_down(&r);
}

static void what_is_not_there_reads_as_ones(void)
{
    rig r;
    set_up(&r, NULL);
    CHECK_EQUAL(config(&r, 2, 0, 4), 0xffffffff);
    CHECK_EQUAL(config(&r, 1, 0x1000, 4), 0xffffffff);                  /* function 1 */
    CHECK_EQUAL(config(&r, 1, 0x100, 4), 0xffffffff);                   /* no extended space */
    CHECK_EQUAL(config(&r, 1, 0xfd, 4), 0xffffffff);                    /* half in, half out */
    CHECK_EQUAL(port_config(&r, 1u << 31 | 1 << 16, 0, 4), 0xffffffff); /* bus 1 */
    CHECK_EQUAL(port_config(&r, 0, 0, 4), 0xffffffff);                  /* mechanism #1 is off */
    set_config(&r, 2, 0, 4, 0);
    set_config(&r, 1, 0xfd, 4, 0);
    tear_down(&r);
}

static void only_a_double_word_reaches_the_address_port(void)
{
    rig r;
    set_up(&r, NULL);
    vmm_bus_write(r.vm, VMM_PIO, PORTS, 4, 0xffffffff);
    CHECK_EQUAL(vmm_bus_read(r.vm, VMM_PIO, PORTS, 4), 0x80fffffc);
    vmm_bus_write(r.vm, VMM_PIO, PORTS, 4, 0x80000000);
    vmm_bus_write(r.vm, VMM_PIO, PORTS + 3, 1, 1);   /* Linux's test for mechanism #1 */
    vmm_bus_write(r.vm, VMM_PIO, PORTS + 1, 1, 0xe); /* a PC's reset register lies here */
    vmm_bus_write(r.vm, VMM_PIO, PORTS, 2, 0x1234);
    CHECK_EQUAL(vmm_bus_read(r.vm, VMM_PIO, PORTS, 4), 0x80000000);
    tear_down(&r);
}

static void writing_ones_everywhere_changes_only_what_a_driver_may_write(void)
{
    rig r;
    set_up(&r, NULL);
    uint8_t before[256], after[256];
    for (unsigned i = 0; i < 256; i++)
        before[i] = (uint8_t)config(&r, 1, i, 1);
    for (unsigned i = 0; i < 256; i += 4)
        set_config(&r, 1, i, 4, 0xffffffff);
    for (unsigned i = 0; i < 256; i++)
        after[i] = (uint8_t)config(&r, 1, i, 1);
    CHECK_EQUAL(vmm_pci_get(after + VMM_PCI_COMMAND, 2), 0x406);
    CHECK_EQUAL(vmm_pci_get(after + VMM_PCI_BAR0, 4), 0xffff8004);
    CHECK_EQUAL(vmm_pci_get(after + MSIX_CONTROL, 2), 0xc002);
    CHECK_EQUAL(after[VMM_PCI_INTERRUPT_LINE], 0xff);
    for (unsigned i = 0; i < 256; i++) {
        bool command = i / 2 == VMM_PCI_COMMAND / 2, bar = i >= 0x10 && i < 0x18, line = i == 0x3c;
        bool window = i >= 0x94 && i < 0xa4; /* all of it but id, link, length and type */
        if (!command && !bar && !line && !window && i / 2 != MSIX_CONTROL / 2)
            CHECK_EQUAL(after[i], before[i]);
    }
    vmm_pci_host_reset(r.host);
    for (unsigned i = 0; i < 256; i++)
        CHECK_EQUAL(config(&r, 1, i, 1), before[i]);
    tear_down(&r);
}

/* ---- BARs ---- */

static void a_bar_tells_its_size_and_is_placed_in_the_window(void)
{
    rig r;
    set_up(&r, NULL);
    CHECK_EQUAL(config(&r, 1, VMM_PCI_BAR0, 8), WINDOW | 4);
    set_config(&r, 1, VMM_PCI_BAR0, 4, 0xffffffff);
    set_config(&r, 1, VMM_PCI_BAR0 + 4, 4, 0xffffffff);
    uint64_t mask = config(&r, 1, VMM_PCI_BAR0, 8);
    CHECK_EQUAL(mask & 0xf, 4); /* memory, 64 bits, not prefetchable */
    CHECK_EQUAL(~(mask & ~0xfull) + 1, BAR_SIZE);
    for (unsigned offset = VMM_PCI_BAR0 + 8; offset < 0x28; offset += 4) {
        set_config(&r, 1, offset, 4, 0xffffffff);
        CHECK_EQUAL(config(&r, 1, offset, 4), 0);
    }
    tear_down(&r);
}

static void a_bar_answers_while_memory_decoding_is_on_and_follows_its_register(void)
{
    rig r;
    vmm_pci_bar_info info;
    set_up(&r, NULL);
    CHECK_EQUAL(in(&r, 18, 2), 0xffff);
    CHECK_EQUAL(vmm_pci_get_bar(r.host, 1, 0, &info), 0);
    CHECK(info.size == BAR_SIZE && info.address == VMM_PCI_NOWHERE);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    CHECK_EQUAL(in(&r, 18, 2), 2);
    set_config(&r, 1, VMM_PCI_BAR0, 8, 0x2000000000); /* beyond RAM */
    CHECK_EQUAL(in(&r, 18, 2), 0xffff);
    CHECK_EQUAL(vmm_bus_read(r.vm, VMM_MMIO, 0x2000000000 + 18, 2), 2);
    CHECK_EQUAL(vmm_pci_get_bar(r.host, 1, 0, &info), 0);
    CHECK_EQUAL(info.address, 0x2000000000);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, 0);
    CHECK_EQUAL(vmm_bus_read(r.vm, VMM_MMIO, 0x2000000000 + 18, 2), 0xffff);
    CHECK_EQUAL(vmm_pci_get_bar(r.host, 1, 1, &info), -EINVAL);
    CHECK_EQUAL(vmm_pci_get_bar(r.host, 2, 0, &info), -ENODEV);
    CHECK_EQUAL(vmm_pci_get_bar(r.host, 32, 0, &info), -EINVAL);
    tear_down(&r);
}

static void a_bar_moved_onto_ram_or_a_device_takes_nothing_from_it(void)
{
    rig r;
    set_up(&r, NULL);
    memcpy(machine_at(r.vm, 0x8000, 4), "RAM!", 4);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    static const uint64_t places[] = {0, 0x8000, ECAM, MACHINE_HIGH};
    for (unsigned i = 0; i < 4; i++) {
        vmm_pci_bar_info info;
        set_config(&r, 1, VMM_PCI_BAR0, 8, places[i]);
        CHECK_EQUAL(vmm_pci_get_bar(r.host, 1, 0, &info), 0);
        CHECK_EQUAL(info.address, VMM_PCI_NOWHERE);
        CHECK_EQUAL(config(&r, 1, 0, 4), 0x10441af4);
    }
    CHECK_EQUAL(memcmp(machine_at(r.vm, 0x8000, 4), "RAM!", 4), 0);
    set_config(&r, 1, VMM_PCI_BAR0, 8, WINDOW);
    CHECK_EQUAL(in(&r, 18, 2), 2);
    tear_down(&r);
}

static void of_two_bars_on_one_address_the_second_answers_when_the_first_is_gone(void)
{
    rig r;
    static const uint16_t size = 8;
    set_up(&r, NULL);
    CHECK_EQUAL(vmm_virtio_init(&r.other, r.vm, &ops, &r, 4, "virtio-test 1", 0, 1, &size, 0), 0);
    CHECK_EQUAL(vmm_virtio_pci_create(&r.other, r.host, 9, &r.second), 9);
    CHECK_EQUAL(config(&r, 9, VMM_PCI_BAR0, 8), (WINDOW + BAR_SIZE) | 4);
    for (unsigned slot = 1; slot <= 9; slot += 8)
        set_config(&r, slot, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    set_config(&r, 9, VMM_PCI_BAR0, 4, WINDOW);
    CHECK_EQUAL(in(&r, 18, 2), 2);
    set_config(&r, 1, VMM_PCI_BAR0, 4, WINDOW + BAR_SIZE); /* they swap places */
    CHECK_EQUAL(in(&r, 18, 2), 1);
    CHECK_EQUAL(in(&r, BAR_SIZE + 18, 2), 2);
    tear_down(&r);
}

static void slots_and_addresses_run_out_with_an_error(void)
{
    rig r;
    struct vmm_pci_function functions[VMM_PCI_SLOTS + 1];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static const struct vmm_pci_identity identity = {.vendor = 1};
    create_host(&r, NULL);
    for (int i = 0; i <= VMM_PCI_SLOTS; i++)
        vmm_pci_function_init(&functions[i], &identity, false, &lock, NULL, NULL);
    CHECK_EQUAL(vmm_pci_insert(r.host, &functions[0], 0), -EBUSY);
    CHECK_EQUAL(vmm_pci_insert(r.host, &functions[0], 32), -EINVAL);
    for (int i = 1; i < VMM_PCI_SLOTS; i++)
        CHECK_EQUAL(vmm_pci_insert(r.host, &functions[i], -1), i);
    CHECK_EQUAL(vmm_pci_insert(r.host, &functions[32], -1), -ENOSPC);
    vmm_pci_remove(&functions[5]);
    vmm_pci_add_bar(&functions[32], 0, 2 * WINDOW_SIZE, vmm_pci_ecam_ops(), NULL);
    CHECK_EQUAL(vmm_pci_insert(r.host, &functions[32], -1), -ENOSPC);
    vmm_pci_function_init(&functions[32], &identity, false, &lock, NULL, NULL);
    vmm_pci_add_bar(&functions[32], 4, WINDOW_SIZE, vmm_pci_ecam_ops(), NULL);
    CHECK_EQUAL(vmm_pci_insert(r.host, &functions[32], -1), 5);
    tear_down(&r);
}

/* ---- capabilities ---- */

static void the_capability_list_ends_and_its_structures_lie_apart_in_the_bar(void)
{
    rig r;
    set_up(&r, NULL);
    static const unsigned lengths[] = {0, 60, 8, 1, 8, 0};
    unsigned seen = 0;
    bool taken[BAR_SIZE / 4] = {0};
    CHECK(config(&r, 1, VMM_PCI_STATUS, 2) & VMM_PCI_STATUS_CAPABILITIES);
    unsigned at = (unsigned)config(&r, 1, VMM_PCI_CAPABILITIES, 1), n = 0;
    for (; at; at = (unsigned)config(&r, 1, at + 1, 1), n++) {
        CHECK(n < 6 && at >= 0x40 && at % 4 == 0);
        if (config(&r, 1, at, 1) != 9)
            continue;
        unsigned type = (unsigned)config(&r, 1, at + 3, 1), length = (unsigned)config(&r, 1, at + 12, 4);
        uint64_t offset = config(&r, 1, at + 8, 4);
        CHECK(at + config(&r, 1, at + 2, 1) <= 256 && config(&r, 1, at + 4, 1) == 0 && !(seen & 1u << type));
        seen |= 1u << type;
        CHECK(offset + length <= BAR_SIZE && offset % 4 == 0);
        CHECK_EQUAL(length, lengths[type]);
        for (uint64_t word = offset / 4; word < (offset + length + 3) / 4; word++) {
            CHECK(!taken[word]);
            taken[word] = true;
        }
        if (type == 2)
            CHECK_EQUAL(config(&r, 1, at + 16, 4), 4); /* notify_off_multiplier */
    }
    CHECK_EQUAL(n, 6);
    CHECK_EQUAL(seen, 0x3e); /* common, notify, ISR, device, configuration access */
    tear_down(&r);
}

static void the_configuration_access_window_reaches_the_bar_without_decoding(void)
{
    rig r;
    enum {
        WINDOW_CAP = 0x90,
        CAP_BAR = WINDOW_CAP + 4,
        CAP_OFFSET = WINDOW_CAP + 8,
        CAP_LENGTH = WINDOW_CAP + 12
    };
    enum { CAP_DATA = WINDOW_CAP + 16 };
    set_up(&r, NULL);
    CHECK_EQUAL(config(&r, 1, WINDOW_CAP + 3, 1), 5);
    set_config(&r, 1, CAP_OFFSET, 4, STATUS);
    set_config(&r, 1, CAP_LENGTH, 4, 1);
    set_config(&r, 1, CAP_DATA, 4, 3);
    CHECK_EQUAL(r.dev.status, 3);
    CHECK_EQUAL(config(&r, 1, CAP_DATA, 1), 3);
    /* Anything but 1, 2 or 4 aligned bytes of BAR 0 reaches nothing. */
    static const struct {
        uint32_t bar, offset, length;
    } wrong[] = {{1, STATUS, 1}, {0, STATUS, 0},          {0, STATUS, 3},       {0, STATUS, 8},
                 {0, 21, 4},     {0, BAR_SIZE, 1},        {0, BAR_SIZE - 2, 4}, {0, 0xffffffff, 1},
                 {0, STATUS, 5}, {0, 0x80000000 + 20, 1}, {0, 0xfffffffc, 4},   {0, STATUS, 0xffffffff}};
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        set_config(&r, 1, CAP_BAR, 1, wrong[i].bar);
        set_config(&r, 1, CAP_OFFSET, 4, wrong[i].offset);
        set_config(&r, 1, CAP_LENGTH, 4, wrong[i].length);
        set_config(&r, 1, CAP_DATA, 4, 0);
        CHECK_EQUAL(config(&r, 1, CAP_DATA, 4), 0);
        CHECK_EQUAL(r.dev.status, 3);
    }
    tear_down(&r);
}

/* ---- the interrupt pin ---- */

static void the_pin_is_up_until_the_isr_is_read(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    CHECK_EQUAL(config(&r, 1, VMM_PCI_INTERRUPT_PIN, 1), 1);
    use_buffer(&r, 0);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 1);
    change_configuration(&r);
    CHECK_EQUAL(in(&r, ISR, 1), 3);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
    CHECK_EQUAL(in(&r, ISR, 1), 0);
    tear_down(&r);
}

static void the_command_register_holds_the_pin_back_and_status_tells_of_it(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY | VMM_PCI_COMMAND_INTX_DISABLE);
    use_buffer(&r, 0);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
    CHECK(config(&r, 1, VMM_PCI_STATUS, 2) & VMM_PCI_STATUS_INTERRUPT);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 1);
    out(&r, STATUS, 1, 0); /* a reset takes it down */
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
    CHECK(!(config(&r, 1, VMM_PCI_STATUS, 2) & VMM_PCI_STATUS_INTERRUPT));
    tear_down(&r);
}

static void three_pins(rig *r, struct vmm_pci_function functions[3])
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static const struct vmm_pci_identity identity = {.vendor = 1};
    static const int slots[] = {3, 3 + WIRES, 4};
    create_host(r, NULL);
    for (int i = 0; i < 3; i++) {
        vmm_pci_function_init(&functions[i], &identity, true, &lock, NULL, NULL);
        CHECK_EQUAL(vmm_pci_insert(r->host, &functions[i], slots[i]), slots[i]);
        CHECK_EQUAL(config(r, slots[i], VMM_PCI_INTERRUPT_LINE, 1), ISA_IRQ);
    }
}

static void a_shared_wire_stays_up_until_the_last_lets_go(void)
{
    rig r;
    struct vmm_pci_function functions[3];
    three_pins(&r, functions);
    vmm_pci_interrupt(&functions[0], true);
    vmm_pci_interrupt(&functions[1], true);
    vmm_pci_interrupt(&functions[0], false);
    CHECK_EQUAL(r.level[FIRST_GSI + 3], 1);
    CHECK_EQUAL(r.level[FIRST_GSI + 4], 0);
    vmm_pci_interrupt(&functions[1], false);
    CHECK_EQUAL(r.level[FIRST_GSI + 3], 0);
    tear_down(&r);
}

static void an_edge_triggered_8259_misses_none_of_the_pins_it_shares(void)
{
    rig r;
    struct vmm_pci_function functions[3];
    three_pins(&r, functions);
    vmm_pci_interrupt(&functions[0], true);
    vmm_pci_interrupt(&functions[0], true);
    vmm_pci_interrupt(&functions[2], true);
    CHECK_EQUAL(r.edges, 1);
    vmm_pci_interrupt(&functions[0],
                      false); /* slot 4 came up after its handler had looked: it is heard now */
    CHECK(r.level[ISA_IRQ] == 1 && r.edges == 2);
    vmm_pci_interrupt(&functions[2], false);
    CHECK(r.level[ISA_IRQ] == 0 && r.edges == 2);
    tear_down(&r);
}

/* ---- MSI-X ---- */

static void msix_silences_the_pin_and_keeps_the_isr_clear(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    use_buffer(&r, 0);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 1);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
    CHECK_EQUAL(in(&r, ISR, 1), 1);
    use_buffer(&r, 0);
    change_configuration(&r);
    CHECK_EQUAL(in(&r, ISR, 1), 0);
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
    tear_down(&r);
}

static void a_masked_vector_stays_pending_until_it_is_unmasked(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    out(&r, QUEUE_VECTOR, 2, 2);
    CHECK_EQUAL(in(&r, QUEUE_VECTOR, 2), 2);
    use_buffer(&r, 0); /* MSI-X is off: the pin has it */
    CHECK_EQUAL(in(&r, PENDING, 8), 0);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(in(&r, TABLE + 2 * 16 + 12, 4), 1); /* masked from the start */
    use_buffer(&r, 0);
    CHECK_EQUAL(in(&r, PENDING, 8), 4);
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE | MSIX_MASK);
    out(&r, TABLE + 2 * 16 + 12, 4, 0);
    CHECK_EQUAL(in(&r, PENDING, 4), 4); /* the whole function is masked */
    set_config(&r, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(in(&r, PENDING, 8), 0);
    tear_down(&r);
}

static void the_msix_table_keeps_what_is_written_and_nothing_reserved(void)
{
    rig r;
    set_up(&r, NULL);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    CHECK_EQUAL(config(&r, 1, MSIX_CONTROL, 2) + 1, 3); /* vectors: configuration and two queues */
    for (unsigned vector = 0; vector < 3; vector++) {
        out(&r, TABLE + vector * 16, 8, 0x11223344fee00003);
        out(&r, TABLE + vector * 16 + 8, 8, 0xffffffff00004041 + vector);
        CHECK_EQUAL(in(&r, TABLE + vector * 16, 8), 0x11223344fee00000);
        CHECK_EQUAL(in(&r, TABLE + vector * 16 + 8, 4), 0x4041 + vector);
        CHECK_EQUAL(in(&r, TABLE + vector * 16 + 12, 4), 1);
    }
    out(&r, TABLE + 3 * 16, 8, 5);
    CHECK_EQUAL(in(&r, TABLE + 3 * 16, 8), UINT64_MAX);
    out(&r, TABLE + 1, 1, 5); /* narrower than a double word: forbidden to software (PCI 3.0, 6.8.2) */
    CHECK_EQUAL(in(&r, TABLE, 4), 0xfee00000);
    out(&r, PENDING, 8, UINT64_MAX);
    CHECK_EQUAL(in(&r, PENDING, 8), 0);
    tear_down(&r);
}

/* ---- virtio's common configuration ---- */

static void a_driver_finds_features_queues_and_configuration(void)
{
    rig r;
    set_up(&r, NULL);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    uint64_t features = 0;
    for (unsigned half = 0; half < 2; half++) {
        out(&r, 0, 4, half);
        features |= in(&r, 4, 4) << (32 * half);
    }
    CHECK_EQUAL(features, r.dev.offered);
    CHECK(features & VMM_F_VERSION_1 && features & VMM_F_RING_RESET && features & 1 << 3);
    out(&r, 0, 4, 2);
    CHECK_EQUAL(in(&r, 4, 4), 0);
    CHECK_EQUAL(in(&r, 18, 2), 2);
    for (unsigned queue = 0; queue < 2; queue++) {
        out(&r, QUEUE_SELECT, 2, queue);
        CHECK_EQUAL(in(&r, QUEUE_SIZE, 2), queue ? 128 : 64);
        CHECK_EQUAL(in(&r, 30, 2), queue); /* queue_notify_off */
        out(&r, 32, 8, 0x123456789abc0000 + queue);
        CHECK_EQUAL(in(&r, 32, 4), 0x9abc0000 + queue);
        CHECK_EQUAL(in(&r, 36, 4), 0x12345678);
        CHECK_EQUAL(in(&r, 32, 8), 0x123456789abc0000 + queue);
    }
    uint64_t bytes = 0x1122334455667788;
    unsigned before = (unsigned)in(&r, 21, 1);
    CHECK_EQUAL(vmm_virtio_config_set(&r.dev, 0, &bytes, 8), 0);
    CHECK_EQUAL(in(&r, DEVICE, 8), bytes);
    CHECK_EQUAL(in(&r, DEVICE + 4, 2), 0x3344);
    CHECK(in(&r, 21, 1) != before);
    tear_down(&r);
}

static void queues_and_vectors_that_do_not_exist_are_not_taken(void)
{
    rig r;
    set_up(&r, NULL);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    static const uint16_t numbers[] = {2, 3, 64, 0x7fff, 0xffff};
    for (unsigned i = 0; i < 5; i++) {
        out(&r, QUEUE_SELECT, 2, numbers[i]);
        for (unsigned offset = QUEUE_SIZE; offset < 60; offset += 2) {
            out(&r, offset, 2, 1);
            out(&r, offset, 4, 1);
            CHECK_EQUAL(in(&r, offset, 2), 0);
        }
        out(&r, QUEUE_SELECT, 2, 0);
        if (numbers[i] != 2) { /* there are three vectors */
            out(&r, QUEUE_VECTOR, 2, numbers[i]);
            CHECK_EQUAL(in(&r, QUEUE_VECTOR, 2), 0xffff);
            out(&r, 16, 2, numbers[i]);
            CHECK_EQUAL(in(&r, 16, 2), 0xffff);
        }
    }
    tear_down(&r);
}

static void registers_have_one_width(void)
{
    rig r;
    set_up(&r, NULL);
    set_config(&r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    out(&r, STATUS, 4, 0x01010101);
    out(&r, STATUS, 2, 0x0101);
    CHECK_EQUAL(r.dev.status, 0);
    out(&r, QUEUE_SELECT, 2, 1);
    out(&r, QUEUE_SELECT, 1, 0);
    CHECK_EQUAL(in(&r, QUEUE_SELECT, 2), 1);
    CHECK_EQUAL(in(&r, QUEUE_SELECT, 1), 0);
    CHECK_EQUAL(in(&r, 60, 4), 0); /* beyond the structure */
    tear_down(&r);
}

static void a_doorbell_that_exits_kicks_its_queue(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    uint64_t queue;
    out(&r, NOTIFY, 2, 0);
    CHECK_EQUAL(eventfd_read(r.kicked, &queue), 0);
    CHECK_EQUAL(queue, 1);
    out(&r, NOTIFY + 4, 2, 1); /* not enabled */
    out(&r, NOTIFY + 8, 2, 2); /* not there */
    out(&r, NOTIFY + 1, 1, 0); /* between two */
    struct pollfd nothing = {.fd = r.kicked, .events = POLLIN};
    vmm_loop_sync(vmm_vm_loop(r.vm)); /* the second turn begins after the writes */
    vmm_loop_sync(vmm_vm_loop(r.vm));
    CHECK_EQUAL(poll(&nothing, 1, 0), 0);
    tear_down(&r);
}

static void a_queue_is_reset_alone(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    out(&r, QUEUE_VECTOR, 2, 1);
    out(&r, QUEUE_SIZE, 2, 32); /* it is enabled: too late */
    CHECK_EQUAL(in(&r, QUEUE_SIZE, 2), 64);
    out(&r, QUEUE_RESET, 2, 1);
    CHECK_EQUAL(in(&r, QUEUE_RESET, 2), 0);
    CHECK_EQUAL(in(&r, QUEUE_ENABLE, 2), 0);
    CHECK_EQUAL(in(&r, QUEUE_VECTOR, 2), 0xffff);
    CHECK_EQUAL(in(&r, 32, 8), 0);
    CHECK_EQUAL(in(&r, STATUS, 1), 15);
    CHECK_EQUAL(r.stops, 0);
    tear_down(&r);
}

static void writing_status_zero_resets_the_transport_too(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    out(&r, 0, 4, 1);
    out(&r, 16, 2, 1);
    out(&r, QUEUE_VECTOR, 2, 1);
    out(&r, QUEUE_SELECT, 2, 1);
    out(&r, STATUS, 1, 0);
    CHECK_EQUAL(r.stops, 1);
    CHECK_EQUAL(in(&r, 0, 4), 0);
    CHECK_EQUAL(in(&r, 16, 2), 0xffff);
    CHECK_EQUAL(in(&r, QUEUE_SELECT, 2), 0);
    CHECK_EQUAL(in(&r, QUEUE_VECTOR, 2), 0xffff);
    CHECK_EQUAL(in(&r, QUEUE_ENABLE, 2), 0);
    tear_down(&r);
}

static void a_guest_that_breaks_a_rule_is_told_by_the_configuration_interrupt(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    out(&r, QUEUE_SELECT, 2, 1);
    out(&r, QUEUE_SIZE, 2, 3 * 64); /* more than the queue has */
    CHECK_EQUAL(in(&r, STATUS, 1), 15 | VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(in(&r, ISR, 1), 2);
    CHECK_EQUAL(r.stops, 1);
    tear_down(&r);
}

/* ---- several vCPUs at once ---- */

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 33;
}

/* Decoding on and off, the BAR to and fro, MSI-X, the pin, the ISR, status: in any order. */
static void *hammer(void *opaque)
{
    static const unsigned offsets[] = {
        STATUS, QUEUE_SELECT, QUEUE_ENABLE, ISR, TABLE + 12, PENDING, NOTIFY, 8, 12};
    rig *r = opaque;
    uint64_t state = (uintptr_t)&state;
    for (int i = 0; i < 20000; i++) {
        unsigned what = (unsigned)next_random(&state), offset = offsets[next_random(&state) % 9];
        unsigned size = offset == STATUS || offset == ISR ? 1 : offset < 32 && offset > 12 ? 2 : 4;
        switch (what % 8) {
        case 0:
            set_config(r, 1, VMM_PCI_COMMAND, 2, next_random(&state));
            break;
        case 1:
            set_config(r, 1, VMM_PCI_BAR0, 4, WINDOW + (next_random(&state) % 4) * BAR_SIZE);
            break;
        case 2:
            set_config(r, 1, MSIX_CONTROL, 2, next_random(&state));
            break;
        case 3:
            use_buffer(r, 0);
            break;
        case 4:
            vmm_pci_interrupt(r->spare, what & 8);
            break;
        case 5:
            in(r, offset, size);
            break;
        default:
            vmm_virtio_pci_ops()->write(r->transport, offset, size, next_random(&state) & 0xf);
        }
    }
    return NULL;
}

static void accesses_from_several_threads_leave_nothing_behind(void)
{
    enum { THREADS = 4 };
    rig r;
    pthread_t threads[THREADS];
    uint8_t before[256];
    struct vmm_pci_function spare; /* on the same wire */
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static const struct vmm_pci_identity identity = {.vendor = 1};
    set_up(&r, NULL);
    vmm_pci_function_init(&spare, &identity, true, &lock, NULL, NULL);
    CHECK_EQUAL(vmm_pci_insert(r.host, &spare, 1 + WIRES), 1 + WIRES);
    r.spare = &spare;
    for (unsigned i = 0; i < 256; i++)
        before[i] = (uint8_t)config(&r, 1, i, 1);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, hammer, &r), 0);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
    vmm_virtio_reset(&r.dev);
    vmm_pci_host_reset(r.host);
    vmm_pci_interrupt(&spare, false);
    CHECK(r.level[FIRST_GSI + 1] == 0 && r.level[ISA_IRQ] == 0);
    for (unsigned i = 0; i < 256; i++)
        CHECK_EQUAL(config(&r, 1, i, 1), before[i]);
    for (unsigned page = 0; page < 4; page++)
        CHECK_EQUAL(in(&r, page * BAR_SIZE + 18, 2), 0xffff);
    vmm_pci_remove(&spare);
    tear_down(&r);
}

int main(void)
{
    both_ways_into_configuration_space_agree();
    what_is_not_there_reads_as_ones();
    only_a_double_word_reaches_the_address_port();
    writing_ones_everywhere_changes_only_what_a_driver_may_write();
    a_bar_tells_its_size_and_is_placed_in_the_window();
    a_bar_answers_while_memory_decoding_is_on_and_follows_its_register();
    a_bar_moved_onto_ram_or_a_device_takes_nothing_from_it();
    of_two_bars_on_one_address_the_second_answers_when_the_first_is_gone();
    slots_and_addresses_run_out_with_an_error();
    the_capability_list_ends_and_its_structures_lie_apart_in_the_bar();
    the_configuration_access_window_reaches_the_bar_without_decoding();
    the_pin_is_up_until_the_isr_is_read();
    the_command_register_holds_the_pin_back_and_status_tells_of_it();
    a_shared_wire_stays_up_until_the_last_lets_go();
    an_edge_triggered_8259_misses_none_of_the_pins_it_shares();
    msix_silences_the_pin_and_keeps_the_isr_clear();
    a_masked_vector_stays_pending_until_it_is_unmasked();
    the_msix_table_keeps_what_is_written_and_nothing_reserved();
    a_driver_finds_features_queues_and_configuration();
    queues_and_vectors_that_do_not_exist_are_not_taken();
    registers_have_one_width();
    a_doorbell_that_exits_kicks_its_queue();
    a_queue_is_reset_alone();
    writing_status_zero_resets_the_transport_too();
    a_guest_that_breaks_a_rule_is_told_by_the_configuration_interrupt();
    accesses_from_several_threads_leave_nothing_behind();
    return 0;
}
