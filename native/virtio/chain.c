/* SPDX-License-Identifier: Apache-2.0 */
/* Bytes of a chain: its parts are read and written as if each were one run of memory. */
#include "queue.h"

#include <string.h>

/* A place in one part: piece and offset in it. */
struct cursor {
    const struct iovec *piece, *end;
    size_t offset;
};

static struct cursor find(const struct vmm_chain *chain, bool in, uint64_t at)
{
    struct cursor c = {.piece = chain->iov + (in ? chain->n_out : 0)};
    c.end = c.piece + (in ? chain->n_in : chain->n_out);
    while (c.piece < c.end && at >= c.piece->iov_len)
        at -= c.piece++->iov_len;
    c.offset = at;
    return c;
}

/* The next run of at most n bytes; its length is 0 at the end of the part. */
static struct iovec take(struct cursor *c, uint64_t n)
{
    if (c->piece == c->end)
        return (struct iovec){0};
    size_t room = c->piece->iov_len - c->offset;
    struct iovec run = {.iov_base = (uint8_t *)c->piece->iov_base + c->offset,
                        .iov_len = n < room ? n : room};
    c->offset = 0; /* if the run ends inside the piece, it was the last one asked for */
    c->piece++;
    return run;
}

size_t vmm_chain_read(const struct vmm_chain *chain, uint64_t at, void *to, size_t n)
{
    struct cursor c = find(chain, false, at);
    size_t done = 0;
    for (struct iovec run; done < n && (run = take(&c, n - done)).iov_len; done += run.iov_len)
        memcpy((uint8_t *)to + done, run.iov_base, run.iov_len);
    return done;
}

size_t vmm_chain_write(const struct vmm_chain *chain, uint64_t at, const void *from, size_t n)
{
    struct cursor c = find(chain, true, at);
    size_t done = 0;
    for (struct iovec run; done < n && (run = take(&c, n - done)).iov_len; done += run.iov_len) {
        memcpy(run.iov_base, (const uint8_t *)from + done, run.iov_len);
        vmm_vm_wrote(chain->vm, run.iov_base, run.iov_len);
    }
    return done;
}

unsigned vmm_chain_slice(const struct vmm_chain *chain, bool in, uint64_t at, uint64_t n, struct iovec *iov)
{
    struct cursor c = find(chain, in, at);
    unsigned pieces = 0;
    for (struct iovec run; n && (run = take(&c, n)).iov_len; n -= run.iov_len)
        iov[pieces++] = run;
    return pieces;
}
