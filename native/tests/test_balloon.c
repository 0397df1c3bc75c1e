/* SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"
#include "vmmballoon.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

enum { INFLATE = 0, DEFLATE = 1, STATISTICS = 2 };
enum { ALL = VMM_BALLOON_STATISTICS | VMM_BALLOON_DEFLATE_ON_OOM | VMM_BALLOON_REPORTING };
enum { AGREED = 1 << 1 | 1 << 2 | 1 << 5 };
#define NUMBERS 0x300000ull /* guest-physical: the array of page numbers */
#define PAGES 0x800000ull   /* guest-physical: memory to give up */

struct fixture {
    vmm_vm *vm;
    vmm_balloon *balloon;
    struct driver driver;
};

static void set_up(struct fixture *f, uint64_t agreed, uint32_t flavour)
{
    f->vm = machine_create();
    CHECK_EQUAL(vmm_balloon_create(f->vm, "virtio-balloon 0", ALL, &f->balloon), 0);
    driver_start(&f->driver, f->vm, vmm_balloon_virtio(f->balloon), agreed, flavour);
    driver_turn(&f->driver);
}

static void tear_down(struct fixture *f)
{
    vmm_virtio_reset(vmm_balloon_virtio(f->balloon));
    vmm_vm_destroy(f->vm);
    vmm_balloon_destroy(f->balloon);
}

static vmm_balloon_info info_of(struct fixture *f)
{
    vmm_balloon_info info;
    vmm_balloon_get_info(f->balloon, &info);
    return info;
}

/* Bytes the host keeps for a region. */
static uint64_t kept(struct fixture *f, unsigned region)
{
    struct stat file;
    CHECK_EQUAL(fstat(f->vm->regions[region].fd, &file), 0);
    return (uint64_t)file.st_blocks * 512;
}

static void number(struct fixture *f, unsigned i, uint32_t page)
{
    memcpy(machine_at(f->vm, NUMBERS + i * 4, 4), &page, 4);
}

static void offer_and_collect(struct fixture *f, unsigned queue, const struct piece *pieces, unsigned n)
{
    uint32_t written;
    driver_offer(&f->driver, queue, pieces, n);
    driver_turn(&f->driver);
    CHECK(driver_collect(&f->driver, queue, &written));
    CHECK_EQUAL(written, 0);
}

static void inflated_pages_are_the_hosts_again_and_read_as_zeroes(void)
{
    const uint32_t flavours[] = {0, VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX};
    for (unsigned i = 0; i < 2; i++) {
        struct fixture f;
        set_up(&f, AGREED, flavours[i]);
        memset(machine_at(f.vm, PAGES, 16 * 4096), 0x55, 16 * 4096);
        memset(machine_at(f.vm, MACHINE_HIGH + PAGES, 4096), 0x55, 4096);
        /* upwards, downwards, alone, twice, and in the other region */
        const uint32_t order[] = {2, 3, 4, 9, 8, 7, 12, 12};
        for (unsigned k = 0; k < 8; k++)
            number(&f, k, (uint32_t)(PAGES >> 12) + order[k]);
        number(&f, 8, (uint32_t)((MACHINE_HIGH + PAGES) >> 12));
        const uint64_t low = kept(&f, 0), high = kept(&f, 1);
        offer_and_collect(&f, INFLATE, (struct piece[]){OUT(NUMBERS, 14), OUT(NUMBERS + 14, 22)}, 2);
        CHECK_EQUAL(low - kept(&f, 0), 7 * 4096);
        CHECK_EQUAL(high - kept(&f, 1), 4096);
        for (unsigned page = 0; page < 16; page++) {
            const bool gone =
                page == 2 || page == 3 || page == 4 || page == 7 || page == 8 || page == 9 || page == 12;
            const uint8_t *bytes = machine_at(f.vm, PAGES + page * 4096, 4096);
            CHECK_EQUAL(bytes[0], gone ? 0 : 0x55);
            CHECK_EQUAL(bytes[4095], gone ? 0 : 0x55);
        }
        const vmm_balloon_info info = info_of(&f);
        CHECK_EQUAL(info.inflated, 9);
        CHECK_EQUAL(info.released, 9);
        CHECK_EQUAL(info.refused, 0);
        offer_and_collect(&f, DEFLATE, (struct piece[]){OUT(NUMBERS, 36)}, 1);
        CHECK_EQUAL(info_of(&f).deflated, 9);
        tear_down(&f);
    }
}

