/*
 * The first process of every sandbox. It is ours, mounted read-only over the
 * builder's root filesystem, and it is static: nothing of the builder image is
 * run before the canary was accepted.
 *
 *   1. read the plan (argv[1]), a list of NUL-terminated strings
 *   2. canary: write what this kernel shows of itself as one line to stdout
 *   3. wait for "release NONCE" on stdin; anything else, or its end, is the end
 *   4. forward 127.0.0.1:PORT to the gateway's socket
 *   5. run the commands one after the other; the first that fails is the last.
 *      They write to a pipe of ours: nobody else has the way to the host
 *   6. kill what is left, wait until it is gone, and write one line with the
 *      exit status and the claim
 *
 * When stdin ends, whoever started the sandbox is gone: so are we. And so we are
 * when twice the time is over that the build has.
 *
 * As `init send FILE SOCKET` it is one of those commands: it hands a file out.
 * As `init relay PORT SOCKET ...` it is the door of a sandbox on a network.
 *
 * Lines to the host: words separated by one space, values in hex, so that no
 * byte from in here can be taken for a separator. The host checks every one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    FAILED = 125,              /* our own trouble, as in `docker run` */
    PLAN_BYTES = 1 << 20,
    COMMANDS = 64,
    SHOWN_BYTES = 4096,        /* of each file or log shown by the canary */
    CLAIM_BYTES = 256,
    /* System calls are what gVisor charges for: few and large. socat's 8 KiB
     * moved 1000 MiB in 18.9 s, 1 MiB in 1.7 s. */
    FORWARD_BYTES = 1 << 20,
    FORWARD_CONNECTIONS = 64,
};

static int connections;
static pthread_mutex_t connections_lock = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *what)
{
    dprintf(STDERR_FILENO, "runner: init: %s: %s\n", what, strerror(errno));
    _exit(FAILED);
}

/* ---- the host ----------------------------------------------------------- */

/* Connects to a path of a Unix socket, or to A.B.C.D:PORT. */
static int connect_host(const char *address)
{
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    struct sockaddr_in place = {.sin_family = AF_INET};
    struct sockaddr *to = (struct sockaddr *)&path;
    socklen_t length = sizeof path;
    unsigned char a, b, c, d;
    unsigned short port;

    if (address[0] == '/' && strlen(address) < sizeof path.sun_path) {
        strcpy(path.sun_path, address);
    } else if (sscanf(address, "%hhu.%hhu.%hhu.%hhu:%hu", &a, &b, &c, &d, &port) == 5) {
        place.sin_addr.s_addr = htonl((uint32_t)a << 24 | b << 16 | c << 8 | d);
        place.sin_port = htons(port);
        to = (struct sockaddr *)&place;
        length = sizeof place;
    } else {
        errno = EINVAL;
        return -1;
    }
    int fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, to, length) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* ---- the plan ----------------------------------------------------------- */

static char *plan_next, *plan_end;

static char *next_string(void)
{
    char *string = plan_next;
    char *nul = memchr(string, 0, (size_t)(plan_end - string));
    if (nul == NULL) {
        errno = EINVAL;
        die("plan is cut short");
    }
    plan_next = nul + 1;
    return string;
}

static long next_number(long least, long most)
{
    char *end, *string = next_string();
    long number = strtol(string, &end, 10);
    if (*string == 0 || *end != 0 || number < least || number > most) {
        errno = EINVAL;
        die("plan has a bad number");
    }
    return number;
}

static void read_plan(const char *path)
{
    static char buffer[PLAN_BYTES];
    size_t length = 0;
    ssize_t n = 1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die("plan");
    while (length < sizeof buffer && (n = read(fd, buffer + length, sizeof buffer - length)) > 0)
        length += (size_t)n;
    if (n != 0)
        die("plan");
    close(fd);
    plan_next = buffer;
    plan_end = buffer + length;
}

/* ---- lines to the host -------------------------------------------------- */

static char line[16 * SHOWN_BYTES];
static size_t line_length;

static void add(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + line_length, sizeof line - line_length, format, arguments);
    va_end(arguments);
    if (n > 0 && line_length + (size_t)n < sizeof line)
        line_length += (size_t)n;
}

static void add_hex(const char *name, const char *bytes, size_t length)
{
    add(" %s=", name);
    for (size_t i = 0; i < length; i++)
        add("%02x", (unsigned char)bytes[i]);
}

static void add_text(const char *name, const char *text) { add_hex(name, text, strlen(text)); }

