/* Commands as root of a user and a mount namespace of their own, for sandboxes that
 * may have next to no capability. Kubernetes' Pod Security level "baseline" allows
 * SETUID, SETGID and SETFCAP: with these the namespace gets every id as it is, and in
 * it the commands have every capability. The conversation stays outside, with us. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define EVERY_ID "0 0 4294967295"

static void put(pid_t process, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)process, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, EVERY_ID, strlen(EVERY_ID)) != (ssize_t)strlen(EVERY_ID))
        die(name);
    close(fd);
}

/* Of memory and bounded. Not of the pod's volumes: an overlay on those lost whiteouts
 * and capabilities of files (gVisor, August 2026). */
static void mount_writable(const struct plan *plan)
{
    char options[64], kept[64];
    int fd = open(RUNNER, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        die(RUNNER);
    snprintf(kept, sizeof kept, "/proc/self/fd/%d", fd);
    snprintf(options, sizeof options, "size=%lld,mode=0755", plan->writable_bytes);
    for (long i = 0; i < plan->writable_count; i++) {
        const char *path = plan->writable[i];
        if (mount("none", path, "tmpfs", 0, options) != 0)
            die(path);
        if (strlen(path) >= 4 && strcmp(path + strlen(path) - 4, "/tmp") == 0)
            chmod(path, 01777);
    }
    /* Back again where /run was mounted over it, with all that is mounted below: without
     * that, nothing in a user namespace may be. */
    if ((mkdir(RUNNER, 0755) != 0 && errno != EEXIST) ||
        mount(kept, RUNNER, NULL, MS_BIND | MS_REC, NULL) != 0)
        die(RUNNER);
    close(fd);
}

static void enter(const struct plan *plan, int told, int answer)
{
    char byte = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0)
        die("a user namespace");
    /* The map is written from outside: in here nobody may, before it is there. */
    if (write(told, &byte, 1) != 1 || read(answer, &byte, 1) != 1)
        _exit(FAILED);
    if (setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0 || setgroups(0, NULL) != 0)
        die("root of the namespace");
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        die("a mount namespace");
    mount_writable(plan);
}

static int exactly(int fd, void *into, size_t length)
{
    for (char *at = into; length > 0;) {
        ssize_t n = read(fd, at, length);
        if (n == 0 || (n < 0 && errno != EINTR))
            return -1;
        at += n > 0 ? n : 0;
        length -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* As run_commands, in namespaces of their own. */
void run_commands_apart(const struct plan *plan, struct ended *ended)
{
    int told[2], answer[2];
    char byte = 0;
    if (pipe2(told, O_CLOEXEC) != 0 || pipe2(answer, O_CLOEXEC) != 0)
        die("pipe");
    pid_t apart = fork();
    if (apart < 0)
        die("fork");
    if (apart == 0) {
        close(told[0]);
        close(answer[1]);
        show_errors();
        enter(plan, told[1], answer[0]);
        run_commands(plan, ended);
        _exit(write(told[1], ended, sizeof *ended) == (ssize_t)sizeof *ended ? 0 : FAILED);
    }
    close(told[1]);
    close(answer[0]);
    *ended = (struct ended){.status = FAILED};
    if (exactly(told[0], &byte, 1) == 0) {
        put(apart, "uid_map");
        put(apart, "gid_map");
        /* Whatever ends it in between has said why, as the commands say it. */
        if (write(answer[1], &byte, 1) != 1 || exactly(told[0], ended, sizeof *ended) != 0)
            *ended = (struct ended){.status = FAILED};
    }
    close(told[0]);
    close(answer[1]);
}
