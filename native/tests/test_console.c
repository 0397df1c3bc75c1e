/* SPDX-License-Identifier: Apache-2.0 */
#include "check.h"
#include "devices/console.h"
#include "threads.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

static vmm_console *create(size_t input_limit, size_t log_limit, size_t high_water)
{
    vmm_console *console = NULL;
    CHECK_EQUAL(vmm_console_create(input_limit, log_limit, high_water, &console), 0);
    return console;
}

static int readable(int fd, int timeout_ms)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    return poll(&poller, 1, timeout_ms);
}

static void limits_that_make_no_sense_are_refused(void)
{
    vmm_console *console = NULL;
    CHECK_EQUAL(vmm_console_create(0, 64, 64, &console), -EINVAL);
    CHECK_EQUAL(vmm_console_create(64, 0, 64, &console), -EINVAL);
    CHECK_EQUAL(vmm_console_create(64, 64, 0, &console), -EINVAL);
    CHECK_EQUAL(vmm_console_create(64, 64, 65, &console), -EINVAL);
    CHECK_EQUAL(vmm_console_create(SIZE_MAX, 64, 64, &console), -EINVAL);
    CHECK_EQUAL(vmm_console_create(64, SIZE_MAX, 64, &console), -EINVAL);
    CHECK(console == NULL);
    vmm_console_destroy(NULL);
}

static void a_reader_that_falls_behind_resumes_at_the_oldest_byte_kept(void)
{
    enum { LIMIT = 100, WRITTEN = 1000 };
    vmm_console *console = create(16, LIMIT, LIMIT);
    for (int i = 0; i < WRITTEN; i++)
        CHECK(vmm_console_put(console, (uint8_t)i));
    CHECK_EQUAL(vmm_console_end(console), WRITTEN);

    uint64_t position = 0;
    uint8_t bytes[WRITTEN];
    const size_t n = vmm_console_read(console, &position, bytes, sizeof bytes);
    CHECK(n >= LIMIT && n < WRITTEN);
    CHECK_EQUAL(position, WRITTEN);
    for (size_t i = 0; i < n; i++)
        CHECK_EQUAL(bytes[i], (uint8_t)(WRITTEN - n + i));

    /* Small reads across the wrap see the same bytes; one past the end sees none. */
    position = WRITTEN - n;
    for (size_t i = 0; i < n; i++) {
        uint8_t byte;
        CHECK_EQUAL(vmm_console_read(console, &position, &byte, 1), 1);
        CHECK_EQUAL(byte, bytes[i]);
    }
    CHECK_EQUAL(vmm_console_read(console, &position, bytes, sizeof bytes), 0);
    position = WRITTEN + 5;
    CHECK_EQUAL(vmm_console_read(console, &position, bytes, sizeof bytes), 0);
    CHECK_EQUAL(position, WRITTEN + 5);
    vmm_console_destroy(console);
}

static int rooms, inputs;
static void count_room(void *opaque)
{
    (void)opaque;
    rooms++;
}
static void count_input(void *opaque)
{
    (void)opaque;
    inputs++;
}

static void the_guest_waits_for_a_pump_that_is_high_water_behind(void)
{
    vmm_console *console = create(16, 64, 4);
    rooms = 0;
    vmm_console_listen(console, count_input, count_room, NULL);
    for (int i = 0; i < 10; i++)
        CHECK(vmm_console_put(console, 'x')); /* nobody pumps: the log rolls */
    vmm_console_set_pump(console, 10);
    for (int i = 0; i < 4; i++)
        CHECK(vmm_console_put(console, 'y'));
    CHECK_EQUAL(vmm_console_put(console, 'z'), 0);
    CHECK_EQUAL(vmm_console_end(console), 14);

    vmm_console_set_pump(console, 10);
    CHECK_EQUAL(rooms, 0);
    vmm_console_set_pump(console, 11);
    CHECK_EQUAL(rooms, 1);
    vmm_console_set_pump(console, 12);
    CHECK_EQUAL(rooms, 1); /* owed once per refusal */
    CHECK(vmm_console_put(console, 'z'));
    CHECK(vmm_console_put(console, 'z'));
    CHECK_EQUAL(vmm_console_ready(console), 0);
    vmm_console_set_pump(console, UINT64_MAX); /* the pump left */
    CHECK_EQUAL(rooms, 2);
    CHECK(vmm_console_ready(console));
    vmm_console_destroy(console);
}