static void numbers_that_are_not_ram_are_counted_and_harm_nothing(void)
{
    struct fixture f;
    f.vm = machine_create();
    uint8_t *rom = machine_add(f.vm, MACHINE_RAM, 0x2000, VMM_MEMORY_READONLY); /* right behind the RAM */
    memset(rom, 0x77, 0x2000);
    CHECK_EQUAL(vmm_balloon_create(f.vm, "virtio-balloon 0", ALL, &f.balloon), 0);
    driver_start(&f.driver, f.vm, vmm_balloon_virtio(f.balloon), AGREED, 0);
    number(&f, 0, UINT32_MAX);
    number(&f, 1, (uint32_t)(MACHINE_RAM >> 12));
    number(&f, 2, (uint32_t)(MACHINE_RAM >> 12) + 1);
    number(&f, 3, (uint32_t)(MACHINE_RAM >> 12) + 2);
    number(&f, 4, 0x80000);
    number(&f, 5, (uint32_t)(MACHINE_RAM >> 12) - 1);
    offer_and_collect(&f, INFLATE, (struct piece[]){OUT(NUMBERS, 27)}, 1); /* and three bytes of another */
    const vmm_balloon_info info = info_of(&f);
    CHECK_EQUAL(info.inflated, 6);
    CHECK_EQUAL(info.refused, 5);
    CHECK_EQUAL(info.released, 1);
    CHECK_EQUAL(rom[0], 0x77);
    CHECK_EQUAL(rom[0x1fff], 0x77);
    offer_and_collect(&f, INFLATE, (struct piece[]){IN(NUMBERS, 64)}, 1);
    CHECK(f.driver.dev->running);
    tear_down(&f);
}

static void private_pages_go_and_the_file_under_them_stays(void)
{
    struct fixture f;
    set_up(&f, AGREED, 0);
    struct vmm_region *r = &f.vm->regions[0];
    uint8_t *page = machine_at(f.vm, PAGES, 4096);
    memset(page, 0x11, 4096); /* the file's */
    CHECK(mmap(r->host, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, r->fd, 0) == r->host);
    r->flags |= VMM_MEMORY_PRIVATE;
    memset(page, 0x22, 4096); /* ours */
    number(&f, 0, PAGES >> 12);
    offer_and_collect(&f, INFLATE, (struct piece[]){OUT(NUMBERS, 4)}, 1);
    CHECK_EQUAL(info_of(&f).released, 1);
    CHECK_EQUAL(page[0], 0x11);
    CHECK_EQUAL(page[4095], 0x11);
    tear_down(&f);
}

static void a_buffer_of_a_million_numbers_is_worked_off_in_turns(void)
{
    struct fixture f;
    set_up(&f, AGREED, 0);
    driver_offer(&f.driver, INFLATE, (struct piece[]){OUT(NUMBERS, 4 << 20)}, 1);
    struct vmm_source *doorbell = &f.driver.dev->queues[INFLATE].source;
    unsigned turns = 0;
    for (; driver_source(doorbell, EPOLLIN); turns++)
        CHECK(info_of(&f).inflated <= (turns + 1) * 4096ull);
    CHECK(turns >= 256);
    uint32_t written;
    CHECK(driver_collect(&f.driver, INFLATE, &written));
    CHECK_EQUAL(info_of(&f).inflated, 1 << 20);
    tear_down(&f);
}

