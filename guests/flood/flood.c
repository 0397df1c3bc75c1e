/* SPDX-License-Identifier: Apache-2.0 */
/* Breaks a rule of virtio and resets, "n=" times: each time the monitor has a message. */
#include "cpu.h"
#include "virtio.h"

void guest_main(void)
{
    static struct virtio_device rng;
    cpu_init();
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_RNG, 0, &rng));
    const uint64_t n = argument("n", 2000);
    for (uint64_t i = 0; i < n; i++) {
        virtio_reset(&rng);
        virtio_set_status(&rng, VIRTIO_ACKNOWLEDGE);
        virtio_set_status(&rng, VIRTIO_DRIVER);
        virtqueue_enable(&rng, 0, 8, 0x200000, 0x201000, 0x202000); /* before FEATURES_OK */
    }
    print("flooded\n");
}
