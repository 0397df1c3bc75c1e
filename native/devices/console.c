/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Console: a log of what the guest wrote and a queue of what it has yet to read.
 *
 * The eventfds are levels kept under the lock, so they cannot be lost or left over whether or not their
 * reader also drains them: output_fd is readable while output lies past the pump's position, room_fd from the
 * moment room opens until a send falls short again, more_fd from when awaited output came until it is awaited again. A byte put behind others costs no system call.
 */
#include "console.h"
#include "base/thread.h"
#include "core/core.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define NO_PUMP UINT64_MAX

struct vmm_console {
    /* Innermost: nothing is called and no other lock is taken under it. */
    pthread_mutex_t lock;

    /*
     * The log: the newest `kept` bytes before absolute position `end`; the next goes to log[head]. It is
     * allocated whole and filled from the bottom, so the kernel grows it page by page: a quiet guest costs
     * one page.
     */
    uint8_t *log;
    size_t capacity, head, kept;
    uint64_t end;
    uint64_t pump;
    size_t high_water;
    bool refused; /* a put was turned down: on_room is owed */
    bool closed;
    bool awaited; /* somebody sleeps on `more`; cleared by the broadcast, so that a burst wakes once */
    pthread_cond_t more;
    uint64_t await_past; /* more_fd is owed when `end` passes it; UINT64_MAX: nobody waits there */

    uint8_t *input;
    size_t input_limit, input_head, input_count;
    bool room_wanted; /* a send fell short: room_fd is owed */

    void (*on_input)(void *opaque);
    void (*on_room)(void *opaque);
    void *opaque;
    unsigned calling; /* threads inside a listener; listen waits for them on `quiet` */
    pthread_cond_t quiet;

    int output_fd, room_fd, more_fd;
};

/* ---- eventfds as levels ------------------------------------------------------------------------------- */

/* Neither can fail in a way that matters: a full counter is readable, an empty one is not. */
static void level_raise(int fd)
{
    eventfd_write(fd, 1);
}

static void level_lower(int fd)
{
    eventfd_t count;
    eventfd_read(fd, &count);
}

/* ---- life --------------------------------------------------------------------------------------------- */

int vmm_console_create(size_t input_limit, size_t log_limit, size_t high_water, vmm_console **out)
{
    const size_t most = SIZE_MAX / 2; /* the sums below cannot wrap */
    if (input_limit == 0 || log_limit == 0 || high_water == 0 || high_water > log_limit ||
        input_limit > most || log_limit > most)
        return vmm_error_set(-EINVAL, "a console of %zu, %zu and %zu bytes", input_limit, log_limit,
                             high_water);
    vmm_console *console = calloc(1, sizeof *console);
    if (!console)
        return vmm_error_set(-ENOMEM, "a console");

    pthread_mutex_init(&console->lock, NULL);
    vmm_cond_init(&console->more);
    vmm_cond_init(&console->quiet);

    console->capacity = log_limit + VMM_CONSOLE_SLACK;
    console->high_water = high_water;
    console->pump = NO_PUMP;
    console->await_past = UINT64_MAX;
    console->input_limit = input_limit;
    console->log = malloc(console->capacity);
    console->input = malloc(input_limit + VMM_CONSOLE_SLACK);
    console->output_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    int error = console->output_fd < 0 ? errno : 0;
    console->room_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (console->room_fd < 0)
        error = errno;
    console->more_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (console->more_fd < 0)
        error = errno;
    if (!console->log || !console->input)
        error = ENOMEM;
    if (error) {
        vmm_console_destroy(console);
        return -error;
    }
    *out = console;
    return 0;
}

void vmm_console_destroy(vmm_console *console)
{
    if (!console)
        return;
    if (console->output_fd >= 0)
        close(console->output_fd);
    if (console->room_fd >= 0)
        close(console->room_fd);
    if (console->more_fd >= 0)
        close(console->more_fd);
    free(console->log);
    free(console->input);
    pthread_cond_destroy(&console->quiet);
    pthread_cond_destroy(&console->more);
    pthread_mutex_destroy(&console->lock);
    free(console);
}

/* ---- listeners ---------------------------------------------------------------------------------------- */

/* Takes the lock held and gives it back released: a listener takes its device's lock, which comes before
 * ours. */
static void unlock_and_call(vmm_console *console, void (*listener)(void *opaque))
{
    void *opaque = console->opaque;
    if (listener)
        console->calling++;
    pthread_mutex_unlock(&console->lock);
    if (!listener)
        return;
    listener(opaque);
    pthread_mutex_lock(&console->lock);
    if (--console->calling == 0)
        pthread_cond_broadcast(&console->quiet);
    pthread_mutex_unlock(&console->lock);
}

