/* SPDX-License-Identifier: Apache-2.0 */
/* Starting and ending a process in namespaces of its own. The "server" here is a shell. */
#include "check.h"
#include "virtio/fs_server.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SKIPPED 77

static char directory[] = "/tmp/vmm-share-XXXXXX";

struct run {
    int server, listener, log;
};

static int start_shell(struct run *run, const char *script, uint32_t flags)
{
    const char *argv[] = {"/bin/sh", "-c", script, NULL};
    int sockets[2], log[2];
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    CHECK_EQUAL(pipe(log), 0);
    int rc = vmm_fs_server_start(argv, directory, flags, sockets[0], log[1], &run->server);
    close(sockets[0]);
    close(log[1]);
    run->listener = sockets[1];
    run->log = log[0];
    return rc;
}

/* All it prints, until it and all it started have closed their output. */
static void finish(struct run *run, char *said, size_t size)
{
    size_t length = 0;
    ssize_t n;
    while ((n = read(run->log, said + length, size - 1 - length)) > 0)
        length += (size_t)n;
    said[length] = 0;
    vmm_fs_server_end(run->server, 5000);
    close(run->server);
    close(run->log);
    close(run->listener);
}

static void run_shell(const char *script, uint32_t flags, char *said, size_t size)
{
    struct run run;
    CHECK_EQUAL(start_shell(&run, script, flags), 0);
    finish(&run, said, size);
}

static void the_server_is_root_of_a_world_of_its_own(void)
{
    char said[200];
    run_shell("id -u; echo $$", 0, said, sizeof(said));
    CHECK(!strcmp(said, "0\n1\n")); /* user 0, process 1 */
}

static void the_server_finds_its_socket_its_log_and_nothing_else(void)
{
    char said[400];
    int secret = memfd_create("secret", 0); /* not marked close-on-exec */
    CHECK(secret >= 0);
    run_shell("echo yes >&3; ls -l /proc/self/fd | grep -c secret; echo out; echo err >&2", 0, said,
              sizeof(said));
    CHECK(!strcmp(said, "0\nout\nerr\n"));
    close(secret);
}

static void a_read_only_share_cannot_be_written(void)
{
    char said[200], script[200];
    snprintf(script, sizeof(script), "echo in > %s/file || echo refused", directory);
    run_shell(script, VMM_FS_READONLY, said, sizeof(said));
    CHECK(strstr(said, "Read-only file system\nrefused\n") != NULL);
}

static void device_nodes_and_set_uid_programs_do_nothing_in_a_share(void)
{
    char said[400], script[200];
    snprintf(script, sizeof(script), "grep \" %s \" /proc/self/mountinfo | grep -c nosuid,nodev", directory);
    run_shell(script, 0, said, sizeof(said));
    CHECK(!strcmp(said, "1\n"));
}

static void a_share_that_is_not_read_only_can_be_written(void)
{
    char said[200], script[200], path[64];
    snprintf(script, sizeof(script), "echo in > %s/file && echo done", directory);
    run_shell(script, 0, said, sizeof(said));
    CHECK(!strcmp(said, "done\n"));
    snprintf(path, sizeof(path), "%s/file", directory);
    CHECK_EQUAL(unlink(path), 0);
}

static void killing_it_kills_what_it_started(void)
{
    struct run run;
    CHECK_EQUAL(start_shell(&run, "sleep 1000 & echo started; sleep 1000", 0), 0);
    char said[16];
    CHECK_EQUAL(read(run.log, said, sizeof(said)), 8);
    vmm_fs_server_end(run.server, 0);
    struct pollfd ended = {.fd = run.log, .events = POLLIN};
    CHECK_EQUAL(poll(&ended, 1, PATIENCE_MS), 1);
    CHECK_EQUAL(read(run.log, said, sizeof(said)), 0); /* nobody holds the other end any more */
    siginfo_t info = {0};
    CHECK(waitid(P_PIDFD, (id_t)run.server, &info, WEXITED | WNOHANG) < 0 &&
          errno == ECHILD); /* and it is reaped */
    close(run.server);
    close(run.log);
    close(run.listener);
}

static void what_cannot_start_says_why(void)
{
    struct run run;
    const char *missing[] = {"/nowhere/virtiofsd", NULL};
    const char *shell[] = {"/bin/sh", "-c", "exit", NULL};
    CHECK_EQUAL(vmm_fs_server_start(missing, directory, 0, 0, 2, &run.server), -ENOENT);
    CHECK(strstr(vmm_error_text(), "/nowhere/virtiofsd") != NULL);
    CHECK_EQUAL(vmm_fs_server_start(shell, "/nowhere", 0, 0, 2, &run.server), -ENOENT);
    CHECK(strstr(vmm_error_text(), "/nowhere could not be mounted") != NULL);
}

int main(void)
{
    CHECK(mkdtemp(directory) != NULL);
    struct run run;
    char said[100];
    int rc = start_shell(&run, "true", 0);
    if (rc == -EPERM || rc == -ENOSPC || rc == -EACCES || rc == -EINVAL) {
        fprintf(stderr, "no namespaces for this user: %s\n", vmm_error_text());
        rmdir(directory);
        return SKIPPED;
    }
    CHECK_EQUAL(rc, 0);
    finish(&run, said, sizeof(said));
    the_server_is_root_of_a_world_of_its_own();
    the_server_finds_its_socket_its_log_and_nothing_else();
    a_read_only_share_cannot_be_written();
    device_nodes_and_set_uid_programs_do_nothing_in_a_share();
    a_share_that_is_not_read_only_can_be_written();
    killing_it_kills_what_it_started();
    what_cannot_start_says_why();
    CHECK_EQUAL(rmdir(directory), 0);
    return 0;
}
