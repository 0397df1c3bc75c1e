/* SPDX-License-Identifier: Apache-2.0 */
/* Balloon: whatever the guest names, nothing outside its RAM changes, and every page named is counted once. */
#include "driven.h"
#include "vmmballoon.h"

enum { ROM = 0x2000, LONGEST = 600 }; /* bytes: a page number costs a system call */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static vmm_vm *vm;
    static vmm_balloon *balloon;
    static struct driver driver;
    static uint8_t *rom;
    if (!vm) {
        vm = machine_create();
        rom = machine_add(vm, MACHINE_RAM, ROM, VMM_MEMORY_READONLY);
        memset(rom, 0x77, ROM);
        CHECK(vmm_balloon_create(vm, "virtio-balloon0", 7, &balloon) == 0);
    }
    struct input in = {data, data + size};
    const uint64_t features = take(&in, 1) & (1 << 1 | 1 << 2 | 1 << 5);
    driver_start(&driver, vm, vmm_balloon_virtio(balloon), features, take_flavour(&in));
    vmm_balloon_memory memory;
    vmm_balloon_info before, after;
    vmm_balloon_get_info(balloon, &before);
    while (in.at < in.end) {
        const uint8_t op = (uint8_t)take(&in, 1);
        const unsigned queue = (op >> 4) % 5;
        switch (op & 7) {
        case 0:
        case 1:
            guest_offers(&driver, queue, queue > 2 || (queue == 2 && op & 8), LONGEST, &in);
            break;
        case 2:
            guest_fills(&driver, &in);
            break;
        case 3:
            guest_scribbles(&driver, queue, &in);
            break;
        case 4:
            guest_configures(&driver, &in);
            break;
        case 5:
            vmm_balloon_ask(balloon, 0, &memory);
            CHECK(memory.present <= 0xffff);
            break;
        case 6: {
            uint64_t own[VMM_VIRTIO_OWN]; /* target, progress of each queue */
            vmm_virtio_save_own(driver.dev, own);
            if (op & 8)
                own[1 + queue] = take(&in, 5);
            own[0] = take(&in, 2);
            vmm_virtio_load_own(driver.dev, own);
            break;
        }
        case 7:
            doorbells(&driver);
            break;
        }
    }
    doorbells(&driver);
    vmm_balloon_get_info(balloon, &after);
    CHECK(after.target <= 2 * MACHINE_RAM >> 12);
    CHECK(after.released + after.refused - before.released - before.refused <=
          after.inflated + after.reported - before.inflated - before.reported);
    for (unsigned i = 0; i < ROM; i += 64)
        CHECK(rom[i] == 0x77);
    vmm_virtio_reset(driver.dev);
    return 0;
}
