/* SPDX-License-Identifier: Apache-2.0 */
/* Making a virtio-fs device fails well: in words, with nothing left open. What works is in tests/linux/test_share.py. */
#include "machine.h"
#include "vmmfs.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>

/* A back end that has ended, and printed `words` before. */
static int create(vmm_vm *vm, const char *tag, const char *words)
{
    int sockets[2], log[2];
    vmm_fs *fs = NULL;
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    CHECK_EQUAL(pipe(log), 0);
    CHECK_EQUAL(write(log[1], words, strlen(words)), strlen(words));
    close(sockets[1]);
    close(log[1]);
    int rc = vmm_fs_create(vm, "virtio-fs0", tag, sockets[0], -1, log[0], &fs);
    CHECK(fs == NULL);
    CHECK(fcntl(sockets[0], F_GETFD) < 0 &&
          fcntl(log[0], F_GETFD) < 0); /* they are the device's, and gone with it */
    return rc;
}

static void a_server_that_ended_is_quoted_without_what_could_upset_a_terminal(vmm_vm *vm)
{
    CHECK_EQUAL(create(vm, "work", "early words\n\nlast \x1b[2J\xff words\n\n"), -EPIPE);
    CHECK(!strcmp(vmm_error_text(), "the file server of share 'work' has ended (last ?[2J? words)"));
    CHECK_EQUAL(create(vm, "work", ""), -EPIPE);
    CHECK(!strcmp(vmm_error_text(), "the file server of share 'work' has ended"));
}

static void a_long_line_is_cut(vmm_vm *vm)
{
    char words[4000];
    memset(words, 'x', sizeof(words) - 1);
    words[sizeof(words) - 1] = 0;
    CHECK_EQUAL(create(vm, "work", words), -EPIPE);
    CHECK(strstr(vmm_error_text(), "(xxxx"));
}

static void a_tag_that_no_device_can_have_is_refused(vmm_vm *vm)
{
    CHECK_EQUAL(create(vm, "", ""), -EINVAL);
    CHECK_EQUAL(create(vm, "a tag of thirty-seven bytes, too long.", ""), -EINVAL);
    CHECK_EQUAL(create(vm, "thirty-six bytes are what a tag has.", ""), -EPIPE);
}

int main(void)
{
    vmm_vm *vm = machine_create();
    a_server_that_ended_is_quoted_without_what_could_upset_a_terminal(vm);
    a_long_line_is_cut(vm);
    a_tag_that_no_device_can_have_is_refused(vm);
    vmm_vm_destroy(vm);
    return 0;
}
