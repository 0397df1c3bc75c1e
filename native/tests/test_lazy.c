/* SPDX-License-Identifier: Apache-2.0 */
/* Lazy guest memory: touched by threads and by the kernel, filled from files and sockets. */
#include "machine.h"

#include "time/lazy.h"
#include "vmmsnapshot.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define PAGES (MACHINE_RAM / VMM_PAGE) /* of each of the two regions */
#define HIGH_OFFSET MACHINE_RAM        /* of the second in the file */

static uint64_t all[PAGES / 64], none[PAGES / 64];

/* What the page at gpa is to hold: its address in every word, so that no two are alike. */
static void fill(uint64_t gpa, uint64_t *page)
{
    for (unsigned i = 0; i < VMM_PAGE / 8; i++)
        page[i] = gpa ^ (uint64_t)i << 48;
}

static bool right(const uint64_t *page, uint64_t gpa)
{
    uint64_t wanted[VMM_PAGE / 8];
    fill(gpa, wanted);
    return memcmp(page, wanted, VMM_PAGE) == 0;
}

static uint64_t gpa_of(uint64_t page)
{
    return page < PAGES ? page * VMM_PAGE : MACHINE_HIGH + (page - PAGES) * VMM_PAGE;
}

static int snapshot_file(void)
{
    const int fd = memfd_create("snapshot", MFD_CLOEXEC);
    uint64_t page[VMM_PAGE / 8];
    CHECK(fd >= 0);
    for (uint64_t i = 0; i < 2 * PAGES; i++) {
        fill(gpa_of(i), page);
        CHECK_EQUAL(pwrite(fd, page, VMM_PAGE, (off_t)(i * VMM_PAGE)), VMM_PAGE);
    }
    return fd;
}

static void said(void *opaque, const char *text)
{
    snprintf(opaque, 240, "%s", text);
}

static char message[240];

static vmm_lazy *lazy_create(vmm_vm *vm)
{
    vmm_lazy *l;
    message[0] = 0;
    vmm_vm_on_message(vm, said, message);
    CHECK_EQUAL(vmm_lazy_create(vm, &l), 0);
    CHECK_EQUAL(vmm_lazy_want(l, 0, all), 0);
    CHECK_EQUAL(vmm_lazy_want(l, 1, all), 0);
    return l;
}

static vmm_lazy *from_file(vmm_vm *vm, int fd)
{
    vmm_lazy *l = lazy_create(vm);
    CHECK_EQUAL(vmm_lazy_from_file(l, 0, fd, 0), 0);
    CHECK_EQUAL(vmm_lazy_from_file(l, 1, fd, HIGH_OFFSET), 0);
    CHECK_EQUAL(vmm_lazy_start(l), 0);
    return l;
}

static vmm_lazy_stats stats_of(vmm_lazy *l)
{
    vmm_lazy_stats stats;
    vmm_lazy_get_stats(l, &stats);
    return stats;
}

/* ---- a file ---- */

static void test_a_page_comes_when_it_is_touched_and_only_then(int fd)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = from_file(vm, fd);
    const uint64_t touched[] = {MACHINE_HIGH + 5 * VMM_PAGE, 0x3000, 0xffff000 % MACHINE_RAM, 0x3000};
    for (unsigned i = 0; i < 4; i++)
        CHECK(right(machine_at(vm, touched[i], VMM_PAGE), touched[i]));
    const vmm_lazy_stats stats = stats_of(l);
    CHECK_EQUAL(stats.wanted - stats.missing, 3);
    CHECK_EQUAL(stats.faults, 3);
    uint64_t order[8];
    CHECK_EQUAL(vmm_lazy_order(l, order, 8), 3);
    CHECK(memcmp(order, touched, 3 * sizeof(*order)) == 0);
    CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_SERVING);
    vmm_vm_destroy(vm);
}

