/*
 * What OpenSSL could call and never has to: nobody in here resolves a name, every address is
 * in the plan in digits; and nothing is loaded into a process that runs before anything of the
 * builder image is trusted. glibc's own would do both with shared libraries of that image, and
 * the linker warns of it. With these in their place (-Wl,--wrap, hatch_build.py) there is
 * nothing to warn of, so that a warning can be an error.
 */
#include <netdb.h>
#include <stddef.h>

void *__wrap_dlopen(const char *file, int mode);
int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                       struct addrinfo **found);
struct hostent *__wrap_gethostbyname(const char *name);

void *__wrap_dlopen(const char *file, int mode)
{
    (void)file, (void)mode;
    return NULL;
}

int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                       struct addrinfo **found)
{
    (void)node, (void)service, (void)hints, (void)found;
    return EAI_FAIL;
}

struct hostent *__wrap_gethostbyname(const char *name)
{
    (void)name;
    return NULL;
}
