/* What else this program is called for: to hand a file out, and to be a relay. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* `init send FILE WAY`, one of the commands. */
int send_file(const char *path, const char *way)
{
    char *buffer = malloc(BUFFER_BYTES);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    int host = connect_host(way);
    ssize_t got = 0;

    if (buffer == NULL || file < 0)
        die(path);
    if (host < 0)
        die(way);
    while ((got = read(file, buffer, BUFFER_BYTES)) > 0)
        if (send_all(host, buffer, (size_t)got) != 0)
            die(way);
    if (got < 0)
        die(path);
    /* Only who has everything closes first: what is half sent is not taken for whole. */
    if (shutdown(host, SHUT_WR) != 0 || read(host, buffer, 1) != 0)
        die(way);
    if (tls_broke()) {
        errno = ECONNRESET;
        die(way);
    }
    return 0;
}

/* `init relay PORT PATH ...`: the one neighbour of a sandbox that cannot have our sockets,
 * a container that listens on a network of two, and has nothing but them. */
int relay(char **argv)
{
    static struct door doors[2];
    char byte;
    for (int i = 0; i < 2 && argv[0] != NULL && argv[1] != NULL; i++, argv += 2) {
        doors[i].host = argv[1];
        open_door(&doors[i], INADDR_ANY, strtol(argv[0], NULL, 10));
    }
    dprintf(STDOUT_FILENO, "runner-relay 1\n");
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    return 0; /* whoever started us is gone */
}
