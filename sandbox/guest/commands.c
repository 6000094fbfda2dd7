/* The commands, what they write, and their end. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int output[2]; /* what we read of the commands, and where they write it */
static void (*take_output)(const char *bytes, size_t length);
static pthread_t drain;

static void *drain_output(void *unused)
{
    static char buffer[64 << 10];
    ssize_t n;
    (void)unused;
    while ((n = read(output[0], buffer, sizeof buffer)) > 0 || (n < 0 && errno == EINTR))
        take_output(buffer, n > 0 ? (size_t)n : 0);
    return NULL;
}

void start_output(void (*take)(const char *bytes, size_t length))
{
    take_output = take;
    if (pipe2(output, O_CLOEXEC) != 0 || pthread_create(&drain, NULL, drain_output, NULL) != 0)
        die("output");
}

void show_errors(void)
{
    if (dup2(output[1], STDERR_FILENO) < 0)
        die("output");
}

/* Comes back when all was taken: nobody is left then who writes. */
void finish_output(void)
{
    close(output[1]);
    pthread_join(drain, NULL);
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
        signal(SIGPIPE, SIG_DFL);
        setsid();
        execvp(argv[0], argv);
        dprintf(STDERR_FILENO, "runner: cannot start %s: %s\n", argv[0], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }
    /* Orphans become our children and are reaped here too. */
    while ((ended = wait(&status)) != pid)
        if (ended < 0 && errno != EINTR)
            die("wait");
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* One after the other: the first that fails is the last. */
void run_commands(const struct plan *plan, struct ended *ended)
{
    long index;
    *ended = (struct ended){0};
    for (index = 0; index < plan->command_count && ended->status == 0; index++)
        ended->status = run(plan->commands[index]);
    ended->command = index - 1;
    ended->claim_length = read_file(plan->claim, ended->claim, sizeof ended->claim);
}

/* Kills everything but us, also what is started meanwhile, and reaps it. */
void kill_the_rest(void)
{
    while (kill(-1, SIGKILL) == 0) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        usleep(1000);
    }
}
