/* Loaded before the C library (LD_PRELOAD): writes and fsyncs of files whose path contains a word fail, or take long.

   errs(word, n, code): the n-th such call from now on fails with errno `code`; how many came is what `seen` says.
   drags(word, microseconds): each such call takes so long. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char failing[256], dragging[256];
static atomic_int turn, count;
static int code;
static unsigned pause_us;

void errs(const char *word, int n, int with)
{
    failing[0] = 0;
    turn = n;
    count = 0;
    code = with;
    strncpy(failing, word, sizeof failing - 1);
}

void drags(const char *word, unsigned microseconds)
{
    pause_us = microseconds;
    strncpy(dragging, word, sizeof dragging - 1);
}

int seen(void) { return count; }

static int fails(int fd)
{
    char name[64], path[4096];
    if (!failing[0] && !dragging[0])
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (dragging[0] && strstr(path, dragging))
        usleep(pause_us);
    if (!failing[0] || !strstr(path, failing) || ++count != turn)
        return 0;
    errno = code;
    return 1;
}

#define GUARDED(type, name, parameters, arguments)                                                                     \
    type name parameters                                                                                               \
    {                                                                                                                  \
        static type(*real) parameters;                                                                                 \
        if (!real)                                                                                                     \
            real = dlsym(RTLD_NEXT, #name);                                                                            \
        return fails(fd) ? -1 : real arguments;                                                                        \
    }

GUARDED(ssize_t, write, (int fd, const void *bytes, size_t n), (fd, bytes, n))
GUARDED(ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n))
GUARDED(ssize_t, pwrite, (int fd, const void *bytes, size_t n, off_t at), (fd, bytes, n, at))
GUARDED(ssize_t, pwrite64, (int fd, const void *bytes, size_t n, off64_t at), (fd, bytes, n, at))
GUARDED(int, fsync, (int fd), (fd))
GUARDED(int, fdatasync, (int fd), (fd))