/* Returns only when no thread is inside the listeners it replaces: their opaque may be freed then. */
void vmm_console_listen(vmm_console *console, void (*on_input)(void *opaque), void (*on_room)(void *opaque),
                        void *opaque)
{
    pthread_mutex_lock(&console->lock);
    console->on_input = on_input;
    console->on_room = on_room;
    console->opaque = opaque;
    while (console->calling > 0)
        pthread_cond_wait(&console->quiet, &console->lock);
    pthread_mutex_unlock(&console->lock);
}

/* ---- output: the log ---------------------------------------------------------------------------------- */

static bool has_room(const vmm_console *console)
{
    return console->closed || console->pump == NO_PUMP || console->end - console->pump < console->high_water;
}

static void append(vmm_console *console, const uint8_t *bytes, size_t n)
{
    if (console->closed || n == 0)
        return; /* closed: whoever waited for output has been told that there is no more */
    if (console->end == console->pump)
        level_raise(console->output_fd);
    console->end += n;
    console->kept = n < console->capacity - console->kept ? console->kept + n : console->capacity;
    while (n > 0) {
        const size_t to_end = console->capacity - console->head;
        const size_t part = n < to_end ? n : to_end;
        memcpy(console->log + console->head, bytes, part);
        console->head = part < to_end ? console->head + part : 0;
        bytes += part;
        n -= part;
    }
    if (console->awaited) {
        console->awaited = false;
        pthread_cond_broadcast(&console->more);
    }
    if (console->end > console->await_past) {
        console->await_past = UINT64_MAX;
        level_raise(console->more_fd);
    }
}

size_t vmm_console_write(vmm_console *console, const uint8_t *bytes, size_t n)
{
    pthread_mutex_lock(&console->lock);
    size_t taken = n;
    if (!console->closed && console->pump != NO_PUMP) {
        const uint64_t ahead = console->end - console->pump; /* late bytes may lie beyond high_water */
        const size_t room = ahead < console->high_water ? console->high_water - (size_t)ahead : 0;
        taken = n < room ? n : room;
    }
    append(console, bytes, taken);
    if (taken < n)
        console->refused = true;
    pthread_mutex_unlock(&console->lock);
    return taken;
}

int vmm_console_put(vmm_console *console, uint8_t byte)
{
    return vmm_console_write(console, &byte, 1) == 1;
}

/* high_water <= log_limit, and the log is SLACK longer: a device that keeps to SLACK never meets this bound. */
void vmm_console_put_late(vmm_console *console, uint8_t byte)
{
    pthread_mutex_lock(&console->lock);
    if (console->pump == NO_PUMP || console->end - console->pump < console->capacity)
        append(console, &byte, 1);
    pthread_mutex_unlock(&console->lock);
}

int vmm_console_ready(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    const bool ready = has_room(console);
    if (!ready)
        console->refused = true;
    pthread_mutex_unlock(&console->lock);
    return ready;
}

size_t vmm_console_read(vmm_console *console, uint64_t *position, uint8_t *bytes, size_t n)
{
    pthread_mutex_lock(&console->lock);
    const uint64_t oldest = console->end - console->kept;
    if (*position < oldest)
        *position = oldest;
    const size_t available = *position < console->end ? (size_t)(console->end - *position) : 0;
    if (n > available)
        n = available;
    /* Byte `end - available` lies `available` before head; the copy is in two parts where the ring wraps. */
    const size_t start = (console->head + console->capacity - available) % console->capacity;
    const size_t first = n < console->capacity - start ? n : console->capacity - start;
    if (n > 0) {
        memcpy(bytes, console->log + start, first);
        memcpy(bytes + first, console->log, n - first);
    }
    pthread_mutex_unlock(&console->lock);
    *position += n;
    return n;
}

uint64_t vmm_console_end(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    const uint64_t end = console->end;
    pthread_mutex_unlock(&console->lock);
    return end;
}

int vmm_console_wait(vmm_console *console, uint64_t position, int timeout_ms)
{
    const struct timespec deadline = vmm_deadline(timeout_ms), *until = timeout_ms < 0 ? NULL : &deadline;
    pthread_mutex_lock(&console->lock);
    int error = 0;
    while (console->end <= position && !console->closed && error == 0 && timeout_ms != 0) {
        console->awaited = true;
        error = vmm_cond_wait_until(&console->more, &console->lock, until);
    }
    const bool more = console->end > position;
    pthread_mutex_unlock(&console->lock);
    return more;
}

