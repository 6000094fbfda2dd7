/* Probes: addresses that nobody in here may reach, tried before anything else. */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A cluster's network policy may be enforced a moment after a pod starts. */
enum { ROUNDS = 4, ROUND_MILLISECONDS = 1000, PAUSE_SECONDS = 1 };

static int begin(const char *text)
{
    struct sockaddr_in place;
    if (parse_place(text, &place) != 0)
        refuse("plan has a bad probe");
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        die("probe");
    if (connect(fd, (struct sockaddr *)&place, sizeof place) != 0 && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

static int connected(int fd)
{
    int error = 0;
    socklen_t length = sizeof error;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0;
}

/* Tries all at once; marks those that connected, and says how many. A refusal is an
 * answer too, but of nobody: what listens there matters. */
static int try_all(const struct plan *plan, char *reached)
{
    struct pollfd tries[PROBES];
    double end = now() + ROUND_MILLISECONDS / 1000.0;
    int waiting = 0, found = 0, left;

    memset(reached, 0, PROBES);
    for (long i = 0; i < plan->probe_count; i++) {
        tries[i] = (struct pollfd){.fd = begin(plan->probes[i]), .events = POLLOUT};
        waiting += tries[i].fd >= 0;
    }
    while (waiting > 0 && (left = (int)((end - now()) * 1000)) > 0 &&
           poll(tries, (nfds_t)plan->probe_count, left) > 0) {
        for (long i = 0; i < plan->probe_count; i++) {
            if (tries[i].fd < 0 || tries[i].revents == 0)
                continue;
            found += reached[i] = (char)connected(tries[i].fd);
            close(tries[i].fd);
            tries[i].fd = -1;
            waiting--;
        }
    }
    for (long i = 0; i < plan->probe_count; i++)
        if (tries[i].fd >= 0)
            close(tries[i].fd);
    return found;
}

/* Which probes can be reached, one per line. */
const char *probe(const struct plan *plan)
{
    static char names[PROBES * sizeof "255.255.255.255:65535"];
    char reached[PROBES];
    size_t length = 0;

    for (int round = 1; plan->probe_count > 0 && try_all(plan, reached) > 0; round++) {
        if (round < ROUNDS) {
            sleep(PAUSE_SECONDS);
            continue;
        }
        for (long i = 0; i < plan->probe_count; i++)
            if (reached[i])
                length += (size_t)snprintf(names + length, sizeof names - length, "%s%s",
                                           length ? "\n" : "", plan->probes[i]);
        break;
    }
    return names;
}
