/*
 * Files over a way. In a pod nobody can put them into a mount, so the host sends them:
 * for each a line `PATH SIZE`, its bytes, a line with their SHA-256; `.` is the last line,
 * and `ok` the answer. They come to be below /run/runner, where there is nothing yet of
 * their names.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_BYTES = 512, LINE_BYTES = PATH_BYTES + 32, SIZE_DIGITS = 15 };

static const char PATH_CHARACTERS[] =
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/";

/* What came and was not taken yet. */
static int host;
static char *bytes;
static size_t start, end;

static char *reason;
static size_t reason_size;

static int trouble(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int trouble(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, reason_size, format, arguments);
    va_end(arguments);
    return -1;
}

/* Makes sure that there is something; 0, or -1. */
static int fill(void)
{
    while (start == end) {
        ssize_t n = read(host, bytes, BUFFER_BYTES);
        if (n == 0 || (n < 0 && errno != EINTR))
            return trouble("the host stopped in the middle");
        start = 0;
        end = n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static int next_line(char line[LINE_BYTES])
{
    for (size_t length = 0; length < LINE_BYTES; length++) {
        if (fill() != 0)
            return -1;
        line[length] = bytes[start++];
        if (line[length] == 0)
            break;
        if (line[length] == '\n') {
            line[length] = 0;
            return 0;
        }
    }
    return trouble("the host sent what is no line");
}

/* Whether it stays below the directory it is relative to. */
static int is_sound(const char *path)
{
    size_t length = strlen(path);
    if (length < 1 || length > PATH_BYTES || strspn(path, PATH_CHARACTERS) != length)
        return 0;
    for (const char *part = path;; part++) {
        size_t n = strcspn(part, "/");
        if (n == 0 || (n == 1 && part[0] == '.') || (n == 2 && memcmp(part, "..", 2) == 0))
            return 0;
        part += n;
        if (*part == 0)
            return 1;
    }
}

/* Opens a directory, no link to one. Not by O_DIRECTORY: given both, gVisor of 2024 forgets
 * O_NOFOLLOW (measured). */
static int open_directory(int parent, const char *name)
{
    struct stat it;
    int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &it) != 0 || !S_ISDIR(it.st_mode))) {
        close(fd);
        errno = ENOTDIR;
        return -1;
    }
    return fd;
}

/* Opens `name` in a directory, which it closes; makes it if there is none. */
static int enter(int directory, const char *name)
{
    int made = mkdirat(directory, name, 0755) == 0;
    int fd = open_directory(directory, name);
    int error = errno;
    close(directory);
    if (fd >= 0 && made)
        fchmod(fd, 0755); /* whatever the umask is */
    errno = error;
    return fd;
}

/* Creates a file that was not there, and follows no link on the way to it. */
static int create(const char *path)
{
    char name[PATH_BYTES + 1];
    int directory = open(RUNNER, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const char *slash;
    while (directory >= 0 && (slash = strchr(path, '/')) != NULL) {
        memcpy(name, path, (size_t)(slash - path));
        name[slash - path] = 0;
        directory = enter(directory, name);
        path = slash + 1;
    }
    if (directory < 0)
        return -1;
    int fd = openat(directory, path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    int error = errno;
    close(directory);
    if (fd >= 0)
        fchmod(fd, 0644);
    errno = error;
    return fd;
}

static int write_all(int file, const char *from, size_t length)
{
    while (length > 0) {
        ssize_t n = write(file, from, length);
        if (n < 0 && errno != EINTR)
            return -1;
        from += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* Takes `size` bytes into the file and the digest. */
static int take(int file, EVP_MD_CTX *digest, const char *path, long long size)
{
    while (size > 0) {
        if (fill() != 0)
            return -1;
        size_t n = end - start;
        if ((long long)n > size)
            n = (size_t)size;
        if (EVP_DigestUpdate(digest, bytes + start, n) != 1)
            return trouble("OpenSSL has no digest");
        if (write_all(file, bytes + start, n) != 0)
            return trouble("%s: %s", path, strerror(errno));
        start += n;
        size -= (long long)n;
    }
    return 0;
}

static int compare_digest(EVP_MD_CTX *digest, const char *path)
{
    unsigned char value[EVP_MAX_MD_SIZE];
    char hex[2 * EVP_MAX_MD_SIZE + 1], line[LINE_BYTES];
    unsigned length;
    if (EVP_DigestFinal_ex(digest, value, &length) != 1)
        return trouble("OpenSSL has no digest");
    for (unsigned i = 0; i < length; i++)
        snprintf(hex + 2 * i, 3, "%02x", value[i]);
    if (next_line(line) != 0)
        return -1;
    return strcmp(line, hex) == 0 ? 0 : trouble("%s has not the digest it should have", path);
}

static int take_file(const char *path, long long size)
{
    EVP_MD_CTX *digest = EVP_MD_CTX_new();
    int file = create(path);
    int result = -1;
    if (file < 0)
        trouble("%s: %s", path, strerror(errno));
    else if (digest == NULL || EVP_DigestInit_ex(digest, EVP_sha256(), NULL) != 1)
        trouble("OpenSSL has no digest");
    else if (take(file, digest, path, size) == 0)
        result = compare_digest(digest, path);
    if (file >= 0 && close(file) != 0 && result == 0)
        result = trouble("%s: %s", path, strerror(errno));
    EVP_MD_CTX_free(digest);
    return result;
}

/* Reads `PATH SIZE`, and takes that file. */
static int take_announced(char *line)
{
    char *space = strchr(line, ' ');
    if (space == NULL)
        return trouble("the host announced no size");
    const char *digits = space + 1;
    size_t length = strlen(digits);
    *space = 0;
    if (!is_sound(line))
        return trouble("the host sent a path that is none of ours");
    if (length < 1 || length > SIZE_DIGITS || strspn(digits, "0123456789") != length)
        return trouble("the host announced a size that is none");
    return take_file(line, strtoll(digits, NULL, 10));
}

static int take_all(void)
{
    char line[LINE_BYTES];
    for (;;) {
        if (next_line(line) != 0)
            return -1;
        if (strcmp(line, ".") == 0)
            return send_all(host, "ok\n", 3) == 0 ? 0 : trouble("the host did not wait for us");
        if (take_announced(line) != 0)
            return -1;
    }
}

int fetch_files(const char *way, unsigned patience, char *why, size_t size)
{
    struct patience ours = {.seconds = patience, .used = 0};
    reason = why;
    reason_size = size;
    bytes = malloc(BUFFER_BYTES);
    if (bytes == NULL)
        die("memory");
    host = connect_patiently(way, &ours);
    int result = take_all();
    close(host);
    free(bytes);
    return result;
}