static void test_the_kernel_waits_for_a_page_as_a_thread_does(int fd)
{
    vmm_vm *vm = machine_create();
    from_file(vm, fd);
    const int file = memfd_create("out", MFD_CLOEXEC);
    uint64_t page[VMM_PAGE / 8];
    CHECK_EQUAL(write(file, machine_at(vm, 0x7000, VMM_PAGE), VMM_PAGE), VMM_PAGE);
    CHECK_EQUAL(pread(file, page, VMM_PAGE, 0), VMM_PAGE);
    CHECK(right(page, 0x7000));
    CHECK_EQUAL(pread(file, machine_at(vm, 0x9008, 8), 8, 0),
                8); /* into the midst of a page: the rest comes too */
    const uint64_t *mixed = machine_at(vm, 0x9000, VMM_PAGE);
    fill(0x9000, page);
    page[1] = 0x7000;
    CHECK(memcmp(mixed, page, VMM_PAGE) == 0);
    close(file);
    vmm_vm_destroy(vm);
}

static void test_a_page_that_is_not_wanted_is_zeros_and_so_is_one_given_back(int fd)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l;
    uint64_t one[PAGES / 64] = {[2] = 1};
    CHECK_EQUAL(vmm_lazy_create(vm, &l), 0);
    CHECK_EQUAL(vmm_lazy_want(l, 0, one), 0);
    CHECK_EQUAL(vmm_lazy_want(l, 1, one), 0);
    CHECK_EQUAL(vmm_lazy_from_file(l, 0, fd, 0), 0);
    CHECK_EQUAL(vmm_lazy_from_file(l, 1, fd, HIGH_OFFSET), 0);
    CHECK_EQUAL(vmm_lazy_start(l), 0);
    uint64_t *never = machine_at(vm, 0x5000, VMM_PAGE), *wanted = machine_at(vm, 128 * VMM_PAGE, VMM_PAGE);
    CHECK_EQUAL(never[7], 0);
    CHECK(right(wanted, 128 * VMM_PAGE));
    CHECK_EQUAL(madvise(wanted, VMM_PAGE, MADV_REMOVE), 0); /* as a balloon does */
    CHECK_EQUAL(wanted[7], 0);
    CHECK(right(machine_at(vm, MACHINE_HIGH + 128 * VMM_PAGE, VMM_PAGE), MACHINE_HIGH + 128 * VMM_PAGE));
    CHECK_EQUAL(vmm_lazy_wait(l, 10000), 1);
    vmm_vm_destroy(vm);
}

static void test_what_memory_had_before_is_dropped(int fd)
{
    vmm_vm *vm = machine_create();
    memset(machine_at(vm, 0, 0x10000), 0xee, 0x10000);
    vmm_lazy *l = from_file(vm, fd);
    CHECK(right(machine_at(vm, 0x4000, VMM_PAGE), 0x4000));
    CHECK_EQUAL(stats_of(l).repeated, 0);
    vmm_vm_destroy(vm);
}

static void test_the_list_is_fetched_first_then_the_rest(int fd)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = from_file(vm, fd);
    const uint64_t list[] = {0x30000, MACHINE_HIGH, 0x123, 0x20000, 1ull << 60, 0x30000};
    CHECK_EQUAL(vmm_lazy_prefetch(l, list, 6), 0);
    CHECK_EQUAL(vmm_lazy_prefetch(l, list, 1), -EEXIST);
    for (int i = 0; i < 2000 && stats_of(l).unasked < 3; i++)
        poll(NULL, 0, 1);
    vmm_lazy_stats stats = stats_of(l);
    CHECK_EQUAL(stats.unasked, 3);
    CHECK_EQUAL(stats.missing, 2 * PAGES - 3);
    CHECK(right(machine_at(vm, 0x30000, VMM_PAGE), 0x30000));
    CHECK_EQUAL(stats_of(l).faults, 0);
    vmm_lazy_fetch_rest(l);
    CHECK_EQUAL(vmm_lazy_wait(l, 60000), 1);
    CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_DONE);
    for (uint64_t page = 0; page < 2 * PAGES; page++)
        CHECK(right(machine_at(vm, gpa_of(page), VMM_PAGE), gpa_of(page)));
    stats = stats_of(l);
    CHECK_EQUAL(stats.faults, 0);
    CHECK_EQUAL(stats.unasked, 2 * PAGES);
    CHECK_EQUAL(vmm_lazy_order(l, NULL, 0), 0);
    CHECK_EQUAL(vmm_lazy_connect(l, 0), -EBUSY);
    vmm_vm_destroy(vm);
}

