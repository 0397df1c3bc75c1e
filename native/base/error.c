/* SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"
#include "vmm/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char error_text[160] = "no error";
static _Thread_local int error_code;
static _Thread_local enum vmm_error_source error_source;

const char *vmm_error_text(void)
{
    return error_text;
}

int vmm_error_source(int code)
{
    return code == error_code ? (int)error_source : VMM_ERROR_UNTOLD;
}

static int remember(enum vmm_error_source source, int rc, const char *format, va_list args)
{
    vsnprintf(error_text, sizeof(error_text), format, args);
    error_code = rc;
    error_source = source;
    return rc;
}

int vmm_error_set(int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    remember(VMM_ERROR_REFUSED, rc, format, args);
    va_end(args);
    return rc;
}

int vmm_error_host(int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    remember(VMM_ERROR_HOST, rc, format, args);
    va_end(args);
    return rc;
}

int vmm_error_errno(const char *what)
{
    return vmm_error_host(-errno, "%s", what);
}
