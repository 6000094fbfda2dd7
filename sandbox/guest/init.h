/* What the files of the first process know of each other; init.c says what it is. */
#ifndef RUNNER_INIT_H
#define RUNNER_INIT_H

#define _GNU_SOURCE
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

enum {
    FAILED = 125, /* our own trouble, as in `docker run` */
    COMMANDS = 64,
    PROBES = 64,
    WRITABLE = 64,
    SHOWN_BYTES = 4096, /* of each file or log shown by the canary */
    CLAIM_BYTES = 256,
    WAY_BYTES = 256, /* the longest way to the host */
    /* System calls are what gVisor charges for: few and large. socat's 8 KiB
     * moved 1000 MiB in 18.9 s, 1 MiB in 1.7 s. */
    BUFFER_BYTES = 1 << 20,
};

/* Where everything of ours is inside: read-only mounts, or a pod's volumes. */
#define RUNNER "/run/runner"

/* plan.c: what to do, from a file of NUL-terminated strings. */
struct plan {
    const char *nonce;
    const char *host;    /* way of the conversation; empty: stdin and stdout */
    long port;           /* on loopback, for the gateway; 0: no door */
    const char *gateway; /* way to it */
    const char *files;   /* way that files come by; empty: none come */
    const char *claim;   /* path */
    unsigned seconds;    /* after the release, to our end whatever happens */
    unsigned patience;   /* seconds without the host, to our end as well */
    long long log_bytes;
    long long writable_bytes; /* 0: the commands run beside us; else of each path */
    long writable_count;
    const char *writable[WRITABLE];
    long probe_count;
    const char *probes[PROBES];
    long command_count;
    char **commands[COMMANDS];
};

void read_plan(struct plan *plan, const char *path);

/* init.c */
_Noreturn void die(const char *what);
_Noreturn void refuse(const char *what); /* what we were given is wrong: as die, with EINVAL */

/* ways.c: a way is where the host is found: /SOCKET, A.B.C.D:PORT, tls:A.B.C.D:PORT/NAME. */
int parse_place(const char *text, struct sockaddr_in *place);
int connect_host(const char *way);
double now(void); /* seconds */
struct patience {
    unsigned seconds;
    double used;
};
void pause_patiently(struct patience *patience);
int connect_patiently(const char *way, struct patience *patience);
int send_all(int fd, const char *bytes, size_t length);

/* tls.c; in the small binary no-tls.c, which has nothing of it. */
void prepare_tls(void);
int connect_tls(const struct sockaddr_in *place, const char *name);
int tls_broke(void); /* whether a connection of this process ended in disorder */

/* files.c, or no-tls.c: 0, or -1 with what went wrong in `why`. */
int fetch_files(const char *way, unsigned patience, char *why, size_t size);

/* report.c: the line to the host that is being made. */
void add(const char *format, ...) __attribute__((format(printf, 1, 2)));
void add_hex(const char *name, const char *bytes, size_t length);
void add_text(const char *name, const char *text);
void add_file(const char *name, const char *path, size_t most);
size_t read_file(const char *path, char *into, size_t most);
const char *end_line(size_t *length);

/* canary.c, probes.c */
const char *probe(const struct plan *plan);
void add_canary(const char *nonce, const char *reached);

/* pipes.c: the host behind stdin and stdout. */
void await_release_on_stdin(const struct plan *plan);
void to_stdout(const char *bytes, size_t length);
void show(const char *bytes, size_t length); /* where somebody looks at it */

/* conversation.c: the host behind a way. */
void await_release_over_way(const struct plan *plan);
void start_sending(void);
void finish_sending(void); /* returns when the host has all */

/* spool.c: what the host gets over a way, kept until it has all of it. */
void open_spool(long long most_bytes);
size_t spool(const char *bytes, size_t length);    /* how much it kept */
void spool_last(const char *bytes, size_t length); /* keeps all, and is the end */
long long spooled(int *ended);
void read_spool(char *buffer, size_t length, long long offset);
int spool_event(void); /* a descriptor that is readable when there is more */

/* door.c, send.c */
struct door {
    const char *host;
    int listener;
};
void open_door(struct door *door, in_addr_t address, long port);
int send_file(const char *path, const char *way);
int relay(char **argv);

/* commands.c: how the commands ended; what is in the claim is theirs. */
struct ended {
    long command;
    int status;
    size_t claim_length;
    char claim[CLAIM_BYTES];
};
void run_commands(const struct plan *plan, struct ended *ended);
void show_errors(void); /* ours, of a process that runs commands */
void start_output(void (*take)(const char *bytes, size_t length));
void finish_output(void);
void kill_the_rest(void);

/* namespace.c */
void run_commands_apart(const struct plan *plan, struct ended *ended);

#endif