static void what_is_left_of_a_buffer_survives_save_and_load(void)
{
    struct fixture f;
    set_up(&f, AGREED, 0);
    driver_offer(&f.driver, INFLATE, (struct piece[]){OUT(NUMBERS, 5000 * 4)}, 1);
    driver_source(&f.driver.dev->queues[INFLATE].source, EPOLLIN);
    CHECK_EQUAL(vmm_balloon_set_target(f.balloon, 77), 0);
    uint64_t own[VMM_VIRTIO_OWN]; /* the target, and how far each queue's oldest buffer is worked off */
    uint64_t *const target = own, *const progress = own + 1;
    vmm_virtio_save_own(f.driver.dev, own);
    CHECK(progress[INFLATE] > 0 && progress[INFLATE] < 5000 * 4);
    CHECK_EQUAL(*target, 77);
    const uint64_t before = info_of(&f).inflated;
    CHECK_EQUAL(progress[INFLATE], before * 4);
    CHECK_EQUAL(vmm_virtio_load_own(f.driver.dev, own), 0);
    driver_turn(&f.driver);
    CHECK_EQUAL(info_of(&f).inflated, 5000);

    for (progress[INFLATE] = 0; progress[INFLATE] < 12; progress[INFLATE]++) {
        /* found by fuzz_balloon: an odd one never ended */
        CHECK_EQUAL(vmm_virtio_load_own(f.driver.dev, own), 0);
        offer_and_collect(&f, INFLATE, (struct piece[]){OUT(NUMBERS, 10)}, 1);
    }

    *target = (2 * MACHINE_RAM >> 12) + 1;
    CHECK_EQUAL(vmm_virtio_load_own(f.driver.dev, own), -EINVAL);
    *target = (1ull << 32) + 1;
    CHECK_EQUAL(vmm_virtio_load_own(f.driver.dev, own), -EINVAL);
    *target = 0;
    progress[1] = 1ull << 32;
    CHECK_EQUAL(vmm_virtio_load_own(f.driver.dev, own), -EINVAL);
    tear_down(&f);
}

static void the_target_is_told_and_only_actual_is_the_drivers(void)
{
    struct fixture f;
    set_up(&f, AGREED, 0);
    CHECK_EQUAL(vmm_balloon_set_target(f.balloon, 1000), 0);
    CHECK_EQUAL(f.driver.config_interrupts, 1);
    CHECK_EQUAL(vmm_virtio_config_read(f.driver.dev, 0, 4), 1000);
    vmm_virtio_config_write(f.driver.dev, 0, 4, 5);
    vmm_virtio_config_write(f.driver.dev, 4, 4, 900);
    CHECK_EQUAL(vmm_virtio_config_read(f.driver.dev, 0, 4), 1000);
    CHECK_EQUAL(info_of(&f).actual, 900);
    CHECK_EQUAL(info_of(&f).target, 1000);
    CHECK_EQUAL(vmm_balloon_set_target(f.balloon, (uint32_t)(2 * MACHINE_RAM >> 12) + 1), -EINVAL);
    CHECK_EQUAL(info_of(&f).target, 1000);
    tear_down(&f);
}

static void statistic(struct fixture *f, unsigned i, uint16_t tag, uint64_t value)
{
    uint8_t *at = machine_at(f->vm, NUMBERS + i * 10, 10);
    memcpy(at, &tag, 2);
    memcpy(at + 2, &value, 8);
}

static void statistics_come_when_they_are_asked_for(void)
{
    struct fixture f;
    set_up(&f, AGREED, VMM_QUEUE_EVENT_IDX);
    vmm_balloon_memory memory;
    CHECK_EQUAL(vmm_balloon_ask(f.balloon, 1, &memory), -ETIMEDOUT); /* the driver has offered nothing yet */
    statistic(&f, 0, 4, 12345);
    statistic(&f, 1, 5, 1ull << 40);
    statistic(&f, 2, 99, 1);
    driver_offer(&f.driver, STATISTICS, (struct piece[]){OUT(NUMBERS, 30)}, 1);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(!driver_collect(&f.driver, STATISTICS, &written)); /* the device keeps it */

    for (unsigned round = 0; round < 300; round++) { /* more often than the queue is long */
        CHECK_EQUAL(vmm_balloon_ask(f.balloon, 0, &memory), -ETIMEDOUT);
        CHECK_EQUAL(memory.present, 1 << 4 | 1 << 5);
        CHECK_EQUAL(memory.value[4], round ? 1000 + round - 1 : 12345);
        CHECK_EQUAL(memory.value[5], 1ull << 40);
        CHECK(driver_collect(&f.driver, STATISTICS, &written)); /* that was the question */
        CHECK_EQUAL(written, 0);
        statistic(&f, 0, 4, 1000 + round);
        driver_offer(&f.driver, STATISTICS, (struct piece[]){OUT(NUMBERS, 20)}, 1);
        driver_turn(&f.driver);
        CHECK(!driver_collect(&f.driver, STATISTICS, &written));
    }
    tear_down(&f);
}

static void *answer(void *opaque)
{
    struct fixture *f = opaque;
    uint32_t written;
    while (!driver_collect(&f->driver, STATISTICS, &written))
        sched_yield();
    statistic(f, 0, 4, 777);
    driver_offer(&f->driver, STATISTICS, (struct piece[]){OUT(NUMBERS, 10)}, 1);
    driver_turn(&f->driver);
    return NULL;
}

