/* Preloaded into a test's process: the n-th call of one kind under a folder fails.
 *
 * fault_arm(prefix, except, call, n, error, times) sets it up: calls numbered n and on, `times` of
 * them (0: all), fail with `error` without being made. fault_calls() and fault_hits() count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[4096], except[256], kind[32];
static atomic_long seen, hits;
static long first, times, error_number;
static int armed;

void fault_arm(const char *under, const char *but, const char *call, long n, int error, long count)
{
    snprintf(prefix, sizeof prefix, "%s", under);
    snprintf(except, sizeof except, "%s", but);
    snprintf(kind, sizeof kind, "%s", call);
    first = n;
    times = count;
    error_number = error;
    seen = 0;
    hits = 0;
    armed = 1;
}

long fault_calls(void) { return seen; }
long fault_hits(void) { return hits; }

static int fails(const char *call, const char *path)
{
    if (!armed || path == NULL || strcmp(call, kind) || strncmp(path, prefix, strlen(prefix)) ||
        strstr(path, except))
        return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < first || (times && number >= first + times))
        return 0;
    atomic_fetch_add(&hits, 1);
    errno = (int)error_number;
    return 1;
}

static int fails_at(const char *call, int descriptor)
{
    char link[64], path[4096];
    if (!armed || strcmp(call, kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                            \
    int name(const char *path, int flags, ...)                \
    {                                                         \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        mode_t mode = va_arg(rest, mode_t);                   \
        va_end(rest);                                         \
        if (fails("open", path))                              \
            return -1;                                        \
        return REAL(name)(path, flags, mode);                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                          \
    int name(int at, const char *path, int flags, ...)        \
    {                                                         \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        mode_t mode = va_arg(rest, mode_t);                   \
        va_end(rest);                                         \
        if (fails("open", path))                              \
            return -1;                                        \
        return REAL(name)(at, path, flags, mode);             \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                           \
    FILE *name(const char *path, const char *mode)            \
    {                                                         \
        return fails("open", path) ? NULL : REAL(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int descriptor, const void *data, size_t size)
{
    return fails_at("write", descriptor) ? -1 : REAL(write)(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count)
{
    return fails_at("write", descriptor) ? -1 : REAL(writev)(descriptor, parts, count);
}

#define PWRITE(name, offset_type)                                                    \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type offset)  \
    {                                                                                \
        return fails_at("write", descriptor) ? -1 : REAL(name)(descriptor, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

int rename(const char *from, const char *to)
{
    return fails("rename", to) ? -1 : REAL(rename)(from, to);
}

int fsync(int descriptor) { return fails_at("fsync", descriptor) ? -1 : REAL(fsync)(descriptor); }
