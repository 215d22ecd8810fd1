/* error.c: the thread-local sentence behind a failed status. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

bn_status bn_fail(bn_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    return status;
}

const char *bn_error_message(void) { return message; }