static void late_bytes_never_overwrite_what_the_pump_has_to_read(void)
{
    vmm_console *console = create(16, 4, 4);
    vmm_console_set_pump(console, 0);
    for (int i = 0; i < 4; i++)
        CHECK(vmm_console_put(console, (uint8_t)i));
    for (int i = 4; i < 100; i++)
        vmm_console_put_late(console, (uint8_t)i);
    uint8_t bytes[100];
    uint64_t position = 0;
    CHECK_EQUAL(vmm_console_read(console, &position, bytes, sizeof bytes), 4 + VMM_CONSOLE_SLACK);
    for (unsigned i = 0; i < 4 + VMM_CONSOLE_SLACK; i++)
        CHECK_EQUAL(bytes[i], i);
    vmm_console_destroy(console);
}

static void output_fd_is_readable_exactly_while_the_pump_is_behind(void)
{
    vmm_console *console = create(16, 64, 64);
    const int fd = vmm_console_output_fd(console);
    vmm_console_put(console, 'a');
    CHECK_EQUAL(readable(fd, 0), 0); /* no pump */
    vmm_console_set_pump(console, 0);
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_set_pump(console, 1);
    CHECK_EQUAL(readable(fd, 0), 0);
    vmm_console_put(console, 'b');
    vmm_console_put(console, 'c');
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_set_pump(console, 2);
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_set_pump(console, 99); /* not a position yet: means "all" */
    CHECK_EQUAL(readable(fd, 0), 0);
    vmm_console_put(console, 'd');
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_destroy(console);
}

static void send_takes_what_there_is_room_for_and_room_fd_tells_when_to_go_on(void)
{
    vmm_console *console = create(8, 64, 64);
    const int fd = vmm_console_room_fd(console);
    inputs = 0;
    vmm_console_listen(console, count_input, count_room, NULL);
    CHECK_EQUAL(vmm_console_input_room(console), 8);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"0123456789", 10), 8);
    CHECK_EQUAL(inputs, 1);
    CHECK_EQUAL(vmm_console_input_room(console), 0);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"89", 2), 0);
    CHECK_EQUAL(inputs, 1);
    CHECK_EQUAL(readable(fd, 0), 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQUAL(vmm_console_get(console), '0' + i);
    CHECK_EQUAL(readable(fd, 0), 1);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"89abcd", 6), 4);
    CHECK_EQUAL(readable(fd, 0), 0);
    for (int i = 4; i < 10; i++)
        CHECK_EQUAL(vmm_console_get(console), '0' + i);
    CHECK_EQUAL(vmm_console_get(console), 'a');
    CHECK_EQUAL(vmm_console_get(console), 'b');
    CHECK_EQUAL(vmm_console_get(console), -1);
    vmm_console_destroy(console);
}

static void ungot_bytes_come_first_again_even_when_the_queue_is_full(void)
{
    vmm_console *console = create(4, 64, 64);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"abcd", 4), 4);
    uint8_t got[3];
    for (int i = 0; i < 3; i++)
        got[i] = (uint8_t)vmm_console_get(console);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"efg", 3), 3);
    vmm_console_unget(console, got, 3);
    CHECK_EQUAL(vmm_console_input_room(console), 0);
    CHECK_EQUAL(vmm_console_send(console, (const uint8_t *)"h", 1), 0);
    for (int i = 0; i < 7; i++)
        CHECK_EQUAL(vmm_console_get(console), "abcdefg"[i]);
    CHECK_EQUAL(vmm_console_get(console), -1);
    vmm_console_destroy(console);
}