static void add_file(const char *name, const char *path, size_t most)
{
    char buffer[SHOWN_BYTES];
    ssize_t n = -1;
    /* The claim may have become a FIFO: never wait for it. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) {
        n = read(fd, buffer, most);
        close(fd);
    }
    add_hex(name, buffer, n > 0 ? (size_t)n : 0);
}

/* The host's pipe may be full, and gVisor says so even to who would wait. */
static void to_host(const char *bytes, size_t length)
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

static void send_line(void)
{
    add("\n");
    to_host(line, line_length);
    line_length = 0;
}

/* ---- canary ------------------------------------------------------------- */

static void add_names(const char *name, const char *directory)
{
    char names[SHOWN_BYTES] = "";
    size_t length = 0;
    DIR *dir = opendir(directory);
    struct dirent *entry;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        size_t n = strlen(entry->d_name);
        if (entry->d_name[0] == '.' || length + n + 2 > sizeof names)
            continue;
        length += (size_t)snprintf(names + length, sizeof names - length, "%s%s",
                                   length ? "\n" : "", entry->d_name);
    }
    if (dir != NULL)
        closedir(dir);
    add_text(name, names);
}

static void show_canary(const char *nonce)
{
    struct utsname uts;
    char log[SHOWN_BYTES], ids[64];
    int logged = klogctl(3 /* SYSLOG_ACTION_READ_ALL */, log, sizeof log);

    if (uname(&uts) != 0)
        die("uname");
    snprintf(ids, sizeof ids, "%u:%u", (unsigned)getuid(), (unsigned)getgid());
    add("runner-canary 1 nonce=%s", nonce);
    add_text("release", uts.release);
    add_text("version", uts.version);
    add_text("machine", uts.machine);
    add_text("ids", ids);
    add_hex("log", log, logged > 0 ? (size_t)logged : 0);
    add_file("proc_version", "/proc/version", SHOWN_BYTES);
    add_file("gvisor", "/proc/gvisor/kernel_is_gvisor", 16);
    add_file("boot_id", "/proc/sys/kernel/random/boot_id", 64);
    add_names("interfaces", "/sys/class/net");
    add_file("mounts", "/proc/self/mounts", SHOWN_BYTES);
    add_file("net_dev", "/proc/net/dev", SHOWN_BYTES);
    send_line();
}

static void too_late(int unused)
{
    (void)unused;
    _exit(FAILED);
}

static void *watch_stdin(void *unused)
{
    char byte;
    ssize_t n;
    (void)unused;
    while ((n = read(STDIN_FILENO, &byte, 1)) > 0 || (n < 0 && errno == EINTR))
        ;
    _exit(FAILED);
}

static void await_release(const char *nonce, unsigned seconds)
{
    char wanted[256], got[256];
    size_t length = 0;
    pthread_t watcher;
    int size = snprintf(wanted, sizeof wanted, "release %s\n", nonce);

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
    /* Whoever should end us in time may be gone without stdin showing it: an
     * engine that crashed leaves it open. */
    signal(SIGALRM, too_late);
    alarm(seconds);
}

/* ---- the door: 127.0.0.1:PORT to the gateway's socket -------------------- */

struct connection {
    int inside, outside;
    int directions_open;
    pthread_mutex_t lock;
};

struct direction {
    struct connection *connection;
    int from, to;
};

static void *copy(void *argument)
{
    struct direction *direction = argument;
    struct connection *connection = direction->connection;
    char *buffer = malloc(FORWARD_BYTES);
    ssize_t got = 0;

    while (buffer != NULL && (got = read(direction->from, buffer, FORWARD_BYTES)) > 0) {
        ssize_t sent = 0;
        while (sent < got) {
            ssize_t n = send(direction->to, buffer + sent, (size_t)(got - sent), MSG_NOSIGNAL);
            if (n < 0)
                goto broken;
            sent += n;
        }
    }
    if (got == 0) {
        shutdown(direction->to, SHUT_WR);
    } else {
    broken:
        shutdown(direction->from, SHUT_RDWR);
        shutdown(direction->to, SHUT_RDWR);
    }
    free(buffer);
    free(direction);

    pthread_mutex_lock(&connection->lock);
    int left = --connection->directions_open;
    pthread_mutex_unlock(&connection->lock);
    if (left == 0) {
        close(connection->inside);
        close(connection->outside);
        free(connection);
        pthread_mutex_lock(&connections_lock);
        connections--;
        pthread_mutex_unlock(&connections_lock);
    }
    return NULL;
}

static void start_copy(struct connection *connection, int from, int to)
{
    struct direction *direction = malloc(sizeof *direction);
    pthread_t thread;
    if (direction == NULL)
        die("memory");
    *direction = (struct direction){connection, from, to};
    if (pthread_create(&thread, NULL, copy, direction) != 0)
        die("thread");
    pthread_detach(thread);
}

struct door {
    const char *host;
    int listener;
};

static void *accept_connections(void *argument)
{
    struct door *door = argument;
    for (;;) {
        int inside = accept4(door->listener, NULL, NULL, SOCK_CLOEXEC);
        if (inside < 0)
            continue;
        pthread_mutex_lock(&connections_lock);
        int room = connections < FORWARD_CONNECTIONS ? ++connections : 0;
        pthread_mutex_unlock(&connections_lock);
        int outside = room ? connect_host(door->host) : -1;
        struct connection *connection = malloc(sizeof *connection);
        if (outside < 0 || connection == NULL) {
            close(inside);
            if (outside >= 0)
                close(outside);
            free(connection);
            if (room) {
                pthread_mutex_lock(&connections_lock);
                connections--;
                pthread_mutex_unlock(&connections_lock);
            }
            continue;
        }
        *connection = (struct connection){inside, outside, 2, PTHREAD_MUTEX_INITIALIZER};
        start_copy(connection, inside, outside);
        start_copy(connection, outside, inside);
    }
    return NULL;
}

