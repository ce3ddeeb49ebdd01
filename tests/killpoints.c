/* Kills the process, or fills its disk, at the n-th change of a file: preloaded, so that it sees every writer, be it
 * Python, C++ or Rust. Counted are opens for writing, writes, flushes, renames, removals and new folders; a write that is
 * killed is torn in half. Armed from the process itself through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long at, seen, full_at;

/* kill: the n-th change kills; full: every write from the n-th change on finds the disk full; 0: never. */
void killpoints_arm(long kill_at, long disk_full_at) { at = kill_at, full_at = disk_full_at, seen = 0; }
long killpoints_seen(void) { return seen; }

static int due(void) { return ++seen == at; }
static void die(void) { kill(getpid(), SIGKILL); }
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int regular(int fd) {
    struct stat s;
    return fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
}

static int full(void) {
    if (!full_at || seen < full_at) return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int fd, const void *buffer, size_t size) {
    if (regular(fd)) {
        if (due()) {
            REAL(write)(fd, buffer, size / 2);
            die();
        }
        if (full()) return -1;
    }
    return REAL(write)(fd, buffer, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (regular(fd)) {
        if (due()) {
            REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2);
            die();
        }
        if (full()) return -1;
    }
    return REAL(writev)(fd, parts, count);
}

#define OPEN(name, before, names)                              \
    int name(before const char *path, int flags, ...) {        \
        va_list more;                                          \
        va_start(more, flags);                                 \
        mode_t mode = va_arg(more, mode_t);                    \
        va_end(more);                                          \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && due()) die(); \
        return REAL(name)(names path, flags, mode);            \
    }
#define COMMA ,
OPEN(open, , )
OPEN(open64, , )
OPEN(openat, int folder COMMA, folder COMMA)
OPEN(openat64, int folder COMMA, folder COMMA)

FILE *fopen(const char *path, const char *mode) {
    if (mode[0] != 'r' && due()) die();
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (mode[0] != 'r' && due()) die();
    return REAL(fopen64)(path, mode);
}

#define CHANGE(name, takes, gives) \
    int name takes {               \
        if (due()) die();          \
        return REAL(name) gives;   \
    }
CHANGE(fsync, (int fd), (fd))
CHANGE(fdatasync, (int fd), (fd))
CHANGE(rename, (const char *from, const char *to), (from, to))
CHANGE(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
CHANGE(unlink, (const char *path), (path))
CHANGE(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
CHANGE(rmdir, (const char *path), (path))
CHANGE(mkdir, (const char *path, mode_t mode), (path, mode))
CHANGE(ftruncate, (int fd, off_t size), (fd, size))
