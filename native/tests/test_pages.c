/* SPDX-License-Identifier: Apache-2.0 */
/* Pages to and from sparse files: found, written, checked, read; and what was changed in between is seen. */
#include "check.h"
#include "vmmcore.h"
#include "vmmsnapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGES = 150, WORDS = (PAGES + 63) / 64, CHUNKS = (PAGES * VMM_PAGE + VMM_CHUNK - 1) / VMM_CHUNK };
#define SIZE ((uint64_t)PAGES * VMM_PAGE)
#define OFFSET ((uint64_t)3 * VMM_PAGE) /* of the region in its file */

static const unsigned used[] = {0, 1, 2, 15, 16, 63, 64, 100, 149};
enum { USED = sizeof(used) / sizeof(used[0]) };

static int memory_file(uint64_t size)
{
    const int fd = memfd_create("pages", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static uint8_t *map(int fd, int how)
{
    uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, how, fd, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void fill(uint8_t *memory)
{
    for (unsigned i = 0; i < USED; i++)
        memory[used[i] * VMM_PAGE + (i * 511) % VMM_PAGE] = (uint8_t)(i + 1);
}

static bool held(const uint64_t *bitmap, unsigned page)
{
    return bitmap[page / 64] >> page % 64 & 1;
}

static void test_found_are_the_pages_with_something_in_them(void)
{
    const int fd = memory_file(SIZE);
    uint8_t *memory = map(fd, MAP_SHARED);
    uint64_t bitmap[WORDS];
    struct stat before, after;
    fill(memory);
    memory[7 * VMM_PAGE] = 0; /* touched, and nothing in it */
    CHECK_EQUAL(fstat(fd, &before), 0);
    CHECK_EQUAL(vmm_pages_find(memory, SIZE, fd, 0, false, bitmap), USED);
    CHECK_EQUAL(fstat(fd, &after), 0);
    CHECK_EQUAL(after.st_blocks, before.st_blocks);
    for (unsigned page = 0, i = 0; page < 64 * WORDS; page++) {
        const bool wanted = i < USED && used[i] == page;
        CHECK_EQUAL(held(bitmap, page), wanted);
        i += wanted;
    }
    CHECK_EQUAL(vmm_pages_find(memory, SIZE, -1, 0, false, bitmap), USED);
    munmap(memory, SIZE);
    close(fd);
}

static void test_pages_of_its_own_over_a_file_are_found(void)
{
    const int fd = memory_file(SIZE);
    uint8_t *memory = map(fd, MAP_SHARED);
    uint64_t bitmap[WORDS];
    memory[20 * VMM_PAGE] = 1;
    memory[30 * VMM_PAGE] = 1;
    munmap(memory, SIZE);
    memory = map(fd, MAP_PRIVATE);
    memory[40 * VMM_PAGE] = 1;
    memory[30 * VMM_PAGE] = 0; /* is zeros now, whatever the file has */
    CHECK_EQUAL(vmm_pages_find(memory, SIZE, fd, 0, true, bitmap), 2);
    CHECK(held(bitmap, 20) && held(bitmap, 40) && !held(bitmap, 30));
    munmap(memory, SIZE);
    close(fd);
}

static void test_its_own_are_the_pages_it_wrote(void)
{
    const int fd = memory_file(SIZE);
    uint8_t *memory = map(fd, MAP_SHARED);
    memset(memory, 1, 30 * VMM_PAGE);
    munmap(memory, SIZE);
    memory = map(fd, MAP_PRIVATE);
    uint64_t own[WORDS] = {0},
             sum = memory[5 * VMM_PAGE] + memory[70 * VMM_PAGE]; /* read, in data and a hole */
    memory[6 * VMM_PAGE] = 2;
    memory[149 * VMM_PAGE] = 0;
    CHECK_EQUAL(sum, 1);
    CHECK_EQUAL(vmm_pages_own(memory, SIZE, own), 0);
    for (unsigned page = 0; page < 64 * WORDS; page++)
        CHECK_EQUAL(held(own, page), page == 6 || page == 149);
    munmap(memory, SIZE);
    close(fd);
}

struct written {
    int fd;
    uint64_t bitmap[WORDS];
    uint32_t checksums[CHUNKS];
};

static struct written write_some(void)
{
    struct written w = {.fd = memory_file(OFFSET + SIZE)};
    const int fd = memory_file(SIZE);
    uint8_t *memory = map(fd, MAP_SHARED);
    fill(memory);
    CHECK_EQUAL(vmm_pages_find(memory, SIZE, fd, 0, false, w.bitmap), USED);
    w.bitmap[90 / 64] |= 1ull << 90 % 64; /* a page of zeros that is held */
    CHECK_EQUAL(vmm_pages_write(w.fd, OFFSET, memory, SIZE, w.bitmap, w.checksums), 0);
    munmap(memory, SIZE);
    close(fd);
    return w;
}

static int check(const struct written *w)
{
    return vmm_pages_check(w->fd, OFFSET, SIZE, w->bitmap, w->checksums);
}

static void test_what_was_written_is_read_and_zeros_take_no_room(void)
{
    struct written w = write_some();
    struct stat file;
    CHECK_EQUAL(check(&w), 0);
    CHECK_EQUAL(fstat(w.fd, &file), 0);
    CHECK_EQUAL(file.st_blocks * 512, USED * VMM_PAGE);
    uint8_t *wanted = calloc(1, SIZE), *found = malloc(SIZE);
    CHECK(wanted && found);
    fill(wanted);
    memset(found, 0xee, SIZE);
    CHECK_EQUAL(vmm_pages_read(w.fd, OFFSET, found, SIZE, w.bitmap), 0);
    for (unsigned page = 0; page < PAGES; page++) {
        if (!held(w.bitmap, page))
            memset(wanted + page * VMM_PAGE, 0xee, VMM_PAGE); /* nor is anything else touched */
    }
    CHECK(memcmp(wanted, found, SIZE) == 0);
    free(wanted);
    free(found);
    close(w.fd);
}

static void test_every_changed_byte_is_found_in_held_pages_and_in_holes(void)
{
    struct written w = write_some();
    for (uint64_t at = OFFSET; at < OFFSET + SIZE; at += 769) {
        uint8_t byte;
        CHECK_EQUAL(pread(w.fd, &byte, 1, (off_t)at), 1);
        byte ^= 0x10;
        CHECK_EQUAL(pwrite(w.fd, &byte, 1, (off_t)at), 1);
        CHECK_EQUAL(check(&w), -EBADMSG);
        byte ^= 0x10;
        CHECK_EQUAL(pwrite(w.fd, &byte, 1, (off_t)at), 1);
    }
    CHECK_EQUAL(check(&w), 0); /* holes that are full of zeros by now are no damage */
    for (unsigned i = 0; i < CHUNKS; i++) {
        w.checksums[i] ^= 1u << i;
        CHECK_EQUAL(check(&w), -EBADMSG);
        w.checksums[i] ^= 1u << i;
    }
    close(w.fd);
}

/* Of several threads' work, on a host with several CPUs: what one of them finds is the caller's to know. */
static void test_damage_anywhere_in_a_large_memory_is_found_and_told_where(void)
{
    enum { LARGE = 5 * 2048, LARGE_CHUNKS = LARGE * VMM_PAGE / VMM_CHUNK };
    const uint64_t size = (uint64_t)LARGE * VMM_PAGE;
    const int fd = memory_file(size), file = memory_file(size);
    static uint64_t bitmap[LARGE / 64];
    static uint32_t checksums[LARGE_CHUNKS];
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED);
    for (unsigned page = 0; page < LARGE; page++)
        memory[page * (uint64_t)VMM_PAGE + page % VMM_PAGE] = (uint8_t)(page % 255 + 1);
    CHECK_EQUAL(vmm_pages_find(memory, size, fd, 0, false, bitmap), LARGE);
    CHECK_EQUAL(vmm_pages_write(file, 0, memory, size, bitmap, checksums), 0);
    CHECK_EQUAL(vmm_pages_check(file, 0, size, bitmap, checksums), 0);
    for (uint64_t chunk = 0; chunk < LARGE_CHUNKS; chunk += 71) {
        const off_t at = (off_t)(chunk * VMM_CHUNK + chunk);
        char where[32];
        uint8_t byte;
        CHECK_EQUAL(pread(file, &byte, 1, at), 1);
        CHECK_EQUAL(pwrite(file, &(uint8_t){byte ^ 4}, 1, at), 1);
        CHECK_EQUAL(vmm_pages_check(file, 0, size, bitmap, checksums), -EBADMSG);
        snprintf(where, sizeof(where), "from %#llx on", (unsigned long long)(chunk * VMM_CHUNK));
        CHECK(strstr(vmm_error_text(), where) != NULL);
        CHECK_EQUAL(pwrite(file, &byte, 1, at), 1);
    }
    CHECK_EQUAL(vmm_pages_check(file, 0, size, bitmap, checksums), 0);
    munmap(memory, size);
    close(file);
    close(fd);
}

static void test_a_file_that_ends_in_a_held_page_is_damaged(void)
{
    struct written w = write_some();
    uint8_t *memory = malloc(SIZE);
    CHECK(memory);
    CHECK_EQUAL(ftruncate(w.fd, (off_t)(OFFSET + 149 * VMM_PAGE + 100)), 0);
    CHECK_EQUAL(check(&w), -EBADMSG);
    CHECK_EQUAL(vmm_pages_read(w.fd, OFFSET, memory, SIZE, w.bitmap), -EBADMSG);
    free(memory);
    close(w.fd);
}

static void test_a_full_device_says_so(void)
{
    struct written w = write_some();
    uint8_t *memory = calloc(1, SIZE);
    CHECK(memory);
    fill(memory);
    const int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    CHECK(full >= 0);
    CHECK_EQUAL(vmm_pages_write(full, 0, memory, SIZE, w.bitmap, w.checksums), -ENOSPC);
    close(full);
    free(memory);
    close(w.fd);
}

static void test_checksums_agree_at_every_length(void)
{
    static uint8_t bytes[3 * VMM_PAGE];
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i * 7 ^ i >> 5);
    for (size_t n = 0; n <= sizeof(bytes) - 8; n += n < 100 ? 1 : 61) {
        const uint8_t *from = bytes + n % 8; /* not aligned */
        CHECK_EQUAL(vmm_crc32c(0, from, n), vmm_crc32c_portable(0, from, n));
        const uint32_t first = vmm_crc32c(0, from, n / 3);
        CHECK_EQUAL(vmm_crc32c(first, from + n / 3, n - n / 3), vmm_crc32c(0, from, n));
    }
    CHECK_EQUAL(vmm_crc32c(0, "123456789", 9), 0xe3069283);
}

static void test_two_names_change_places_or_one_is_taken(void)
{
    char folder[] = "/tmp/pages-XXXXXX", one[64], other[64];
    CHECK(mkdtemp(folder));
    snprintf(one, sizeof(one), "%s/one", folder);
    snprintf(other, sizeof(other), "%s/other", folder);
    CHECK(mkdir(one, 0700) == 0 && mkdir(other, 0700) == 0);
    struct stat before, after;
    CHECK_EQUAL(stat(one, &before), 0);
    CHECK_EQUAL(vmm_rename(one, other, false), -EEXIST);
    CHECK_EQUAL(vmm_rename(one, other, true), 0);
    CHECK_EQUAL(stat(other, &after), 0);
    CHECK_EQUAL(after.st_ino, before.st_ino);
    CHECK_EQUAL(rmdir(one), 0);
    CHECK_EQUAL(vmm_rename(other, one, true), -ENOENT);
    CHECK_EQUAL(vmm_rename(other, one, false), 0);
    CHECK(rmdir(one) == 0 && rmdir(folder) == 0);
}

int main(void)
{
    test_found_are_the_pages_with_something_in_them();
    test_pages_of_its_own_over_a_file_are_found();
    test_its_own_are_the_pages_it_wrote();
    test_what_was_written_is_read_and_zeros_take_no_room();
    test_every_changed_byte_is_found_in_held_pages_and_in_holes();
    test_damage_anywhere_in_a_large_memory_is_found_and_told_where();
    test_a_file_that_ends_in_a_held_page_is_damaged();
    test_a_full_device_says_so();
    test_checksums_agree_at_every_length();
    test_two_names_change_places_or_one_is_taken();
    puts("pages: ok");
    return 0;
}
