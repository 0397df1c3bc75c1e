/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-fs (virtio 1.2, 5.11): configuration here, requests in the file server. */
#include "vmmfs.h"

#include "virtio/fs_server.h"
#include "virtio/vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define DEVICE_ID 26
#define QUEUES 2 /* high priority, requests: what both virtiofsd have */
#define QUEUE_SIZE 256
#define REPLY_MS 5000        /* a file server on a slow disk has this long to finish what is in flight */
#define SERVER_GRACE_MS 1000 /* virtiofsd ends when its socket does */

struct fs_config {
    char tag[36]; /* UTF-8, padded with NUL */
    uint32_t num_request_queues;
};

struct vmm_fs {
    struct vmm_virtio virtio;
    struct vmm_vhost_user back_end;
    int server, log; /* -1: none */
    struct vmm_source log_source;
    pthread_mutex_t lock; /* of what follows; innermost */
    char line[96];        /* what the server printed last */
    char last[96];        /* as `line`, for who asked */
    unsigned length;
    bool ended; /* the line is complete: the next byte begins another */
};

/* ---- what the server prints ---- */

/* The newest line that is not empty, without what could upset a terminal. */
static void keep(struct vmm_fs *fs, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '\n') {
            fs->ended = true;
            continue;
        }
        if (fs->ended)
            fs->length = 0;
        fs->ended = false;
        if (fs->length < sizeof(fs->line) - 1)
            fs->line[fs->length++] = text[i] >= ' ' && text[i] < 127 ? text[i] : '?';
        fs->line[fs->length] = 0;
    }
}

/* Read what there is, so that the server never waits for us; false: no more will come. */
static bool drain(struct vmm_fs *fs)
{
    char text[4096]; /* one read a wake-up: a server made to print a lot keeps nobody else waiting */
    ssize_t n = read(fs->log, text, sizeof(text));
    if (n > 0)
        keep(fs, text, (size_t)n);
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

static void printed(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_fs *fs = source->opaque;
    pthread_mutex_lock(&fs->lock);
    bool more = drain(fs);
    pthread_mutex_unlock(&fs->lock);
    if (!more)
        vmm_loop_remove(fs->virtio.loop, source);
}

/* ---- the server's end ---- */

static const char *abandon(void *opaque)
{
    struct vmm_fs *fs = opaque;
    if (fs->server >= 0)
        vmm_fs_server_end(fs->server, 0);
    pthread_mutex_lock(&fs->lock);
    if (fs->log >= 0)
        drain(fs);
    memcpy(fs->last, fs->line, sizeof(fs->last));
    pthread_mutex_unlock(&fs->lock);
    return fs->last;
}

/* ---- the device ---- */

static void start(void *opaque)
{
    vmm_vhost_user_start(&((struct vmm_fs *)opaque)->back_end);
}

static void stop(void *opaque)
{
    vmm_vhost_user_stop(&((struct vmm_fs *)opaque)->back_end);
}

static void forget(void *opaque, uint32_t queue)
{
    vmm_vhost_user_take_back(&((struct vmm_fs *)opaque)->back_end, queue);
}

static void renew(void *opaque, uint32_t queue)
{
    vmm_vhost_user_hand_over(&((struct vmm_fs *)opaque)->back_end, queue);
}

static const vmm_virtio_ops ops = {.start = start, .stop = stop, .forget = forget, .renew = renew};

static int create(struct vmm_fs *fs, vmm_vm *vm, const char *name, const char *tag, int socket)
{
    static const uint16_t sizes[QUEUES] = {QUEUE_SIZE, QUEUE_SIZE};
    struct fs_config config = {.num_request_queues = QUEUES - 1};
    const size_t n = strlen(tag);
    if (n == 0 || n > sizeof(config.tag))
        return vmm_error_set(-EINVAL, "a tag of %zu bytes: 1 to %zu are possible", n, sizeof(config.tag));
    memcpy(config.tag, tag, n);
    char called[sizeof(fs->back_end.name)];
    snprintf(called, sizeof(called), "the file server of share '%s'", tag);
    int rc = vmm_vhost_user_open(&fs->back_end, socket, called, REPLY_MS);
    if (rc < 0) {
        const char *why = abandon(fs);
        char text[160]; /* a copy: what vmm_error_set writes to is what vmm_error_text answers */
        snprintf(text, sizeof(text), "%s", vmm_error_text());
        return *why ? vmm_error_host(rc, "%s (%s)", text, why) : rc;
    }
    rc = vmm_virtio_init(&fs->virtio, vm, &ops, fs, DEVICE_ID, name, 0, QUEUES, sizes, sizeof(config));
    if (rc < 0)
        return rc;
    memcpy(fs->virtio.config, &config, sizeof(config));
    fs->back_end.abandon = abandon;
    fs->back_end.opaque = fs;
    fs->log_source = (struct vmm_source){.fd = fs->log, .ready = printed, .opaque = fs};
    if (fs->log >= 0)
        rc = vmm_loop_add(fs->virtio.loop, &fs->log_source, EPOLLIN);
    return rc < 0 ? rc : vmm_vhost_user_attach(&fs->back_end, &fs->virtio);
}

int vmm_fs_create(vmm_vm *vm, const char *name, const char *tag, int socket, int server, int log,
                  vmm_fs **out)
{
    struct vmm_fs *fs = calloc(1, sizeof(*fs));
    if (!fs) {
        close(socket);
        close(log);
        if (server >= 0)
            vmm_fs_server_end(server, 0);
        close(server);
        return vmm_error_set(-ENOMEM, "%s", name);
    }
    fs->back_end.socket = socket;
    fs->server = server;
    fs->log = log;
    pthread_mutex_init(&fs->lock, NULL);
    if (log >= 0)
        fcntl(log, F_SETFL, O_NONBLOCK);
    int rc = create(fs, vm, name, tag, socket);
    if (rc < 0) {
        if (fs->virtio.loop) {
            vmm_loop_remove(fs->virtio.loop, &fs->log_source);
            vmm_loop_remove(fs->virtio.loop, &fs->back_end.source);
            vmm_loop_sync(fs->virtio.loop);
        }
        vmm_fs_destroy(fs);
        return rc;
    }
    *out = fs;
    return 0;
}

vmm_virtio *vmm_fs_virtio(vmm_fs *fs)
{
    return &fs->virtio;
}

void vmm_fs_destroy(vmm_fs *fs)
{
    if (!fs)
        return;
    vmm_vhost_user_close(&fs->back_end);
    if (fs->server >= 0) {
        vmm_fs_server_end(fs->server, SERVER_GRACE_MS);
        close(fs->server);
    }
    if (fs->log >= 0)
        close(fs->log);
    vmm_virtio_deinit(&fs->virtio);
    pthread_mutex_destroy(&fs->lock);
    free(fs);
}
