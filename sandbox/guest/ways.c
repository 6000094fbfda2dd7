/* Ways: where the host is found, and how it is connected to. */
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAUSE_SECONDS = 1 }; /* between two tries */

static const char TLS[] = "tls:";
static const char *const NAMES[] = {"host", "files", "gateway", "outlet"};

double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

/* Reads A.B.C.D:PORT and nothing else. */
int parse_place(const char *text, struct sockaddr_in *place)
{
    char address[INET_ADDRSTRLEN], *rest;
    const char *colon = strchr(text, ':');
    size_t length = colon == NULL ? sizeof address : (size_t)(colon - text);
    *place = (struct sockaddr_in){.sin_family = AF_INET};
    errno = EINVAL;
    if (length >= sizeof address || colon[1] < '0' || colon[1] > '9')
        return -1;
    memcpy(address, text, length);
    address[length] = 0;
    long port = strtol(colon + 1, &rest, 10);
    if (inet_pton(AF_INET, address, &place->sin_addr) != 1 || *rest != 0 || port < 1 ||
        port > 65535)
        return -1;
    place->sin_port = htons((uint16_t)port);
    return 0;
}

static int connect_way(const char *way)
{
    char place[WAY_BYTES];
    struct sockaddr_in to;
    const char *slash = strchr(way, '/');
    size_t length = slash == NULL ? sizeof place : (size_t)(slash - way) - strlen(TLS);

    errno = EINVAL;
    if (length >= sizeof place)
        return -1;
    memcpy(place, way + strlen(TLS), length);
    place[length] = 0;
    if (parse_place(place, &to) != 0)
        return -1;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(slash + 1, NAMES[i]) == 0)
            return connect_tls(&to, NAMES[i]);
    errno = EINVAL;
    return -1;
}

/* A descriptor with the host at its other end; -1 and errno where there is none. */
int connect_host(const char *way)
{
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    struct sockaddr_in place;
    struct sockaddr *to = (struct sockaddr *)&path;
    socklen_t length = sizeof path;

    if (strncmp(way, TLS, strlen(TLS)) == 0)
        return connect_way(way);
    if (way[0] == '/' && strlen(way) < sizeof path.sun_path) {
        strcpy(path.sun_path, way);
    } else if (parse_place(way, &place) == 0) {
        to = (struct sockaddr *)&place;
        length = sizeof place;
    } else {
        return -1;
    }
    int fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, to, length) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Waits a little; dies where the patience is over. */
void pause_patiently(struct patience *patience)
{
    int error = errno;
    sleep(PAUSE_SECONDS);
    patience->used += PAUSE_SECONDS;
    errno = error;
    if (patience->used > patience->seconds)
        die("no connection to the host, and no patience left");
}

/* As connect_host, trying again every second. What is used of the patience does not come
 * back by a connection alone: a host that lets us in and turns us away at once is none. */
int connect_patiently(const char *way, struct patience *patience)
{
    for (;;) {
        double began = now();
        int fd = connect_host(way);
        patience->used += now() - began;
        if (fd >= 0)
            return fd;
        if (errno == EINVAL || errno == EPROTONOSUPPORT)
            die(way); /* no time will mend that */
        pause_patiently(patience);
    }
}

int send_all(int fd, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return -1;
        bytes += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}