static void *wait_for_ever(void *opaque)
{
    return vmm_console_wait(opaque, 1, -1) ? opaque : NULL;
}

static void closing_releases_everybody_who_waits(void)
{
    vmm_console *console = create(16, 64, 1);
    vmm_console_set_pump(console, 0);
    vmm_console_put(console, 'a');
    CHECK_EQUAL(vmm_console_wait(console, 0, 0), 1);
    CHECK_EQUAL(vmm_console_wait(console, 1, 0), 0);
    CHECK_EQUAL(vmm_console_wait(console, 1, 20), 0);
    CHECK_EQUAL(vmm_console_put(console, 'b'), 0);
    rooms = 0;
    vmm_console_listen(console, NULL, count_room, NULL);
    vmm_console_set_pump(console, 1);
    CHECK_EQUAL(rooms, 1);

    pthread_t waiters[3];
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(pthread_create(&waiters[i], NULL, wait_for_ever, console), 0);
    vmm_console_close(console);
    for (int i = 0; i < 3; i++) {
        void *more;
        pthread_join(waiters[i], &more);
        CHECK(more == NULL);
    }
    CHECK_EQUAL(readable(vmm_console_output_fd(console), 0), 1);
    CHECK(vmm_console_put(console, 'c')); /* the guest must not hang, and waiters were told: no more */
    CHECK_EQUAL(vmm_console_end(console), 1);
    vmm_console_destroy(console);
}

static void closing_lets_a_refused_device_go_on(void)
{
    vmm_console *console = create(16, 64, 1);
    rooms = 0;
    vmm_console_listen(console, NULL, count_room, NULL);
    vmm_console_set_pump(console, 0);
    CHECK(vmm_console_put(console, 'a'));
    CHECK_EQUAL(vmm_console_put(console, 'b'), 0);
    vmm_console_close(console);
    CHECK_EQUAL(rooms, 1);
    CHECK(vmm_console_ready(console));
    vmm_console_destroy(console);
}

static pid_t waiter;

static void *put_when_waited_for(void *opaque)
{
    await_asleep(waiter);
    vmm_console_put(opaque, 'x');
    return NULL;
}

static void a_waiter_is_woken_by_the_byte_and_not_by_its_deadline(void)
{
    vmm_console *console = create(16, 64, 64);
    pthread_t thread;
    struct timespec start, end;
    waiter = this_thread();
    CHECK_EQUAL(pthread_create(&thread, NULL, put_when_waited_for, console), 0);
    clock_gettime(CLOCK_MONOTONIC, &start);
    CHECK_EQUAL(vmm_console_wait(console, 0, 600000), 1);
    clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(end.tv_sec - start.tv_sec < 300);
    pthread_join(thread, NULL);
    vmm_console_destroy(console);
}

/* A guest, a pump that polls, a watcher that waits, a sender that polls: a lost wake-up hangs, or fails the
 * poll. */
enum { STREAM = 400000 };
static atomic_int room_came;

static void wake_guest(void *opaque)
{
    (void)opaque;
    atomic_store(&room_came, 1);
}

static void *guest(void *opaque)
{
    for (uint32_t sent = 0, got = 0; sent < STREAM || got < STREAM;) {
        if (sent < STREAM) {
            atomic_store(&room_came, 0);
            if (vmm_console_put(opaque, (uint8_t)(sent * 31)))
                sent++;
            else
                while (!atomic_load(&room_came))
                    sched_yield();
        }
        const int byte = vmm_console_get(opaque);
        if (byte >= 0)
            CHECK_EQUAL(byte, (uint8_t)(got++ * 17));
        else if (sent == STREAM)
            sched_yield();
    }
    return NULL;
}

