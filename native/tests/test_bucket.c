/* SPDX-License-Identifier: Apache-2.0 */
/* Token buckets in a time of their own, and a limiter in the machine's. */
#include "machine.h"

#include "core/bucket.h"

#include <poll.h>
#include <time.h>

#define SECOND 1000000000ull

/* Takes of `n` until `until`, each as early as it may be. Answers how many there were. */
static uint64_t takes(struct vmm_bucket *b, uint64_t n, uint64_t from, uint64_t until)
{
    uint64_t count = 0;
    for (uint64_t now = from; now < until; count++) {
        vmm_bucket_take(b, n, now);
        now = vmm_bucket_opens(b, now);
    }
    return count;
}

static void test_a_second_goes_at_once_and_the_rest_at_the_rate(void)
{
    struct vmm_bucket b = {.rate = 100};
    const uint64_t start = 5 * SECOND;
    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(vmm_bucket_opens(&b, start), start);
        vmm_bucket_take(&b, 1, start);
    }
    CHECK(vmm_bucket_opens(&b, start) > start);
    b = (struct vmm_bucket){.rate = 100};
    const uint64_t count = takes(&b, 1, start, start + 10 * SECOND);
    CHECK(count >= 1099 && count <= 1101); /* the bucket and ten seconds of filling */
}

static void test_more_than_a_bucket_holds_passes_and_is_waited_off(void)
{
    struct vmm_bucket b = {.rate = 1000};
    vmm_bucket_take(&b, 10000, SECOND);
    CHECK_EQUAL(vmm_bucket_opens(&b, SECOND), SECOND + 9 * SECOND + 1);
    CHECK_EQUAL(vmm_bucket_opens(&b, 20 * SECOND), 20 * SECOND);
}

static void test_an_idle_bucket_holds_no_more_than_a_second(void)
{
    struct vmm_bucket b = {.rate = 10};
    CHECK(takes(&b, 1, 1000 * SECOND, 1000 * SECOND + 1) == 10);
}

static void test_extremes_do_not_wrap(void)
{
    struct vmm_bucket b = {.rate = 1};
    for (int i = 0; i < 64; i++)
        vmm_bucket_take(&b, UINT64_MAX, SECOND);
    CHECK(vmm_bucket_opens(&b, SECOND) > 1000000 * SECOND);
    b = (struct vmm_bucket){.rate = UINT64_MAX};
    vmm_bucket_take(&b, UINT32_MAX, SECOND);
    CHECK_EQUAL(vmm_bucket_opens(&b, SECOND), SECOND);
    b = (struct vmm_bucket){0};
    vmm_bucket_take(&b, UINT64_MAX, SECOND);
    CHECK_EQUAL(vmm_bucket_opens(&b, SECOND), SECOND);
}

static _Atomic int rang;
static void again(void *opaque)
{
    (void)opaque;
    rang++;
}

static void test_a_closed_limiter_calls_again(void)
{
    vmm_vm *vm = machine_create();
    struct vmm_limiter l;
    CHECK_EQUAL(vmm_limiter_init(&l, vmm_vm_loop(vm), 0, 50, again, NULL), 0);
    for (int round = 1; round <= 3; round++) {
        int n = 0;
        while (vmm_limiter_open(&l)) {
            vmm_limiter_charge(&l, 4096);
            CHECK(++n <= 51);
        }
        CHECK(!vmm_limiter_open(&l));
        CHECK_EQUAL(l.throttled, round); /* once for every time it was waited for */
        for (int i = 0; i < 1000 && rang < round; i++)
            poll(NULL, 0, 2);
        CHECK_EQUAL(rang, round);
    }
    vmm_vm_destroy(vm);
    vmm_limiter_deinit(&l);
}

static void test_no_limits_cost_no_descriptor(void)
{
    struct vmm_limiter l;
    CHECK_EQUAL(vmm_limiter_init(&l, NULL, 0, 0, again, NULL), 0);
    CHECK(vmm_limiter_open(&l) && !vmm_limiter_limits(&l));
    vmm_limiter_charge(&l, UINT64_MAX);
    CHECK(vmm_limiter_open(&l));
    vmm_limiter_deinit(&l);
}

int main(void)
{
    test_a_second_goes_at_once_and_the_rest_at_the_rate();
    test_more_than_a_bucket_holds_passes_and_is_waited_off();
    test_an_idle_bucket_holds_no_more_than_a_second();
    test_extremes_do_not_wrap();
    test_a_closed_limiter_calls_again();
    test_no_limits_cost_no_descriptor();
    puts("bucket: ok");
    return 0;
}