int vmm_console_await(vmm_console *console, uint64_t position)
{
    pthread_mutex_lock(&console->lock);
    const bool due = console->end > position || console->closed;
    console->await_past = due ? UINT64_MAX : position;
    if (due)
        level_raise(console->more_fd);
    else
        level_lower(console->more_fd);
    pthread_mutex_unlock(&console->lock);
    return console->more_fd;
}

void vmm_console_set_pump(vmm_console *console, uint64_t position)
{
    pthread_mutex_lock(&console->lock);
    if (position != NO_PUMP && position > console->end)
        position = console->end;
    console->pump = position;
    if (position < console->end)
        level_raise(console->output_fd);
    else
        level_lower(console->output_fd);
    void (*owed)(void *) = NULL;
    if (console->refused && has_room(console)) {
        console->refused = false;
        owed = console->on_room;
    }
    unlock_and_call(console, owed);
}

int vmm_console_output_fd(vmm_console *console)
{
    return console->output_fd;
}

/* A pump that polls output_fd is woken too, once; a device whose put was refused may go on, into the void. */
void vmm_console_close(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    console->closed = true;
    console->awaited = false;
    pthread_cond_broadcast(&console->more);
    level_raise(console->output_fd);
    level_raise(console->more_fd);
    void (*owed)(void *) = console->refused ? console->on_room : NULL;
    console->refused = false;
    unlock_and_call(console, owed);
}

void vmm_console_reopen(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    console->closed = false;
    if (console->end <= console->pump) /* close raised it; NO_PUMP is beyond any end */
        level_lower(console->output_fd);
    level_lower(console->more_fd);
    pthread_mutex_unlock(&console->lock);
}

int vmm_console_closed(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    const bool closed = console->closed;
    pthread_mutex_unlock(&console->lock);
    return closed;
}

/* ---- input: a bounded queue --------------------------------------------------------------------------- */

/* What unget put back may lie beyond the limit. */
static size_t input_room(const vmm_console *console)
{
    return console->input_count < console->input_limit ? console->input_limit - console->input_count : 0;
}

static size_t input_index(const vmm_console *console, size_t from_head)
{
    return (console->input_head + from_head) % (console->input_limit + VMM_CONSOLE_SLACK);
}

size_t vmm_console_send(vmm_console *console, const uint8_t *bytes, size_t n)
{
    pthread_mutex_lock(&console->lock);
    const size_t room = input_room(console);
    const size_t taken = n < room ? n : room;
    const size_t start = input_index(console, console->input_count);
    const size_t to_end = console->input_limit + VMM_CONSOLE_SLACK - start;
    const size_t first = taken < to_end ? taken : to_end;
    if (taken > 0) {
        memcpy(console->input + start, bytes, first);
        memcpy(console->input, bytes + first, taken - first);
    }
    console->input_count += taken;
    if (taken < n) {
        console->room_wanted = true;
        level_lower(console->room_fd);
    }
    unlock_and_call(console, taken > 0 ? console->on_input : NULL);
    return taken;
}

size_t vmm_console_input_room(vmm_console *console)
{
    pthread_mutex_lock(&console->lock);
    const size_t room = input_room(console);
    pthread_mutex_unlock(&console->lock);
    return room;
}

int vmm_console_room_fd(vmm_console *console)
{
    return console->room_fd;
}

size_t vmm_console_take(vmm_console *console, uint8_t *bytes, size_t n)
{
    pthread_mutex_lock(&console->lock);
    const size_t taken = n < console->input_count ? n : console->input_count;
    const size_t to_end = console->input_limit + VMM_CONSOLE_SLACK - console->input_head;
    const size_t first = taken < to_end ? taken : to_end;
    if (taken > 0) {
        memcpy(bytes, console->input + console->input_head, first);
        memcpy(bytes + first, console->input, taken - first);
        console->input_head = input_index(console, taken);
        console->input_count -= taken;
        /* Half the queue at a time: a long paste wakes its sender once per half, not once per byte. */
        if (console->room_wanted && input_room(console) >= (console->input_limit + 1) / 2) {
            console->room_wanted = false;
            level_raise(console->room_fd);
        }
    }
    pthread_mutex_unlock(&console->lock);
    return taken;
}

int vmm_console_get(vmm_console *console)
{
    uint8_t byte;
    return vmm_console_take(console, &byte, 1) == 1 ? byte : -1;
}

void vmm_console_unget(vmm_console *console, const uint8_t *bytes, size_t n)
{
    pthread_mutex_lock(&console->lock);
    const size_t size = console->input_limit + VMM_CONSOLE_SLACK;
    for (size_t i = n; i > 0 && console->input_count < size; i--) {
        console->input_head = (console->input_head + size - 1) % size;
        console->input[console->input_head] = bytes[i - 1];
        console->input_count++;
    }
    pthread_mutex_unlock(&console->lock);
}
