/* SPDX-License-Identifier: Apache-2.0 */
/* A failed check says where and with what numbers, and ends the program; optimised builds keep it. */
#ifndef VMM_TESTS_CHECK_H
#define VMM_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* How long a test waits for what must come: far longer than it takes on a busy host. */
#define PATIENCE_MS 60000

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition);            \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

#define CHECK_EQUAL(got, want)                                                                               \
    do {                                                                                                     \
        const long long got_ = (long long)(got), want_ = (long long)(want);                                  \
        if (got_ != want_) {                                                                                 \
            fprintf(stderr, "%s:%d: %s: %s is %#llx, not %#llx\n", __FILE__, __LINE__, __func__, #got, got_, \
                    want_);                                                                                  \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

#endif