static void *pump(void *opaque)
{
    uint64_t position = 0;
    uint8_t bytes[700];
    while (position < STREAM) {
        CHECK_EQUAL(readable(vmm_console_output_fd(opaque), PATIENCE_MS), 1);
        uint64_t at = position;
        const size_t n = vmm_console_read(opaque, &position, bytes, sizeof bytes);
        CHECK(n > 0);
        for (size_t i = 0; i < n; i++, at++)
            CHECK_EQUAL(bytes[i], (uint8_t)(at * 31));
        CHECK_EQUAL(at, position);
        vmm_console_set_pump(opaque, position);
    }
    return NULL;
}

static void *watcher(void *opaque)
{
    for (uint64_t position = 0; position < STREAM; position = vmm_console_end(opaque))
        CHECK_EQUAL(vmm_console_wait(opaque, position, PATIENCE_MS), 1);
    return NULL;
}

static void *sender(void *opaque)
{
    uint8_t bytes[1000];
    for (uint32_t sent = 0; sent < STREAM;) {
        const uint32_t n = STREAM - sent < sizeof bytes ? STREAM - sent : sizeof bytes;
        for (uint32_t i = 0; i < n; i++)
            bytes[i] = (uint8_t)((sent + i) * 17);
        const size_t taken = vmm_console_send(opaque, bytes, n);
        sent += (uint32_t)taken;
        if (taken < n)
            CHECK_EQUAL(readable(vmm_console_room_fd(opaque), PATIENCE_MS), 1);
    }
    return NULL;
}

static void more_fd_is_readable_from_the_awaited_byte_on_until_it_is_awaited_again(void)
{
    vmm_console *console = create(16, 64, 64);
    CHECK(vmm_console_put(console, 'a'));
    int fd = vmm_console_await(console, 0); /* it is there already */
    CHECK_EQUAL(readable(fd, 0), 1);
    CHECK_EQUAL(vmm_console_await(console, 1), fd);
    CHECK_EQUAL(readable(fd, 0), 0);
    CHECK(vmm_console_put(console, 'b'));
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_await(console, 4); /* not the next byte: those behind position 4 */
    CHECK(vmm_console_put(console, 'c'));
    CHECK(vmm_console_put(console, 'd'));
    CHECK_EQUAL(readable(fd, 0), 0);
    CHECK(vmm_console_put(console, 'e'));
    CHECK_EQUAL(readable(fd, 0), 1);

    vmm_console_await(console, 5);
    CHECK_EQUAL(vmm_console_closed(console), 0);
    vmm_console_close(console);
    CHECK_EQUAL(vmm_console_closed(console), 1);
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_await(console, 5); /* nothing will come, which is news too */
    CHECK_EQUAL(readable(fd, 0), 1);
    vmm_console_reopen(console);
    CHECK_EQUAL(readable(fd, 0), 0);
    CHECK_EQUAL(readable(vmm_console_output_fd(console), 0), 0);
    vmm_console_await(console, 5);
    CHECK(vmm_console_put(console, 'f'));
    CHECK_EQUAL(readable(fd, 0), 1);
    CHECK_EQUAL(vmm_console_end(console), 6);
    vmm_console_destroy(console);
}

static void no_wake_up_is_lost_and_no_byte_either(void)
{
    vmm_console *console = create(600, 5000, 900);
    vmm_console_set_pump(console, 0);
    vmm_console_listen(console, NULL, wake_guest, NULL);
    void *(*const roles[])(void *) = {guest, pump, watcher, watcher, sender};
    pthread_t threads[5];
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, roles[i], console), 0);
    for (int i = 0; i < 5; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(vmm_console_end(console), STREAM);
    vmm_console_destroy(console);
}

