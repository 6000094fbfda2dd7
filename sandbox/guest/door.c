/* The door: a port in here, and whatever connects to it has the host at its other end. */
#include "init.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTIONS = 64 };

static int connections;
static pthread_mutex_t connections_lock = PTHREAD_MUTEX_INITIALIZER;

struct connection {
    const char *host;
    int inside, outside;
    int directions_open;
    pthread_mutex_t lock;
};

struct direction {
    struct connection *connection;
    int from, to;
};

static int enter(void)
{
    pthread_mutex_lock(&connections_lock);
    int room = connections < CONNECTIONS ? ++connections : 0;
    pthread_mutex_unlock(&connections_lock);
    return room;
}

static void leave(struct connection *connection)
{
    close(connection->inside);
    if (connection->outside >= 0)
        close(connection->outside);
    free(connection);
    pthread_mutex_lock(&connections_lock);
    connections--;
    pthread_mutex_unlock(&connections_lock);
}

static void copy(struct connection *connection, int from, int to)
{
    char *buffer = malloc(BUFFER_BYTES);
    ssize_t got = -1;

    while (buffer != NULL && (got = read(from, buffer, BUFFER_BYTES)) > 0) {
        if (send_all(to, buffer, (size_t)got) != 0) {
            got = -1;
            break;
        }
    }
    if (got == 0) {
        shutdown(to, SHUT_WR);
    } else {
        shutdown(from, SHUT_RDWR);
        shutdown(to, SHUT_RDWR);
    }
    free(buffer);

    pthread_mutex_lock(&connection->lock);
    int left = --connection->directions_open;
    pthread_mutex_unlock(&connection->lock);
    if (left == 0)
        leave(connection);
}

static void *copy_inwards(void *argument)
{
    struct connection *connection = argument;
    copy(connection, connection->outside, connection->inside);
    return NULL;
}

/* Nobody who connects waits for the host to take in somebody else: each has a thread. */
static void *serve(void *argument)
{
    struct connection *connection = argument;
    pthread_t inwards;
    connection->outside = connect_host(connection->host);
    if (connection->outside < 0) {
        leave(connection);
        return NULL;
    }
    if (pthread_create(&inwards, NULL, copy_inwards, connection) != 0)
        die("thread");
    pthread_detach(inwards);
    copy(connection, connection->inside, connection->outside);
    return NULL;
}

static void *accept_connections(void *argument)
{
    struct door *door = argument;
    for (;;) {
        pthread_t thread;
        int inside = accept4(door->listener, NULL, NULL, SOCK_CLOEXEC);
        if (inside < 0)
            continue;
        if (!enter()) {
            close(inside);
            continue;
        }
        struct connection *connection = malloc(sizeof *connection);
        if (connection == NULL)
            die("memory");
        *connection = (struct connection){door->host, inside, -1, 2, PTHREAD_MUTEX_INITIALIZER};
        if (pthread_create(&thread, NULL, serve, connection) != 0)
            die("thread");
        pthread_detach(thread);
    }
    return NULL;
}

/* Forwards what connects to address:port; never ends. */
void open_door(struct door *door, in_addr_t address, long port)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    pthread_t thread;
    int on = 1;

    here.sin_addr.s_addr = htonl(address);
    door->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (door->listener < 0 ||
        setsockopt(door->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
        bind(door->listener, (struct sockaddr *)&here, sizeof here) != 0 ||
        listen(door->listener, 128) != 0)
        die("door");
    if (pthread_create(&thread, NULL, accept_connections, door) != 0)
        die("thread");
}
