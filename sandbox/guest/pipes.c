/* The host behind stdin and stdout: who started the sandbox holds both. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SHOW_MILLISECONDS = 10000 };

static void *watch_stdin(void *unused)
{
    char byte;
    ssize_t n;
    (void)unused;
    while ((n = read(STDIN_FILENO, &byte, 1)) > 0 || (n < 0 && errno == EINTR))
        ;
    _exit(FAILED);
}

/* Sends the canary that was made, and comes back when we are released. */
void await_release_on_stdin(const struct plan *plan)
{
    char wanted[256], got[256];
    size_t length = 0, canary_length;
    pthread_t watcher;
    const char *canary = end_line(&canary_length);
    int size = snprintf(wanted, sizeof wanted, "release %s\n", plan->nonce);

    to_stdout(canary, canary_length);
    while (length < (size_t)size) {
        ssize_t n = read(STDIN_FILENO, got + length, (size_t)size - length);
        if (n <= 0)
            _exit(FAILED);
        length += (size_t)n;
    }
    if (memcmp(wanted, got, length) != 0)
        _exit(FAILED);
    if (pthread_create(&watcher, NULL, watch_stdin, NULL) != 0)
        die("thread");
}

/* The host's pipe may be full, and gVisor says so even to who would wait. */
void to_stdout(const char *bytes, size_t length)
{
    struct pollfd host = {.fd = STDOUT_FILENO, .events = POLLOUT};
    while (length > 0) {
        ssize_t n = write(STDOUT_FILENO, bytes, length);
        if (n < 0 && errno == EAGAIN)
            poll(&host, 1, 1000);
        else if (n < 0 && errno != EINTR)
            _exit(FAILED);
        bytes += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
}

/* Writes to stdout what the host gets by another way. Nobody depends on it: a pipe that is
 * broken, or full for long because nobody reads it any more, does not hold the build up. */
void show(const char *bytes, size_t length)
{
    static int blind;
    struct pollfd looker = {.fd = STDOUT_FILENO, .events = POLLOUT};
    while (length > 0 && !blind) {
        int flags = fcntl(STDOUT_FILENO, F_GETFL);
        if (!(flags & O_NONBLOCK))
            fcntl(STDOUT_FILENO, F_SETFL, flags | O_NONBLOCK);
        ssize_t n = write(STDOUT_FILENO, bytes, length);
        if (n < 0 && errno == EAGAIN)
            blind = poll(&looker, 1, SHOW_MILLISECONDS) == 0;
        else if (n < 0 && errno != EINTR)
            blind = 1;
        bytes += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
}