static void many_bytes_at_once_keep_to_the_same_limits_as_one_at_a_time(void)
{
    vmm_console *console = create(20, 64, 10);
    uint8_t bytes[200], got[200];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)i;
    vmm_console_set_pump(console, 0);
    vmm_console_listen(console, NULL, wake_guest, NULL);
    atomic_store(&room_came, 0);
    CHECK_EQUAL(vmm_console_write(console, bytes, 4), 4);
    CHECK_EQUAL(vmm_console_write(console, bytes + 4, 196), 6);
    CHECK_EQUAL(vmm_console_write(console, bytes, 1), 0);
    vmm_console_set_pump(console, 3);
    CHECK(atomic_load(&room_came));
    CHECK_EQUAL(vmm_console_write(console, bytes + 10, 190), 3);
    uint64_t position = 0;
    CHECK_EQUAL(vmm_console_read(console, &position, got, sizeof got), 13);
    CHECK(memcmp(got, bytes, 13) == 0);

    /* Without a pump more than the whole log fits: its newest bytes are kept, whichever way they wrap. */
    vmm_console_set_pump(console, UINT64_MAX);
    CHECK_EQUAL(vmm_console_write(console, bytes + 13, 187), 187);
    position = 0;
    CHECK_EQUAL(vmm_console_read(console, &position, got, sizeof got), 64 + VMM_CONSOLE_SLACK);
    CHECK_EQUAL(position, 200);
    CHECK(memcmp(got, bytes + 200 - 64 - VMM_CONSOLE_SLACK, 64 + VMM_CONSOLE_SLACK) == 0);

    for (size_t round = 0; round < 9; round++) { /* 36 slots, so that a take wraps in every third round */
        CHECK_EQUAL(vmm_console_send(console, bytes, 30), 20);
        CHECK_EQUAL(readable(vmm_console_room_fd(console), 0), 0);
        CHECK_EQUAL(vmm_console_take(console, got, 7), 7);
        CHECK_EQUAL(vmm_console_take(console, got + 7, sizeof got - 7), 13);
        CHECK(memcmp(got, bytes, 20) == 0);
        CHECK_EQUAL(readable(vmm_console_room_fd(console), 0), 1);
        CHECK_EQUAL(vmm_console_take(console, got, 1), 0);
    }
    vmm_console_destroy(console);
}

static atomic_int inside, left;
static void dawdle(void *opaque)
{
    (void)opaque;
    atomic_store(&inside, 1);
    await_asleep(waiter); /* it is not: then listen has returned too early, and the check after it fails */
    atomic_store(&left, 1);
}
static void *send_one(void *opaque)
{
    vmm_console_send(opaque, (const uint8_t *)"x", 1);
    return NULL;
}

static void a_listener_is_left_before_listen_returns(void)
{
    vmm_console *console = create(16, 64, 64);
    vmm_console_listen(console, dawdle, NULL, NULL);
    waiter = this_thread();
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, send_one, console), 0);
    while (!atomic_load(&inside))
        sched_yield();
    vmm_console_listen(console, NULL, NULL, NULL);
    CHECK(atomic_load(&left));
    pthread_join(thread, NULL);
    vmm_console_destroy(console);
}

int main(void)
{
    limits_that_make_no_sense_are_refused();
    a_reader_that_falls_behind_resumes_at_the_oldest_byte_kept();
    the_guest_waits_for_a_pump_that_is_high_water_behind();
    late_bytes_never_overwrite_what_the_pump_has_to_read();
    output_fd_is_readable_exactly_while_the_pump_is_behind();
    send_takes_what_there_is_room_for_and_room_fd_tells_when_to_go_on();
    ungot_bytes_come_first_again_even_when_the_queue_is_full();
    closing_releases_everybody_who_waits();
    closing_lets_a_refused_device_go_on();
    a_waiter_is_woken_by_the_byte_and_not_by_its_deadline();
    more_fd_is_readable_from_the_awaited_byte_on_until_it_is_awaited_again();
    no_wake_up_is_lost_and_no_byte_either();
    many_bytes_at_once_keep_to_the_same_limits_as_one_at_a_time();
    a_listener_is_left_before_listen_returns();
    return 0;
}