/* Forwards what connects to address:port; never ends. */
static void open_door(struct door *door, in_addr_t address, long port)
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

/* ---- commands ------------------------------------------------------------ */

static int output[2]; /* what we read of the commands, and where they write it */

static void *drain_output(void *unused)
{
    static char buffer[64 << 10];
    ssize_t n;
    (void)unused;
    while ((n = read(output[0], buffer, sizeof buffer)) > 0 || (n < 0 && errno == EINTR))
        to_host(buffer, n > 0 ? (size_t)n : 0);
    return NULL;
}

/* Runs argv and returns its exit status, 128 + N where a signal ended it. */
static int run(char **argv)
{
    int status;
    pid_t ended, pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        int null = open("/dev/null", O_RDONLY);
        if (null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(output[1], STDOUT_FILENO) < 0 ||
            dup2(output[1], STDERR_FILENO) < 0)
            _exit(FAILED);
        setsid();
        execvp(argv[0], argv);
        dprintf(STDERR_FILENO, "runner: cannot start %s: %s\n", argv[0], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }
    /* We are process 1: orphans become our children and are reaped here too. */
    while ((ended = wait(&status)) != pid)
        if (ended < 0 && errno != EINTR)
            die("wait");
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Kills everything but us, also what is started meanwhile, and reaps it. */
static void kill_the_rest(void)
{
    while (kill(-1, SIGKILL) == 0) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        usleep(1000);
    }
}

/* ---- handing out a file ---------------------------------------------------- */

static int send_file(const char *path, const char *address)
{
    char *buffer = malloc(FORWARD_BYTES);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    int host = connect_host(address);
    ssize_t got = 0;

    if (buffer == NULL || file < 0)
        die(path);
    if (host < 0)
        die(address);
    while ((got = read(file, buffer, FORWARD_BYTES)) > 0) {
        ssize_t sent = 0;
        while (sent < got) {
            ssize_t n = send(host, buffer + sent, (size_t)(got - sent), MSG_NOSIGNAL);
            if (n < 0)
                die(address);
            sent += n;
        }
    }
    if (got < 0)
        die(path);
    /* Only who has everything closes first: what is half sent is not taken for whole. */
    if (shutdown(host, SHUT_WR) != 0 || read(host, buffer, 1) != 0)
        die(address);
    return 0;
}

/* ---- the relay -------------------------------------------------------------- */

/* The one neighbour of a sandbox that cannot have our sockets: a container that
 * listens on a network of two, and has nothing but them. argv: PORT PATH ... */
static int relay(char **argv)
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

int main(int argc, char **argv)
{
    char **commands[COMMANDS];
    long index, count;
    int status = 0;

    if (argc == 4 && strcmp(argv[1], "send") == 0)
        return send_file(argv[2], argv[3]);
    if (argc >= 4 && strcmp(argv[1], "relay") == 0)
        return relay(argv + 2);
    if (argc != 2) {
        errno = EINVAL;
        die("usage: init PLAN");
    }
    read_plan(argv[1]);
    next_number(1, 1); /* the plan's version */
    const char *nonce = next_string();
    long port = next_number(0, 65535); /* 0: no door */
    static struct door gateway;
    gateway.host = next_string();
    const char *claim_path = next_string();
    unsigned seconds = (unsigned)next_number(1, 1 << 30);
    count = next_number(1, COMMANDS);
    for (index = 0; index < count; index++) {
        long words = next_number(1, 4096);
        commands[index] = calloc((size_t)words + 1, sizeof(char *));
        if (commands[index] == NULL)
            die("memory");
        for (long word = 0; word < words; word++)
            commands[index][word] = next_string();
    }
    if (strlen(nonce) > 128) {
        errno = ENAMETOOLONG;
        die("plan");
    }

    show_canary(nonce);
    await_release(nonce, seconds);
    if (port != 0)
        open_door(&gateway, INADDR_LOOPBACK, port);
    pthread_t drain;
    if (pipe2(output, O_CLOEXEC) != 0 || pthread_create(&drain, NULL, drain_output, NULL) != 0)
        die("output");
    for (index = 0; index < count && status == 0; index++)
        status = run(commands[index]);

    kill_the_rest();
    close(output[1]);
    pthread_join(drain, NULL);
    /* A line of its own, whatever the last command left unfinished. */
    add("\nrunner-exit 1 nonce=%s command=%ld status=%d", nonce, index - 1, status);
    add_file("claim", claim_path, CLAIM_BYTES);
    send_line();
    _exit(status);
}
