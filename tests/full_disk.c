/* A disk that is full from a certain moment on, for programs started with LD_PRELOAD.

Calls that take space in the folder FULL_DISK_FOLDER are counted; number FULL_DISK_AT and all later ones fail with ENOSPC,
but of those that change names only that one, as they seldom take any. Each is noted in the file FULL_DISK_LOG, with its
number, its name, and the file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

static int calls;

static int is_full(const char *name, const char *path) {
  const char *folder = getenv("FULL_DISK_FOLDER"), *at = getenv("FULL_DISK_AT"), *log = getenv("FULL_DISK_LOG");
  if (!folder || !at || !log || !path || strncmp(path, folder, strlen(folder))) return 0;
  int number = __sync_add_and_fetch(&calls, 1), file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600);
  char line[PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%d %s %s\n", number, name, path);
  if (syscall(SYS_write, file, line, length) < 0) abort();
  syscall(SYS_close, file);
  if (number < atoi(at) || (number > atoi(at) && !strncmp(name, "rename", 6))) return 0;
  errno = ENOSPC;
  return 1;
}

static int is_full_of(const char *name, int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = file < 0 ? -1 : readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_full(name, path);
}

static int is_full_at(const char *name, int folder, const char *path) {
  char start[64], place[PATH_MAX], found[2 * PATH_MAX];
  if (path[0] == '/') return is_full(name, path);
  if (folder == AT_FDCWD) return getcwd(place, sizeof place) && snprintf(found, sizeof found, "%s/%s", place, path) > 0 && is_full(name, found);
  snprintf(start, sizeof start, "/proc/self/fd/%d", folder);
  ssize_t length = readlink(start, place, sizeof place - 1);
  if (length < 0) return 0;
  place[length] = 0;
  return snprintf(found, sizeof found, "%s/%s", place, path) > 0 && is_full(name, found);
}

#define OPEN(name)                                                                                         \
  int name(const char *path, int flags, ...) {                                                             \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);                 \
    if (flags & O_CREAT && is_full_at(#name, AT_FDCWD, path)) return -1;                                   \
    return REAL(int, name, const char *, int, mode_t)(path, flags, mode);                                  \
  }
#define OPENAT(name)                                                                                       \
  int name(int folder, const char *path, int flags, ...) {                                                 \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);                 \
    if (flags & O_CREAT && is_full_at(#name, folder, path)) return -1;                                     \
    return REAL(int, name, int, const char *, int, mode_t)(folder, path, flags, mode);                     \
  }
#define OF_FILE(type, name, declared, given, ...)                                                          \
  type name declared { return is_full_of(#name, file) ? -1 : REAL(type, name, __VA_ARGS__) given; }
#define NUMBERED(name)                                                                                     \
  int name(int file, off_t start, off_t size) {                                                            \
    return is_full_of(#name, file) ? ENOSPC : REAL(int, name, int, off_t, off_t)(file, start, size);       \
  }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
OF_FILE(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), int, const void *, size_t)
OF_FILE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at), int, const void *, size_t, off_t)
OF_FILE(ssize_t, pwrite64, (int file, const void *data, size_t size, off_t at), (file, data, size, at), int, const void *, size_t, off_t)
OF_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count), int, const struct iovec *, int)
OF_FILE(ssize_t, pwritev, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at), int, const struct iovec *, int, off_t)
OF_FILE(int, fsync, (int file), (file), int)
OF_FILE(int, fdatasync, (int file), (file), int)
OF_FILE(int, ftruncate, (int file, off_t size), (file, size), int, off_t)
OF_FILE(int, ftruncate64, (int file, off_t size), (file, size), int, off_t)
NUMBERED(posix_fallocate) NUMBERED(posix_fallocate64)

int mkdir(const char *path, mode_t mode) { return is_full_at("mkdir", AT_FDCWD, path) ? -1 : REAL(int, mkdir, const char *, mode_t)(path, mode); }
int rename(const char *from, const char *to) { return is_full_at("rename", AT_FDCWD, to) ? -1 : REAL(int, rename, const char *, const char *)(from, to); }
int renameat2(int one, const char *from, int other, const char *to, unsigned int flags) {
  return is_full_at("renameat2", other, to) ? -1 : REAL(int, renameat2, int, const char *, int, const char *, unsigned int)(one, from, other, to, flags);
}
void *mmap(void *address, size_t size, int protection, int flags, int file, off_t start) {
  return is_full_of("mmap", file) ? MAP_FAILED : (void *)syscall(SYS_mmap, address, size, protection, flags, file, start);
}
void *mmap64(void *address, size_t size, int protection, int flags, int file, off_t start) { return mmap(address, size, protection, flags, file, start); }

/* The standard library's own streams do not come by the functions above. */
#define FOPEN(name)                                                                                        \
  FILE *name(const char *path, const char *mode) {                                                         \
    return mode[0] != 'r' && is_full_at(#name, AT_FDCWD, path) ? NULL : REAL(FILE *, name, const char *, const char *)(path, mode); \
  }
FOPEN(fopen) FOPEN(fopen64)
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
  return is_full_of("fwrite", fileno(stream)) ? 0 : REAL(size_t, fwrite, const void *, size_t, size_t, FILE *)(data, size, count, stream);
}
int fflush(FILE *stream) { return stream && is_full_of("fflush", fileno(stream)) ? EOF : REAL(int, fflush, FILE *)(stream); }
