/*
 * The conversation over a way, where nobody holds our stdin and stdout.
 *
 *   we    the canary's line
 *   host  release NONCE
 *   we    frames: length in 4 bytes, big endian, and that many bytes of the spool;
 *         one of length 0 is the end
 *   host  done; or, at any time after the release, end NONCE
 *
 * A connection that breaks before the release is begun anew. After it, we say
 * `runner-again 1 nonce=NONCE`, the host says `from OFFSET`, a byte of the stream, and we
 * go on there: what the host has not seen comes again, and nothing comes twice.
 *
 * Any other word of the host's is the end of us, and so is too long a time without it.
 */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    LINE_BYTES = 256,
    FRAME_BYTES = 256 << 10,
    HEAD_BYTES = 4,
    ANSWER_MILLISECONDS = 10000, /* for `from`: it is one look at what the host has */
};

static const char *way, *nonce;
static struct patience patience;

/* The connection there is, and what the host said that nobody has read yet. */
static int host = -1;
static char heard[LINE_BYTES];
static size_t heard_length;

static pthread_t sender;

static void call(void)
{
    host = connect_patiently(way, &patience);
    heard_length = 0;
}

static void hang_up(void)
{
    close(host);
    host = -1;
    pause_patiently(&patience);
}

/* Takes one whole line, if there is one. */
static int take_line(char *line)
{
    char *end = memchr(heard, '\n', heard_length);
    if (end == NULL) {
        if (heard_length == sizeof heard)
            refuse("the host goes on and on");
        return 0;
    }
    size_t length = (size_t)(end - heard);
    if (memchr(heard, 0, length) != NULL)
        refuse("the host says nothing");
    memcpy(line, heard, length);
    line[length] = 0;
    heard_length -= length + 1;
    memmove(heard, end + 1, heard_length);
    return 1;
}

/* Whether the connection still is one. */
static int listen_to_host(void)
{
    ssize_t n = recv(host, heard + heard_length, sizeof heard - heard_length, MSG_DONTWAIT);
    if (n > 0)
        heard_length += (size_t)n;
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

/* Whether a line came, on this connection and in time; -1: there is no hurry. */
static int await_line(char *line, int milliseconds)
{
    while (!take_line(line)) {
        struct pollfd it = {.fd = host, .events = POLLIN};
        int ready = poll(&it, 1, milliseconds);
        if (ready == 0 || (ready > 0 && !listen_to_host()))
            return 0;
    }
    return 1;
}

static int is(const char *line, const char *word)
{
    char wanted[LINE_BYTES];
    snprintf(wanted, sizeof wanted, "%s %s", word, nonce);
    return strcmp(line, wanted) == 0;
}

/* Sends the canary that was made, and comes back when we are released. */
void await_release_over_way(const struct plan *plan)
{
    char line[LINE_BYTES];
    size_t length;
    const char *canary = end_line(&length);

    way = plan->host;
    nonce = plan->nonce;
    patience.seconds = plan->patience;
    call();
    while (send_all(host, canary, length) != 0 || !await_line(line, -1)) {
        hang_up();
        call();
    }
    if (!is(line, "release"))
        refuse("not released");
}

/* ---- after the release: the sender has the connection for itself ----------- */

/* Where to go on, from what the host says: a byte that there is. */
static long long read_offset(const char *line)
{
    static const char FROM[] = "from ";
    const char *digits = line + strlen(FROM);
    int ended;
    if (strncmp(line, FROM, strlen(FROM)) != 0 || *digits == 0 || strlen(digits) > 18 ||
        strspn(digits, "0123456789") != strlen(digits))
        refuse("the host does not say where to go on");
    long long offset = strtoll(digits, NULL, 10);
    if (offset > spooled(&ended))
        refuse("the host wants what there is not");
    return offset;
}

static long long begin_again(void)
{
    char again[LINE_BYTES], line[LINE_BYTES];
    int size = snprintf(again, sizeof again, "runner-again 1 nonce=%s\n", nonce);
    for (;;) {
        hang_up();
        call();
        double began = now();
        int answered = send_all(host, again, (size_t)size) == 0 &&
                       await_line(line, ANSWER_MILLISECONDS);
        patience.used += now() - began;
        if (!answered)
            continue;
        if (is(line, "end"))
            _exit(FAILED);
        long long offset = read_offset(line);
        patience.used = 0;
        return offset;
    }
}

/* The frame under way. */
static char frame[HEAD_BYTES + FRAME_BYTES];
static size_t frame_length, frame_sent;

/* Makes the next frame of what is there: says how many bytes, -1 if there is none yet. */
static long make_frame(long long offset)
{
    int ended;
    long long left = spooled(&ended) - offset;
    if (left == 0 && !ended)
        return -1;
    size_t size = left < FRAME_BYTES ? (size_t)left : FRAME_BYTES;
    for (int i = 0; i < HEAD_BYTES; i++)
        frame[i] = (char)(size >> 8 * (HEAD_BYTES - 1 - i));
    read_spool(frame + HEAD_BYTES, size, offset);
    frame_length = HEAD_BYTES + size;
    frame_sent = 0;
    return (long)size;
}

static int under_way(void) { return frame_sent < frame_length; }

/* Sends what can be sent now; whether the connection still is one. */
static int send_frame(void)
{
    ssize_t n = send(host, frame + frame_sent, frame_length - frame_sent,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
    frame_sent += n > 0 ? (size_t)n : 0;
    return n >= 0 || errno == EAGAIN || errno == EINTR;
}

/* Until the host says something, or takes something, or there is more for it; whether the
 * connection still is one. */
static int await_anything(void)
{
    uint64_t count;
    struct pollfd it[2] = {
        {.fd = host, .events = (short)(POLLIN | (under_way() ? POLLOUT : 0))},
        {.fd = spool_event(), .events = (short)(under_way() ? 0 : POLLIN)},
    };
    if (poll(it, 2, -1) <= 0)
        return 1;
    if (it[1].revents && read(it[1].fd, &count, sizeof count) < 0 && errno != EAGAIN)
        die("event");
    return !(it[0].revents & ~POLLOUT) || listen_to_host();
}

/* Whether the host said that it has all: which it can only where that was sent. */
static int heed(const char *line, int all_sent)
{
    if (is(line, "end"))
        _exit(FAILED);
    if (strcmp(line, "done") != 0 || !all_sent)
        refuse("the host says what makes no sense");
    return 1;
}

/* Sends the stream from `offset` on: 1 when the host has all, 0 when the connection broke. */
static int send_stream(long long offset)
{
    char line[LINE_BYTES];
    int connected = 1, ended = 0;
    long size;

    frame_length = frame_sent = 0;
    while (connected) {
        if (take_line(line) && heed(line, ended && !under_way()))
            return 1;
        if (under_way())
            connected = send_frame() && (!under_way() || await_anything());
        else if (ended || (size = make_frame(offset)) < 0)
            connected = await_anything();
        else {
            offset += size;
            ended = size == 0;
        }
    }
    return 0;
}

static void *send_all_of_it(void *unused)
{
    long long offset = 0;
    (void)unused;
    while (!send_stream(offset))
        offset = begin_again();
    return NULL;
}

void start_sending(void)
{
    if (pthread_create(&sender, NULL, send_all_of_it, NULL) != 0)
        die("thread");
}

void finish_sending(void) { pthread_join(sender, NULL); }