struct toucher {
    vmm_vm *vm;
    uint64_t seed;
};

/* Adds one to a counter in every page, in an order of its own: a page installed twice loses counts. */
static void *touch(void *opaque)
{
    const struct toucher *t = opaque;
    for (uint64_t i = 0; i < 2 * PAGES; i++) {
        const uint64_t page = (i * 4099 + t->seed * 997) % (2 * PAGES); /* 4099 is prime: each page once */
        _Atomic uint64_t *word = machine_at(t->vm, gpa_of(page) + 8, 8);
        atomic_fetch_add(word, 1);
    }
    return NULL;
}

static void test_threads_that_touch_every_page_find_each_installed_once(int fd)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = from_file(vm, fd);
    pthread_t threads[4];
    struct toucher touchers[4];
    for (unsigned i = 0; i < 4; i++) {
        touchers[i] = (struct toucher){vm, i};
        CHECK_EQUAL(pthread_create(&threads[i], NULL, touch, &touchers[i]), 0);
    }
    vmm_lazy_fetch_rest(l);
    for (unsigned i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(vmm_lazy_wait(l, 60000), 1);
    for (uint64_t page = 0; page < 2 * PAGES; page++)
        CHECK_EQUAL(*(uint64_t *)machine_at(vm, gpa_of(page) + 8, 8), (gpa_of(page) ^ 1ull << 48) + 4);
    vmm_vm_destroy(vm);
}

static void test_a_file_that_ends_too_early_is_a_lost_source(void)
{
    vmm_vm *vm = machine_create();
    const int empty = memfd_create("empty", MFD_CLOEXEC);
    vmm_lazy *l = from_file(vm, empty);
    vmm_lazy_fetch_rest(l);
    struct pollfd event = {.fd = vmm_lazy_fd(l), .events = POLLIN};
    CHECK_EQUAL(poll(&event, 1, 10000), 1);
    for (int i = 0; i < 2000 && vmm_lazy_state(l) != VMM_LAZY_LOST; i++)
        poll(NULL, 0, 1);
    CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_LOST);
    CHECK(strstr(message, "ends too early"));
    CHECK_EQUAL(vmm_lazy_wait(l, 1), 0);
    close(empty);
    vmm_vm_destroy(vm);
}

/* ---- a socket ---- */

struct answer {
    uint64_t gpa;
    uint32_t kind, reserved;
    uint64_t page[VMM_PAGE / 8];
};

static bool send_page(int socket, uint64_t gpa, uint32_t kind)
{
    struct answer answer = {.gpa = gpa, .kind = kind};
    fill(gpa, answer.page);
    const size_t n = 16 + (kind ? VMM_PAGE : 0);
    return send(socket, &answer, n, MSG_NOSIGNAL) == (ssize_t)n;
}

struct server {
    int socket;
    unsigned answers; /* then it is gone */
    unsigned served;
};

/* Twice every second page, and one that nobody asked for. */
static void *answer(void *opaque)
{
    struct server *s = opaque;
    uint64_t gpa;
    while (s->served < s->answers && recv(s->socket, &gpa, 8, MSG_WAITALL) == 8) {
        s->served++;
        if (!send_page(s->socket, gpa, 1) || (s->served % 2 && !send_page(s->socket, gpa, 1)) ||
            !send_page(s->socket, (gpa + 37 * VMM_PAGE) % MACHINE_RAM, 1))
            break;
    }
    shutdown(s->socket, SHUT_RDWR);
    return NULL;
}

