/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A file server in namespaces of its own. Its owner needs no privilege: in a user namespace of its own it is root over
 * what its user owns, which is what virtiofsd wants, to shut itself in further. The process namespace makes one kill
 * end everything it has started; the mount namespace is where a share becomes read-only.
 */
#include "virtio/fs_server.h"

#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* From sys/mount.h, which clashes with linux/mount.h in some versions of the C library. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);

enum step { STEP_DESCRIPTORS, STEP_USER, STEP_MOUNT, STEP_RESTRICT, STEP_EXEC };

struct failure {
    enum step step;
    int error;
};

struct plan {
    const char *const *argv;
    const char *directory;
    bool readonly, own_user;
    uid_t uid;
    gid_t gid;
    int listener, log, report;
};

/* ---- the child, up to its exec: between fork and exec only async-signal-safe calls (POSIX) ---- */

static void fail(const struct plan *plan, enum step step)
{
    const struct failure failure = {step, errno};
    ssize_t n = write(plan->report, &failure, sizeof(failure));
    _exit(n == sizeof(failure) ? 126 : 127);
}

static int put_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = write(fd, text, strlen(text));
    close(fd);
    return n < 0 ? -1 : 0;
}

/* "0 <id> 1": our user is root in there, and nobody else is anybody (user_namespaces(7)). */
static int map_root_to(const char *path, unsigned id)
{
    char text[32] = "0 ";
    char digits[12];
    size_t n = sizeof(digits);
    digits[--n] = 0;
    do
        digits[--n] = (char)('0' + id % 10);
    while (id /= 10);
    strcat(text, &digits[n]);
    strcat(text, " 1");
    return put_file(path, text);
}

static void become_root_in_namespace(const struct plan *plan)
{
    /* A group map may be written without privilege only where setgroups is given up. */
    if (put_file("/proc/self/setgroups", "deny") < 0 || map_root_to("/proc/self/uid_map", plan->uid) < 0 ||
        map_root_to("/proc/self/gid_map", plan->gid) < 0)
        fail(plan, STEP_USER);
}

static void mount_share(const struct plan *plan)
{
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
                                                (plan->readonly ? MOUNT_ATTR_RDONLY : 0)};
    /* Private first: what follows stays in here. */
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount(plan->directory, plan->directory, NULL, MS_BIND | MS_REC, NULL) < 0)
        fail(plan, STEP_MOUNT);
    /* Over every mount below it too, and only adding to what they forbid already. */
    if (syscall(SYS_mount_setattr, AT_FDCWD, plan->directory, AT_RECURSIVE, &attributes, sizeof(attributes)) <
        0)
        fail(plan, STEP_RESTRICT);
}

static void arrange_descriptors(struct plan *plan)
{
    /* Out of the way of 0 to 3 first: they may be anything in the parent. */
    enum { CLEAR = 16 };
    plan->report = fcntl(plan->report, F_DUPFD_CLOEXEC, CLEAR);
    const int listener = fcntl(plan->listener, F_DUPFD_CLOEXEC, CLEAR);
    const int log = fcntl(plan->log, F_DUPFD_CLOEXEC, CLEAR);
    const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (plan->report < 0 || listener < 0 || log < 0 || nothing < 0 || dup2(nothing, 0) < 0 ||
        dup2(log, 1) < 0 || dup2(log, 2) < 0 || dup2(listener, VMM_FS_SERVER_LISTENER) < 0)
        fail(plan, STEP_DESCRIPTORS);
    /* Whatever else is open is closed by exec: guest memory above all. Not all of it need be marked so. */
    syscall(SYS_close_range, VMM_FS_SERVER_LISTENER + 1, ~0u, CLOSE_RANGE_CLOEXEC);
}

/* Every name a guest has seen may keep a descriptor open in the server. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void child(struct plan *plan)
{
    static char *const no_environment[] = {NULL};
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid(); /* a terminal's interrupt key is not for it */
    arrange_descriptors(plan);
    if (plan->own_user)
        become_root_in_namespace(plan);
    mount_share(plan);
    raise_descriptor_limit();
    execve(plan->argv[0], (char *const *)plan->argv, no_environment);
    fail(plan, STEP_EXEC);
}

/* ---- the parent ---- */

static int explain(const struct plan *plan, struct failure failure)
{
    switch (failure.step) {
    case STEP_USER:
        return vmm_error_set(-failure.error, "the user namespace of the file server could not be set up");
    case STEP_MOUNT:
        return vmm_error_set(-failure.error, "%s could not be mounted for the file server", plan->directory);
    case STEP_RESTRICT:
        return vmm_error_set(-failure.error,
                             "the mount of %s could not be restricted (Linux 5.12 or newer can)",
                             plan->directory);
    case STEP_EXEC:
        return vmm_error_set(-failure.error, "%s could not be started", plan->argv[0]);
    default:
        return vmm_error_set(-failure.error, "descriptors of the file server");
    }
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

int vmm_fs_server_start(const char *const *argv, const char *directory, uint32_t flags, int listener, int log,
                        int *server)
{
    int report[2];
    if (pipe2(report, O_CLOEXEC) < 0)
        return vmm_error_errno("pipe for the file server's start");
    int reading VMM_CLEANUP(close_fd) = report[0];
    int writing VMM_CLEANUP(close_fd) = report[1];
    struct plan plan = {
        .argv = argv,
        .directory = directory,
        .readonly = flags & VMM_FS_READONLY,
        .own_user = geteuid() != 0,
        .uid = geteuid(),
        .gid = getegid(),
        .listener = listener,
        .log = log,
        .report = writing,
    };
    /* fork, with namespaces and a pidfd: x86-64's argument order (clone(2)). */
    unsigned long how = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNET | CLONE_PIDFD | SIGCHLD;
    if (plan.own_user)
        how |= CLONE_NEWUSER;
    int pidfd = -1;
    long pid = syscall(SYS_clone, how, NULL, &pidfd, NULL, 0);
    if (pid == 0)
        child(&plan);
    if (pid < 0)
        return vmm_error_errno("namespaces for the file server");
    close(writing);
    writing = -1;
    struct failure failure;
    ssize_t n;
    do
        n = read(reading, &failure, sizeof(failure)); /* ends with the exec */
    while (n < 0 && errno == EINTR);
    if (n == 0) {
        *server = pidfd;
        return 0;
    }
    vmm_fs_server_end(pidfd, 0);
    close(pidfd);
    return explain(&plan, failure);
}

void vmm_fs_server_end(int server, int grace_ms)
{
    struct pollfd ended = {.fd = server, .events = POLLIN};
    if (poll(&ended, 1, grace_ms) <= 0) {
        syscall(SYS_pidfd_send_signal, server, SIGKILL, NULL, 0);
        /* A process that sleeps in a file system that does not answer dies later, and cannot touch memory until then:
         * not worth hanging for. */
        poll(&ended, 1, 1000);
    }
    siginfo_t info;
    waitid(P_PIDFD, (id_t)server, &info, WEXITED | WNOHANG);
}
