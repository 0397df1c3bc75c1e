/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-console: whatever the guest offers, no byte of input is lost while the device lives, and output is bounded. */
#include "driven.h"
#include "vmmvconsole.h"

enum { INPUT = 256, LOG = 1 << 16, HIGH_WATER = 5000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static vmm_vm *vm;
    static vmm_console *console;
    static vmm_vconsole *device;
    static struct driver driver;
    if (!vm) {
        vm = machine_create();
        CHECK(vmm_console_create(INPUT, LOG, HIGH_WATER, &console) == 0);
        CHECK(vmm_vconsole_create(vm, "virtio-console0", console, 80, 25, &device) == 0);
    }
    struct input in = {data, data + size};
    driver_start(&driver, vm, vmm_vconsole_virtio(device), 1, take_flavour(&in));
    uint64_t pumped = vmm_console_end(console);
    vmm_console_set_pump(console, pumped);
    while (in.at < in.end) {
        const uint8_t op = (uint8_t)take(&in, 1);
        const unsigned queue = op >> 4 & 1;
        switch (op & 7) {
        case 0:
            guest_offers(&driver, queue, queue == 0, 1 << 20, &in);
            break;
        case 1:
            guest_fills(&driver, &in);
            break;
        case 2:
            guest_scribbles(&driver, queue, &in);
            break;
        case 3:
            guest_configures(&driver, &in);
            break;
        case 4:
            vmm_console_send(console, in.at, (size_t)(in.end - in.at) < op ? (size_t)(in.end - in.at) : op);
            break;
        case 5:
            pumped += take(&in, 2);
            pumped = pumped < vmm_console_end(console) ? pumped : vmm_console_end(console);
            vmm_console_set_pump(console, pumped);
            break;
        case 6:
            if (op & 8)
                vmm_virtio_load_own(driver.dev, (uint64_t[VMM_VIRTIO_OWN]){take(&in, 4)});
            else
                vmm_vconsole_resize(device, (uint16_t)take(&in, 2), (uint16_t)take(&in, 2));
            break;
        case 7:
            doorbells(&driver);
            break;
        }
    }
    const size_t before = INPUT - vmm_console_input_room(console);
    doorbells(&driver);
    CHECK(vmm_console_end(console) - pumped <= HIGH_WATER);
    CHECK(INPUT - vmm_console_input_room(console) <= before);
    vmm_virtio_reset(driver.dev);
    while (vmm_console_get(console) >= 0)
        ;
    return 0;
}
