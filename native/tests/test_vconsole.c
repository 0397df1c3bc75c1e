/* SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"
#include "vmmvconsole.h"

#include <errno.h>
#include <string.h>

enum { RECEIVE = 0, TRANSMIT = 1 };
enum { HIGH_WATER = 1 << 20, INPUT = 4096 };
#define DATA 0x200000ull

struct fixture {
    vmm_vm *vm;
    vmm_console *console;
    vmm_vconsole *device;
    struct driver driver;
};

static void set_up(struct fixture *f, uint32_t flavour, size_t high_water)
{
    f->vm = machine_create();
    CHECK_EQUAL(vmm_console_create(INPUT, HIGH_WATER, high_water, &f->console), 0);
    CHECK_EQUAL(vmm_vconsole_create(f->vm, "virtio-console 0", f->console, 80, 25, &f->device), 0);
    driver_start(&f->driver, f->vm, vmm_vconsole_virtio(f->device), 1, flavour);
    driver_turn(&f->driver);
}

static void tear_down(struct fixture *f)
{
    vmm_virtio_reset(vmm_vconsole_virtio(f->device));
    vmm_vm_destroy(f->vm);
    vmm_vconsole_destroy(f->device);
    vmm_console_destroy(f->console);
}

static void expect_output(struct fixture *f, uint64_t from, const void *bytes, size_t n)
{
    static uint8_t got[HIGH_WATER];
    uint64_t position = from;
    CHECK_EQUAL(vmm_console_read(f->console, &position, got, sizeof got), n);
    CHECK(memcmp(got, bytes, n) == 0);
}

static void fill(struct fixture *f, uint64_t gpa, size_t n)
{
    uint8_t *bytes = machine_at(f->vm, gpa, n);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)(i * 7 + (i >> 8));
}

static void output_reaches_the_console_whatever_the_rings_look_like(void)
{
    const uint32_t flavours[] = {0, VMM_QUEUE_EVENT_IDX, VMM_QUEUE_PACKED,
                                 VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX};
    for (unsigned i = 0; i < 4; i++) {
        struct fixture f;
        set_up(&f, flavours[i], HIGH_WATER);
        uint32_t written;
        for (unsigned round = 0; round < 200; round++) {
            memcpy(machine_at(f.vm, DATA, 5), "hello", 5);
            driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, 2), OUT(DATA + 2, 3)}, 2);
            driver_turn(&f.driver);
            CHECK(driver_collect(&f.driver, TRANSMIT, &written));
            CHECK_EQUAL(written, 0);
            expect_output(&f, 5 * round, "hello", 5);
        }
        tear_down(&f);
    }
}

/* Bytes of the oldest transmit buffer that the console has: all that the device itself remembers. */
static uint64_t sent(const struct fixture *f)
{
    uint64_t own[VMM_VIRTIO_OWN];
    vmm_virtio_save_own(vmm_vconsole_virtio(f->device), own);
    return own[0];
}

static void a_console_that_takes_no_more_keeps_the_buffer_and_loses_nothing(void)
{
    struct fixture f;
    set_up(&f, VMM_QUEUE_EVENT_IDX, 100);
    fill(&f, DATA, 250);
    vmm_console_set_pump(f.console, 0);
    driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, 130), OUT(DATA + 130, 120)}, 2);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(!driver_collect(&f.driver, TRANSMIT, &written));
    CHECK_EQUAL(vmm_console_end(f.console), 100);
    CHECK_EQUAL(sent(&f), 100);
    driver_turn(&f.driver); /* nothing rings: a device that waits costs nothing */
    CHECK_EQUAL(f.driver.dev->queues[TRANSMIT].ring.doorbells, 2);

    vmm_console_set_pump(f.console, 99);
    driver_turn(&f.driver);
    CHECK_EQUAL(vmm_console_end(f.console), 199);
    CHECK(!driver_collect(&f.driver, TRANSMIT, &written));
    vmm_console_set_pump(f.console, 199);
    driver_turn(&f.driver);
    CHECK(driver_collect(&f.driver, TRANSMIT, &written));
    expect_output(&f, 0, machine_at(f.vm, DATA, 250), 250);
    CHECK_EQUAL(sent(&f), 0);
    tear_down(&f);
}

static void a_buffer_longer_than_a_turn_is_worked_off_in_several(void)
{
    struct fixture f;
    set_up(&f, 0, HIGH_WATER);
    const size_t size = 700000;
    fill(&f, DATA, size);
    driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, size)}, 1);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(driver_collect(&f.driver, TRANSMIT, &written));
    CHECK(f.driver.dev->queues[TRANSMIT].ring.doorbells >= 3);
    expect_output(&f, 0, machine_at(f.vm, DATA, size), size);
    tear_down(&f);
}

static void a_buffer_the_guest_shortens_while_it_waits_is_finished(void)
{
    struct fixture f;
    set_up(&f, 0, 100);
    vmm_console_set_pump(f.console, 0);
    const int id = driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, 300)}, 1);
    driver_turn(&f.driver);
    f.driver.ring[TRANSMIT].split[id].size = 10;
    vmm_console_set_pump(f.console, 100);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(driver_collect(&f.driver, TRANSMIT, &written));
    CHECK_EQUAL(vmm_console_end(f.console), 100);
    CHECK(f.driver.dev->running);
    tear_down(&f);
}

