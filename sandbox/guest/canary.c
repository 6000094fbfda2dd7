/* The canary: what this kernel shows of itself, before anything untrusted is here. */
#include "init.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/utsname.h>
#include <unistd.h>

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

/* reached: of the probes, one per line. */
void add_canary(const char *nonce, const char *reached)
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
    add_text("reached", reached);
}
