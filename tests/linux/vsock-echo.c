/* SPDX-License-Identifier: Apache-2.0 */
/* A guest program: `vsock-echo listen PORT` or `vsock-echo connect PORT` (to the host); sends back all it receives. */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const int listening = !strcmp(argv[1], "listen");
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK,
        .svm_cid = listening ? VMADDR_CID_ANY : VMADDR_CID_HOST,
        .svm_port = (unsigned)atoi(argv[2]),
    };
    int end = check(socket(AF_VSOCK, SOCK_STREAM, 0), "socket");
    if (listening) {
        check(bind(end, (struct sockaddr *)&address, sizeof address), "bind");
        check(listen(end, 1), "listen");
        puts("listening");
        fflush(stdout);
        end = check(accept(end, NULL, NULL), "accept");
    } else {
        check(connect(end, (struct sockaddr *)&address, sizeof address), "connect");
    }
    static char bytes[65536];
    long total = 0;
    for (ssize_t n; (n = check((int)read(end, bytes, sizeof bytes), "read")) > 0; total += n)
        for (ssize_t at = 0; at < n;)
            at += check((int)write(end, bytes + at, (size_t)(n - at)), "write");
    check(shutdown(end, SHUT_WR), "shutdown");
    printf("echoed %ld\n", total);
    return 0;
}
