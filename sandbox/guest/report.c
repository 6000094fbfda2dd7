/* The lines to the host: words separated by one space, values in hex, so that no
 * byte from in here can be taken for a separator. The host checks every one. */
#include "init.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char line[16 * SHOWN_BYTES];
static size_t line_length;

void add(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + line_length, sizeof line - line_length, format, arguments);
    va_end(arguments);
    if (n > 0 && line_length + (size_t)n < sizeof line)
        line_length += (size_t)n;
}

void add_hex(const char *name, const char *bytes, size_t length)
{
    add(" %s=", name);
    for (size_t i = 0; i < length; i++)
        add("%02x", (unsigned char)bytes[i]);
}

void add_text(const char *name, const char *text) { add_hex(name, text, strlen(text)); }

/* The beginning of a file, or nothing. */
size_t read_file(const char *path, char *into, size_t most)
{
    ssize_t n = -1;
    /* The claim may have become a FIFO: never wait for it. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) {
        n = read(fd, into, most);
        close(fd);
    }
    return n > 0 ? (size_t)n : 0;
}

void add_file(const char *name, const char *path, size_t most)
{
    char buffer[SHOWN_BYTES];
    add_hex(name, buffer, read_file(path, buffer, most));
}

/* Gives the line, and begins another one: it stands until then. */
const char *end_line(size_t *length)
{
    add("\n");
    *length = line_length;
    line_length = 0;
    return line;
}
