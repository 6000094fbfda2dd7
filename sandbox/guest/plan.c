/* The plan: NUL-terminated strings, counts before what they count (sandbox/plan.py). */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PLAN_BYTES = 1 << 20, NONCE_BYTES = 128 };

static char *next, *end;

static char *next_string(void)
{
    char *string = next;
    char *nul = memchr(string, 0, (size_t)(end - string));
    if (nul == NULL)
        refuse("plan is cut short");
    next = nul + 1;
    return string;
}

static long long next_number(long long least, long long most)
{
    char *rest, *string = next_string();
    errno = 0;
    long long number = strtoll(string, &rest, 10);
    if (*string == 0 || *rest != 0 || errno != 0 || number < least || number > most)
        refuse("plan has a bad number");
    return number;
}

static const char *next_way(void)
{
    const char *way = next_string();
    if (strlen(way) >= WAY_BYTES)
        refuse("plan has a way that is too long");
    return way;
}

static void load(const char *path)
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
    next = buffer;
    end = buffer + length;
}

static char **next_command(void)
{
    long words = (long)next_number(1, 4096);
    char **command = calloc((size_t)words + 1, sizeof(char *));
    if (command == NULL)
        die("memory");
    for (long word = 0; word < words; word++)
        command[word] = next_string();
    return command;
}

void read_plan(struct plan *plan, const char *path)
{
    load(path);
    next_number(2, 2); /* its version */
    plan->nonce = next_string();
    if (strlen(plan->nonce) > NONCE_BYTES)
        refuse("plan has a nonce that is too long");
    plan->host = next_way();
    plan->port = (long)next_number(0, 65535);
    plan->gateway = next_way();
    plan->files = next_way();
    plan->claim = next_string();
    plan->seconds = (unsigned)next_number(1, 1 << 30);
    plan->patience = (unsigned)next_number(1, 1 << 30);
    plan->log_bytes = next_number(0, 1LL << 50);
    plan->writable_bytes = next_number(0, 1LL << 50);
    plan->writable_count = (long)next_number(0, WRITABLE);
    for (long i = 0; i < plan->writable_count; i++)
        plan->writable[i] = next_string();
    plan->probe_count = (long)next_number(0, PROBES);
    for (long i = 0; i < plan->probe_count; i++)
        plan->probes[i] = next_string();
    plan->command_count = (long)next_number(1, COMMANDS);
    for (long i = 0; i < plan->command_count; i++)
        plan->commands[i] = next_command();
}
