/*
 * The first process of every sandbox. It is ours, mounted read-only over the
 * builder's root filesystem, and it is static: nothing of the builder image is
 * run before the canary was accepted.
 *
 *   1. read the plan (argv[1]), a list of NUL-terminated strings
 *   2. canary: send what this kernel shows of itself, and which of the addresses
 *      it reaches that nobody in here may reach, as one line to the host
 *   3. wait for "release NONCE"; anything else, or its end, is the end
 *   4. take the files that the host sends, where it sends them over a way
 *   5. forward 127.0.0.1:PORT to the gateway
 *   6. run the commands one after the other; the first that fails is the last.
 *      They write to a pipe of ours: nobody else has the way to the host. Where
 *      the sandbox may have few capabilities, in namespaces of their own
 *   7. kill what is left, wait until it is gone, and write one line with the
 *      exit status and the claim
 *
 * The host is behind stdin and stdout. When stdin ends, whoever started the
 * sandbox is gone: so are we. Or, in a pod, it is behind a way (ways.c), and its
 * connections may break and come again (conversation.c). In both cases we end
 * when twice the time is over that the build has.
 *
 * As `init send FILE WAY` it is one of those commands: it hands a file out.
 * As `init relay PORT WAY ...` it is the door of a sandbox on a network.
 *
 * Two programs are made of these files: init, and init-pod, which has TLS.
 */
#include "init.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

void die(const char *what)
{
    dprintf(STDERR_FILENO, "runner: init: %s: %s\n", what, strerror(errno));
    _exit(FAILED);
}

void refuse(const char *what)
{
    errno = EINVAL;
    die(what);
}

static void too_late(int unused)
{
    (void)unused;
    _exit(FAILED);
}

/* Whoever should end us in time may be gone without our seeing it: an engine that
 * crashed leaves stdin open. */
static void start_alarm(unsigned seconds)
{
    signal(SIGALRM, too_late);
    alarm(seconds);
}

static void spool_and_show(const char *bytes, size_t length) { show(bytes, spool(bytes, length)); }

/* Where nothing is right without them, and the host should read why. */
static void take_files(const struct plan *plan)
{
    char why[1024], line[1100];
    if (fetch_files(plan->files, plan->patience, why, sizeof why) == 0)
        return;
    int length = snprintf(line, sizeof line, "runner: init: files: %s\n", why);
    dprintf(STDERR_FILENO, "%s", line);
    if (*plan->host != 0) {
        spool_last(line, (size_t)length);
        finish_sending();
    }
    _exit(FAILED);
}

static void await_release(const struct plan *plan)
{
    add_canary(plan->nonce, probe(plan));
    if (*plan->host == 0) {
        await_release_on_stdin(plan);
    } else {
        await_release_over_way(plan);
        open_spool(plan->log_bytes);
        start_sending();
    }
    start_alarm(plan->seconds);
}

static void report(const struct plan *plan, const struct ended *ended)
{
    size_t length;
    /* A line of its own, whatever the last command left unfinished. */
    add("\nrunner-exit 1 nonce=%s command=%ld status=%d", plan->nonce, ended->command,
        ended->status);
    add_hex("claim", ended->claim, ended->claim_length);
    const char *line = end_line(&length);
    if (*plan->host == 0) {
        to_stdout(line, length);
    } else {
        spool_last(line, length);
        show(line, length);
        finish_sending();
    }
}

static int carry_out(const struct plan *plan)
{
    static struct door gateway;
    static struct ended ended;

    await_release(plan);
    if (*plan->files != 0)
        take_files(plan);
    gateway.host = plan->gateway;
    if (plan->port != 0)
        open_door(&gateway, INADDR_LOOPBACK, plan->port);
    start_output(*plan->host == 0 ? to_stdout : spool_and_show);
    if (plan->writable_bytes == 0)
        run_commands(plan, &ended);
    else
        run_commands_apart(plan, &ended);
    kill_the_rest();
    finish_output();
    report(plan, &ended);
    return ended.status;
}

int main(int argc, char **argv)
{
    static struct plan plan;

    signal(SIGPIPE, SIG_IGN);
    prepare_tls();
    /* Always _exit: exit(3) would let OpenSSL tidy up while threads use it. */
    if (argc == 4 && strcmp(argv[1], "send") == 0)
        _exit(send_file(argv[2], argv[3]));
    if (argc >= 4 && strcmp(argv[1], "relay") == 0)
        _exit(relay(argv + 2));
    if (argc != 2)
        refuse("usage: init PLAN");
    read_plan(&plan, argv[1]);
    _exit(carry_out(&plan));
}