static void begin(struct server *s, pthread_t *thread, vmm_lazy *l, unsigned answers)
{
    int pair[2];
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    *s = (struct server){.socket = pair[1], .answers = answers};
    CHECK_EQUAL(vmm_lazy_connect(l, pair[0]), 0);
    close(pair[0]);
    CHECK_EQUAL(pthread_create(thread, NULL, answer, s), 0);
}

static void test_a_socket_that_drops_again_and_again_loses_and_doubles_nothing(void)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = lazy_create(vm);
    CHECK_EQUAL(vmm_lazy_start(l), 0);
    pthread_t toucher, thread;
    struct toucher t = {vm, 1};
    struct server s;
    CHECK_EQUAL(pthread_create(&toucher, NULL, touch, &t), 0);
    vmm_lazy_fetch_rest(l);
    unsigned drops = 0;
    for (; vmm_lazy_wait(l, 0) == 0; drops++) {
        begin(&s, &thread, l, 100 + drops * 100);
        pthread_join(thread, NULL);
        while (vmm_lazy_state(l) == VMM_LAZY_SERVING)
            poll(NULL, 0, 1);
        close(s.socket);
        CHECK(drops < 1000);
    }
    CHECK(drops > 3);
    CHECK(strstr(message, "has closed its socket"));
    pthread_join(toucher, NULL);
    for (uint64_t page = 0; page < 2 * PAGES; page++)
        CHECK_EQUAL(*(uint64_t *)machine_at(vm, gpa_of(page) + 8, 8), (gpa_of(page) ^ 1ull << 48) + 1);
    CHECK(stats_of(l).repeated > 0);
    vmm_vm_destroy(vm);
}

static void test_a_server_that_breaks_the_protocol_is_lost(void)
{
    const struct answer wrong[] = {
        {.gpa = 0x1000, .kind = 2},
        {.gpa = 0x1000, .kind = 1, .reserved = 1},
        {.gpa = 0x1008, .kind = 1},
        {.gpa = MACHINE_RAM, .kind = 1},
        {.gpa = UINT64_MAX & ~0xfffull, .kind = 0},
    };
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        vmm_vm *vm = machine_create();
        vmm_lazy *l = lazy_create(vm);
        int pair[2];
        CHECK_EQUAL(vmm_lazy_start(l), 0);
        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
        CHECK_EQUAL(vmm_lazy_connect(l, pair[0]), 0);
        CHECK(send_page(pair[1], 0x2000, 1) && send_page(pair[1], 0x3000, 0));
        CHECK_EQUAL(send(pair[1], &wrong[i], 16, MSG_NOSIGNAL), 16);
        for (int n = 0; n < 2000 && vmm_lazy_state(l) != VMM_LAZY_LOST; n++)
            poll(NULL, 0, 1);
        CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_LOST);
        CHECK(strstr(message, "sent what is no page"));
        CHECK(right(machine_at(vm, 0x2000, VMM_PAGE), 0x2000)); /* what came before it holds */
        CHECK_EQUAL(*(uint64_t *)machine_at(vm, 0x3010, 8), 0);
        CHECK_EQUAL(stats_of(l).missing, 2 * PAGES - 2);
        close(pair[0]);
        close(pair[1]);
        vmm_vm_destroy(vm);
    }
}

/* ---- the end ---- */

static void *read_word(void *opaque)
{
    return (void *)(uintptr_t) * (volatile uint64_t *)opaque;
}

static void test_abandoning_stops_the_machine_and_lets_waiters_go(void)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = lazy_create(vm);
    CHECK_EQUAL(vmm_lazy_start(l), 0);
    CHECK_EQUAL(vmm_lazy_start(l), -EBUSY);
    CHECK_EQUAL(vmm_lazy_want(l, 0, none), -EBUSY);
    pthread_t thread;
    void *word;
    CHECK_EQUAL(pthread_create(&thread, NULL, read_word, machine_at(vm, 0x6000, 8)), 0);
    while (!stats_of(l).faults)
        poll(NULL, 0, 1);
    vmm_lazy_abandon(l, "the other side is gone");
    pthread_join(thread, &word);
    uint64_t code;
    uint32_t vcpu;
    CHECK_EQUAL(vmm_vm_stop_reason(vm, &code, &vcpu), VMM_STOP_MEMORY);
    CHECK(strstr(message, "the other side is gone"));
    CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_ABANDONED);
    CHECK_EQUAL(vmm_lazy_wait(l, -1), -ECANCELED);
    CHECK_EQUAL(vmm_lazy_connect(l, 0), -EBUSY);
    vmm_vm_destroy(vm);
}

