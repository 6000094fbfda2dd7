/*
 * The spool: the stream that the host gets over a way, from its first byte. A connection
 * may break with any number of bytes under way; whoever comes next says where to go on.
 *
 * A file, since a log of some 100 MB has no place in our memory; without a name, since
 * nobody else has to find it.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Beyond what a build may write: the host ends it when it has seen more than that, so
 * it has to see a little more. */
enum { MORE_BYTES = 64 << 10 };

static const char PATH[] = RUNNER "/output";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int file, event, over;
static long long length_bytes, limit_bytes;

void open_spool(long long most_bytes)
{
    file = open(PATH, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (file < 0 || event < 0 || unlink(PATH) != 0)
        die(PATH);
    limit_bytes = most_bytes + MORE_BYTES;
}

static void append(const char *bytes, size_t length, int last)
{
    uint64_t one = 1;
    for (size_t written = 0; written < length;) {
        ssize_t n = pwrite(file, bytes + written, length - written,
                           (off_t)(length_bytes + (long long)written));
        if (n < 0 && errno != EINTR)
            die("spool");
        written += n > 0 ? (size_t)n : 0;
    }
    pthread_mutex_lock(&lock);
    length_bytes += (long long)length;
    over = last;
    pthread_mutex_unlock(&lock);
    if (write(event, &one, sizeof one) < 0 && errno != EAGAIN)
        die("event");
}

size_t spool(const char *bytes, size_t length)
{
    long long room = limit_bytes - length_bytes;
    if ((long long)length > room)
        length = (size_t)room;
    if (length > 0)
        append(bytes, length, 0);
    return length;
}

void spool_last(const char *bytes, size_t length) { append(bytes, length, 1); }

long long spooled(int *ended)
{
    pthread_mutex_lock(&lock);
    long long length = length_bytes;
    *ended = over;
    pthread_mutex_unlock(&lock);
    return length;
}

/* Reads what is there: the caller asks for no more. */
void read_spool(char *buffer, size_t length, long long offset)
{
    while (length > 0) {
        ssize_t n = pread(file, buffer, length, (off_t)offset);
        if (n == 0 || (n < 0 && errno != EINTR))
            die("spool");
        buffer += n > 0 ? n : 0;
        offset += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
}

int spool_event(void) { return event; }