static void asking_waits_for_the_guests_answer(void)
{
    struct fixture f;
    set_up(&f, AGREED, 0);
    driver_offer(&f.driver, STATISTICS, (struct piece[]){OUT(NUMBERS, 0x1000)},
                 1); /* 409 entries, all zero */
    driver_turn(&f.driver);
    pthread_t guest;
    CHECK_EQUAL(pthread_create(&guest, NULL, answer, &f), 0);
    vmm_balloon_memory memory;
    CHECK_EQUAL(vmm_balloon_ask(f.balloon, 20000, &memory), 0);
    pthread_join(guest, NULL);
    CHECK_EQUAL(memory.present, 1 << 4);
    CHECK_EQUAL(memory.value[4], 777);
    CHECK_EQUAL(memory.updates, 2);

    driver_start(&f.driver, f.vm, f.driver.dev, 0, 0); /* a driver that agreed to none */
    CHECK_EQUAL(vmm_balloon_ask(f.balloon, 20000, &memory), -ENOTSUP);
    CHECK_EQUAL(memory.present, 0);
    tear_down(&f);
}

static void reported_memory_is_given_back_by_whole_pages(void)
{
    /* With statistics and without; numbered as the standard does, and as Linux does. */
    const struct {
        uint64_t agreed;
        unsigned queue;
    } cases[] = {{AGREED, 4}, {AGREED, 3}, {1 << 5, 2}, {1 << 5, 4}};
    for (unsigned i = 0; i < 4; i++) {
        struct fixture f;
        set_up(&f, cases[i].agreed, 0);
        memset(machine_at(f.vm, PAGES, 64 * 4096), 0x55, 64 * 4096);
        const uint64_t before = kept(&f, 0);
        offer_and_collect(
            &f, cases[i].queue,
            (struct piece[]){IN(PAGES + 100, 3 * 4096), IN(PAGES + 8 * 4096, 4 * 4096), IN(PAGES + 1, 9)}, 3);
        CHECK_EQUAL(before - kept(&f, 0), 6 * 4096);
        CHECK_EQUAL(info_of(&f).released, 6);
        CHECK_EQUAL(((uint8_t *)machine_at(f.vm, PAGES, 1))[0], 0x55);
        CHECK_EQUAL(((uint8_t *)machine_at(f.vm, PAGES + 3 * 4096, 1))[0], 0x55);
        CHECK_EQUAL(((uint8_t *)machine_at(f.vm, PAGES + 8 * 4096, 1))[0], 0);
        tear_down(&f);
    }
}

static void reports_nobody_agreed_to_are_not_taken(void)
{
    struct fixture f;
    set_up(&f, 1 << 1, 0);
    memset(machine_at(f.vm, PAGES, 4096), 0x55, 4096);
    driver_offer(&f.driver, 4, (struct piece[]){IN(PAGES, 4096)}, 1);
    driver_turn(&f.driver);
    uint32_t written;
    CHECK(!driver_collect(&f.driver, 4, &written));
    CHECK_EQUAL(((uint8_t *)machine_at(f.vm, PAGES, 1))[0], 0x55);
    tear_down(&f);
}

static void memory_in_huge_pages_has_no_balloon(void)
{
    vmm_vm *vm = machine_create();
    machine_add(vm, MACHINE_RAM, 0x200000, VMM_MEMORY_HUGE_2M);
    vmm_balloon *balloon;
    CHECK_EQUAL(vmm_balloon_create(vm, "virtio-balloon 0", ALL, &balloon), -ENOTSUP);
    vmm_vm_destroy(vm);
}

int main(void)
{
    memory_in_huge_pages_has_no_balloon();
    inflated_pages_are_the_hosts_again_and_read_as_zeroes();
    numbers_that_are_not_ram_are_counted_and_harm_nothing();
    private_pages_go_and_the_file_under_them_stays();
    a_buffer_of_a_million_numbers_is_worked_off_in_turns();
    what_is_left_of_a_buffer_survives_save_and_load();
    the_target_is_told_and_only_actual_is_the_drivers();
    statistics_come_when_they_are_asked_for();
    asking_waits_for_the_guests_answer();
    reported_memory_is_given_back_by_whole_pages();
    reports_nobody_agreed_to_are_not_taken();
    return 0;
}