static void input_waits_for_buffers_and_buffers_wait_for_input(void)
{
    struct fixture f;
    set_up(&f, VMM_QUEUE_PACKED, HIGH_WATER);
    uint32_t written;
    CHECK_EQUAL(vmm_console_send(f.console, (const uint8_t *)"before", 6), 6);
    driver_turn(&f.driver);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){IN(DATA, 2), IN(DATA + 0x1000, 2)}, 2);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){IN(DATA + 0x2000, 64)}, 1);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){IN(DATA + 0x3000, 64)}, 1);
    driver_turn(&f.driver);
    CHECK(driver_collect(&f.driver, RECEIVE, &written));
    CHECK_EQUAL(written, 4);
    CHECK(driver_collect(&f.driver, RECEIVE, &written));
    CHECK_EQUAL(written, 2);
    CHECK(!driver_collect(&f.driver, RECEIVE, &written));
    CHECK(memcmp(machine_at(f.vm, DATA, 2), "be", 2) == 0);
    CHECK(memcmp(machine_at(f.vm, DATA + 0x1000, 2), "fo", 2) == 0);
    CHECK(memcmp(machine_at(f.vm, DATA + 0x2000, 2), "re", 2) == 0);
    const unsigned interrupts = f.driver.interrupts[RECEIVE];

    vmm_console_send(f.console, (const uint8_t *)"after", 5);
    driver_turn(&f.driver);
    CHECK(driver_collect(&f.driver, RECEIVE, &written));
    CHECK_EQUAL(written, 5);
    CHECK(memcmp(machine_at(f.vm, DATA + 0x3000, 5), "after", 5) == 0);
    CHECK_EQUAL(f.driver.interrupts[RECEIVE], interrupts + 1);
    tear_down(&f);
}

static void a_receive_buffer_without_room_breaks_the_device_and_costs_no_input(void)
{
    struct fixture f;
    set_up(&f, 0, HIGH_WATER);
    vmm_console_send(f.console, (const uint8_t *)"kept", 4);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){OUT(DATA, 16)}, 1);
    driver_turn(&f.driver);
    CHECK(f.driver.dev->status & VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(f.driver.config_interrupts, 2);

    driver_start(&f.driver, f.vm, f.driver.dev, 0, 0);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){IN(DATA, 16)}, 1);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(driver_collect(&f.driver, RECEIVE, &written));
    CHECK_EQUAL(written, 4);
    tear_down(&f);
}

static void a_reset_in_the_middle_of_a_buffer_forgets_how_far_it_was(void)
{
    struct fixture f;
    set_up(&f, 0, 100);
    vmm_console_set_pump(f.console, 0);
    driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, 300)}, 1);
    driver_turn(&f.driver);
    driver_start(&f.driver, f.vm, f.driver.dev, 0, 0);
    vmm_console_set_pump(f.console, UINT64_MAX);
    memcpy(machine_at(f.vm, DATA, 3), "new", 3);
    driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(DATA, 3)}, 1);
    driver_turn(&f.driver);
    expect_output(&f, 100, "new", 3);
    tear_down(&f);
}

static void the_size_is_told_and_told_again(void)
{
    struct fixture f;
    set_up(&f, 0, HIGH_WATER);
    CHECK_EQUAL(vmm_virtio_config_read(f.driver.dev, 0, 4), 25 << 16 | 80);
    CHECK_EQUAL(f.driver.config_interrupts, 1);
    CHECK_EQUAL(vmm_vconsole_resize(f.device, 132, 50), 0);
    CHECK_EQUAL(vmm_virtio_config_read(f.driver.dev, 0, 4), 50 << 16 | 132);
    CHECK_EQUAL(f.driver.config_interrupts, 2);

    vmm_vconsole *sizeless;
    CHECK_EQUAL(vmm_vconsole_create(f.vm, "virtio-console 1", f.console, 0, 0, &sizeless), 0);
    CHECK_EQUAL(vmm_vconsole_virtio(sizeless)->offered & 1, 0);
    CHECK_EQUAL(vmm_vconsole_resize(sizeless, 80, 25), -ENOTSUP);
    vmm_vconsole_destroy(sizeless);
    tear_down(&f);
}

static void emergency_writes_need_no_queue(void)
{
    struct fixture f;
    set_up(&f, 0, 2);
    vmm_virtio_reset(f.driver.dev);
    vmm_console_set_pump(f.console, 0);
    vmm_virtio_config_write(f.driver.dev, 8, 4, 'E');
    vmm_virtio_config_write(f.driver.dev, 0, 4, 'x'); /* the size is not the driver's */
    vmm_virtio_config_write(f.driver.dev, 9, 1, 'y');
    vmm_virtio_config_write(f.driver.dev, 8, 1, '!');
    vmm_virtio_config_write(f.driver.dev, 8, 1, '?'); /* no room */
    expect_output(&f, 0, "E!", 2);
    tear_down(&f);
}

int main(void)
{
    output_reaches_the_console_whatever_the_rings_look_like();
    a_console_that_takes_no_more_keeps_the_buffer_and_loses_nothing();
    a_buffer_longer_than_a_turn_is_worked_off_in_several();
    a_buffer_the_guest_shortens_while_it_waits_is_finished();
    input_waits_for_buffers_and_buffers_wait_for_input();
    a_receive_buffer_without_room_breaks_the_device_and_costs_no_input();
    a_reset_in_the_middle_of_a_buffer_forgets_how_far_it_was();
    the_size_is_told_and_told_again();
    emergency_writes_need_no_queue();
    return 0;
}
