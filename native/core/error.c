/* SPDX-License-Identifier: Apache-2.0 */
#include "core.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char error_text[160] = "no error";

const char *vmm_error_text(void)
{
    return error_text;
}

int vmm_error_set(int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof(error_text), format, args);
    va_end(args);
    return rc;
}

int vmm_error_errno(const char *what)
{
    return vmm_error_set(-errno, "%s", what);
}