static void test_a_machine_that_is_stopped_while_its_source_is_gone_waits_no_more(void)
{
    vmm_vm *vm = machine_create();
    vm->stop_fd = eventfd(0, EFD_CLOEXEC);
    const int empty = memfd_create("empty", MFD_CLOEXEC);
    vmm_lazy *l = from_file(vm, empty);
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, read_word, machine_at(vm, 0x6000, 8)), 0);
    for (int i = 0; i < 2000 && vmm_lazy_state(l) != VMM_LAZY_LOST; i++)
        poll(NULL, 0, 1);
    CHECK_EQUAL(vmm_lazy_state(l), VMM_LAZY_LOST);
    vmm_vm_stop(vm, VMM_STOP_HOST, 7);
    pthread_join(thread, NULL);
    uint64_t code;
    uint32_t vcpu;
    CHECK_EQUAL(vmm_vm_stop_reason(vm, &code, &vcpu), VMM_STOP_HOST); /* the first reason stays */
    CHECK_EQUAL(vmm_lazy_wait(l, -1), -ECANCELED);
    close(empty);
    vmm_vm_destroy(vm);
}

static void test_the_end_of_the_machine_lets_waiters_go(void)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l = lazy_create(vm), *second;
    CHECK_EQUAL(vmm_lazy_create(vm, &second), -EEXIST);
    CHECK_EQUAL(vmm_lazy_start(l), 0);
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, read_word, machine_at(vm, 0x6000, 8)), 0);
    while (!stats_of(l).faults)
        poll(NULL, 0, 1);
    vmm_lazy_destroy(vm->lazy);
    vm->lazy = NULL;
    pthread_join(thread, NULL);
    vmm_vm_destroy(vm);
}

static void test_memory_that_cannot_come_later_is_refused(void)
{
    vmm_vm *vm = machine_create();
    vmm_lazy *l;
    vm->regions[1].flags = VMM_MEMORY_PRIVATE;
    CHECK_EQUAL(vmm_lazy_create(vm, &l), -ENOTSUP);
    CHECK(!l && !vm->lazy);
    vmm_vm_destroy(vm);
}

int main(void)
{
    memset(all, 0xff, sizeof(all));
    vmm_vm *vm = machine_create();
    vmm_lazy *l;
    const int rc = vmm_lazy_create(vm, &l);
    vmm_vm_destroy(vm);
    if (rc == -EPERM || rc == -ENOSYS) {
        printf("lazy: skipped: %s\n", vmm_error_text());
        return 77;
    }
    const int fd = snapshot_file();
    test_a_page_comes_when_it_is_touched_and_only_then(fd);
    test_the_kernel_waits_for_a_page_as_a_thread_does(fd);
    test_a_page_that_is_not_wanted_is_zeros_and_so_is_one_given_back(fd);
    test_what_memory_had_before_is_dropped(fd);
    test_the_list_is_fetched_first_then_the_rest(fd);
    test_threads_that_touch_every_page_find_each_installed_once(fd);
    test_a_file_that_ends_too_early_is_a_lost_source();
    test_a_socket_that_drops_again_and_again_loses_and_doubles_nothing();
    test_a_server_that_breaks_the_protocol_is_lost();
    test_abandoning_stops_the_machine_and_lets_waiters_go();
    test_a_machine_that_is_stopped_while_its_source_is_gone_waits_no_more();
    test_the_end_of_the_machine_lets_waiters_go();
    test_memory_that_cannot_come_later_is_refused();
    close(fd);
    puts("lazy: ok");
    return 0;
}
