/*
 * A way through the one TCP port of the host: TLS 1.3 to a certificate that we know,
 * one line that says whose we are and whom we want, and then bytes both ways.
 *
 * Everybody else in here sees a plain descriptor, one end of a socket pair. For each
 * connection there is a thread that carries bytes between its other end and TLS. TLS itself
 * has no descriptor: OpenSSL would make a system call for each record of 16 KiB, so it writes
 * to and reads from a ring in memory (a BIO pair), and we move what is there at once.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    KEY_BYTES = 128,
    CONNECT_SECONDS = 10,   /* for TCP, and as much again for the handshake */
    SILENCE_SECONDS = 60,   /* until a host that does not even acknowledge is gone */
    KEEPALIVE_SECONDS = 15,
};

static const char CERTIFICATE[] = RUNNER "/session/certificate.pem";
static const char KEY[] = RUNNER "/session/key";

static atomic_int broken_connections;

int tls_broke(void) { return broken_connections > 0; }

/* ---- what is trusted -------------------------------------------------------- */

/* No openssl.cnf, which would be the builder image's and may name code to be loaded; and
 * before anything else: OpenSSL reads it when it is first used for something. */
void prepare_tls(void)
{
    if (OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG, NULL) != 1)
        refuse("OpenSSL");
}

static SSL_CTX *make_context(void)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    if (context == NULL || SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1 ||
        SSL_CTX_load_verify_file(context, CERTIFICATE) != 1) {
        SSL_CTX_free(context);
        return NULL;
    }
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    /* What is in the file is trusted as it is, whoever signed it. */
    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(context), X509_V_FLAG_PARTIAL_CHAIN);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    /* The end of TCP is an end as good as TLS's own: what has to be whole has its own. */
    SSL_CTX_set_options(context, SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    return context;
}

static SSL_CTX *shared_context(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static SSL_CTX *context;
    pthread_mutex_lock(&lock);
    if (context == NULL)
        context = make_context();
    pthread_mutex_unlock(&lock);
    return context;
}

/* Whether the peer's certificate is one of the file: OpenSSL would take one, too, that was
 * signed with one of them. */
static int is_pinned(SSL *ssl)
{
    const X509 *peer = SSL_get0_peer_certificate(ssl);
    const STACK_OF(X509_OBJECT) *known =
        X509_STORE_get0_objects(SSL_CTX_get_cert_store(SSL_get_SSL_CTX(ssl)));
    for (int i = 0; peer != NULL && i < sk_X509_OBJECT_num(known); i++) {
        const X509 *one = X509_OBJECT_get0_X509(sk_X509_OBJECT_value(known, i));
        if (one != NULL && X509_cmp(one, peer) == 0)
            return 1;
    }
    return 0;
}

/* Makes the line that opens the door; its length, or -1. */
static int make_greeting(char *line, size_t size, const char *name)
{
    char key[KEY_BYTES + 2];
    int fd = open(KEY, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, key, sizeof key);
    close(fd);
    if (length > 0 && key[length - 1] == '\n')
        length--;
    errno = EKEYREJECTED;
    if (length < 1 || length > KEY_BYTES)
        return -1;
    key[length] = 0;
    if (strspn(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") !=
        (size_t)length)
        return -1;
    return snprintf(line, size, "runner-door 1 %s %s\n", key, name);
}

/* ---- one connection ---------------------------------------------------------- */

struct buffer {
    char *bytes;
    size_t start, end;
};

struct pump {
    SSL *ssl;
    BIO *wire;             /* our end of the rings: what TLS has for TCP, and takes of it */
    int tcp, inside;
    struct buffer out, in; /* not yet encrypted; not yet taken inside */
    int inside_ended;      /* nothing more comes from there */
    int inside_gone;       /* and nobody reads there */
    int said_end;          /* to the peer */
    int tcp_ended, peer_ended, told_inside;
    int broken;
};

static int is_empty(const struct buffer *buffer) { return buffer->start == buffer->end; }

static int connect_tcp(const struct sockaddr_in *place)
{
    int on = 1, idle = KEEPALIVE_SECONDS, silence = SILENCE_SECONDS * 1000, error = 0;
    socklen_t size = sizeof error;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct pollfd it = {.fd = fd, .events = POLLOUT};
    if (fd < 0)
        return -1;
    /* A host that vanished sends nothing that would tell us. */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &silence, sizeof silence);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (const struct sockaddr *)place, sizeof *place) == 0)
        return fd;
    if (errno == EINPROGRESS && poll(&it, 1, CONNECT_SECONDS * 1000) == 0)
        error = ETIMEDOUT;
    else if (errno != EINPROGRESS || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
        error = errno;
    if (error == 0)
        return fd;
    close(fd);
    errno = error;
    return -1;
}

/* Takes from TCP what there is, as far as there is room. */
static void receive(struct pump *pump)
{
    char *room;
    int size = pump->tcp_ended ? 0 : BIO_nwrite0(pump->wire, &room);
    if (size <= 0)
        return;
    ssize_t n = recv(pump->tcp, room, (size_t)size, MSG_DONTWAIT);
    if (n > 0) {
        BIO_nwrite(pump->wire, &room, (int)n);
    } else if (n == 0) {
        pump->tcp_ended = 1;
        BIO_shutdown_wr(pump->wire);
    } else if (errno != EAGAIN && errno != EINTR) {
        pump->broken = 1;
    }
}

/* Gives TCP what it takes; how many bytes that was. */
static size_t transmit(struct pump *pump)
{
    size_t sent = 0;
    char *ready;
    int size;
    while ((size = BIO_nread0(pump->wire, &ready)) > 0) {
        ssize_t n = send(pump->tcp, ready, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            pump->broken = errno != EAGAIN && errno != EINTR;
            break;
        }
        BIO_nread(pump->wire, &ready, (int)n);
        sent += (size_t)n;
    }
    return sent;
}

static int shake_hands(struct pump *pump)
{
    double end = now() + CONNECT_SECONDS;
    int result, left;
    errno = EPROTO;
    while ((result = SSL_connect(pump->ssl)) != 1) {
        int wanted = SSL_get_error(pump->ssl, result);
        transmit(pump); /* an alert too: the peer should know */
        if (wanted != SSL_ERROR_WANT_READ && wanted != SSL_ERROR_WANT_WRITE) {
            errno = SSL_get_verify_result(pump->ssl) == X509_V_OK ? EPROTO : EKEYREJECTED;
            return -1;
        }
        struct pollfd it = {.fd = pump->tcp, .events = POLLIN};
        if ((left = (int)((end - now()) * 1000)) <= 0 || poll(&it, 1, left) == 0) {
            errno = ETIMEDOUT;
            return -1;
        }
        receive(pump);
        if (pump->broken || pump->tcp_ended) {
            errno = ECONNRESET;
            return -1;
        }
    }
    errno = EKEYREJECTED;
    return is_pinned(pump->ssl) ? 0 : -1;
}

/* Decrypts what came, and gives it to the inside, until one of both has no more. */
static void move_inwards(struct pump *pump)
{
    struct buffer *in = &pump->in;
    size_t n;
    ERR_clear_error();
    while (!pump->inside_gone && !pump->broken) {
        if (is_empty(in)) {
            in->start = in->end = 0;
            while (in->end < BUFFER_BYTES &&
                   SSL_read_ex(pump->ssl, in->bytes + in->end, BUFFER_BYTES - in->end, &n) == 1)
                in->end += n;
        }
        if (is_empty(in)) {
            int why = SSL_get_error(pump->ssl, 0);
            pump->peer_ended = why == SSL_ERROR_ZERO_RETURN;
            pump->broken = why != SSL_ERROR_ZERO_RETURN && why != SSL_ERROR_WANT_READ &&
                           why != SSL_ERROR_WANT_WRITE;
            break;
        }
        ssize_t sent = send(pump->inside, in->bytes + in->start, in->end - in->start,
                            MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            pump->inside_gone = errno != EAGAIN && errno != EINTR;
            break;
        }
        in->start += (size_t)sent;
    }
    if (pump->peer_ended && is_empty(in) && !pump->told_inside) {
        shutdown(pump->inside, SHUT_WR);
        pump->told_inside = 1;
    }
}

static void take_from_inside(struct pump *pump)
{
    struct buffer *out = &pump->out;
    ssize_t n = recv(pump->inside, out->bytes, BUFFER_BYTES, MSG_DONTWAIT);
    out->start = 0;
    out->end = n > 0 ? (size_t)n : 0;
    pump->inside_ended = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}

/* Encrypts what came from the inside, and gives it to TCP, until one of both takes no more. */
static void move_outwards(struct pump *pump)
{
    struct buffer *out = &pump->out;
    size_t n;
    ERR_clear_error();
    do {
        while (!is_empty(out) &&
               SSL_write_ex(pump->ssl, out->bytes + out->start, out->end - out->start, &n) == 1)
            out->start += n;
        if (!is_empty(out)) {
            int why = SSL_get_error(pump->ssl, 0);
            pump->broken |= why != SSL_ERROR_WANT_WRITE && why != SSL_ERROR_WANT_READ;
        } else if (pump->inside_ended && !pump->said_end) {
            pump->said_end = SSL_shutdown(pump->ssl) >= 0;
        }
    } while (transmit(pump) > 0 && !is_empty(out) && !pump->broken);
}

static int is_over(struct pump *pump)
{
    return pump->broken || (pump->said_end && BIO_ctrl_pending(pump->wire) == 0 &&
                            (pump->told_inside || pump->inside_gone));
}

/* Where nothing is wanted of a descriptor, poll(2) tells all the same, and again and again,
 * that its other end is gone: who is known to be is not asked any more. */
static void await_either(const struct pump *pump, short *tcp, short *inside)
{
    int room = !pump->tcp_ended && BIO_ctrl_get_write_guarantee(pump->wire) > 0;
    int pending = BIO_ctrl_pending(pump->wire) > 0;
    int reads = !pump->inside_ended && is_empty(&pump->out);
    int writes = !is_empty(&pump->in) && !pump->inside_gone;
    struct pollfd it[2] = {
        {pump->tcp, (short)((room ? POLLIN : 0) | (pending ? POLLOUT : 0)), 0},
        {pump->inside, (short)((reads ? POLLIN : 0) | (writes ? POLLOUT : 0)), 0},
    };
    if (it[0].events == 0)
        it[0].fd = -1;
    if (it[1].events == 0 && pump->inside_gone)
        it[1].fd = -1;
    if (poll(it, 2, -1) < 0)
        it[0].revents = it[1].revents = 0;
    *tcp = it[0].revents;
    *inside = it[1].revents;
}

static void end_pump(struct pump *pump)
{
    SSL_free(pump->ssl); /* and its end of the rings */
    BIO_free(pump->wire);
    free(pump->out.bytes);
    free(pump->in.bytes);
    if (pump->tcp >= 0)
        close(pump->tcp);
    if (pump->inside >= 0)
        close(pump->inside);
    free(pump);
}

static void *carry(void *argument)
{
    struct pump *pump = argument;
    short tcp, inside;

    for (;;) {
        move_outwards(pump);
        move_inwards(pump);
        if (is_over(pump))
            break;
        await_either(pump, &tcp, &inside);
        if (tcp & ~POLLOUT)
            receive(pump);
        if (inside & POLLHUP)
            pump->inside_gone = 1;
        if (inside & ~POLLOUT && is_empty(&pump->out) && !pump->inside_ended)
            take_from_inside(pump);
    }
    broken_connections += pump->broken; /* before anybody inside can see the end */
    end_pump(pump);
    return NULL;
}

/* A pump without connection; NULL where there is no memory, or nothing to trust. */
static struct pump *make_pump(void)
{
    BIO *internal;
    SSL_CTX *context = shared_context();
    struct pump *pump = context == NULL ? NULL : calloc(1, sizeof *pump);
    if (pump == NULL)
        return NULL;
    pump->tcp = pump->inside = -1;
    pump->out.bytes = malloc(BUFFER_BYTES);
    pump->in.bytes = malloc(BUFFER_BYTES);
    pump->ssl = SSL_new(context);
    if (pump->out.bytes == NULL || pump->in.bytes == NULL || pump->ssl == NULL ||
        BIO_new_bio_pair(&internal, BUFFER_BYTES, &pump->wire, BUFFER_BYTES) != 1) {
        end_pump(pump);
        return NULL;
    }
    SSL_set_bio(pump->ssl, internal, internal);
    return pump;
}

/* Gives the descriptor for the others, the pump keeps the other end; -1 without. */
static int start_pump(struct pump *pump)
{
    static const int ROOM = BUFFER_BYTES;
    int pair[2];
    pthread_t thread;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
        return -1;
    for (int i = 0; i < 2; i++)
        setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &ROOM, sizeof ROOM);
    pump->inside = pair[1];
    if (pthread_create(&thread, NULL, carry, pump) != 0) {
        close(pair[0]);
        return -1;
    }
    pthread_detach(thread);
    return pair[0];
}

int connect_tls(const struct sockaddr_in *place, const char *name)
{
    char greeting[KEY_BYTES + 64];
    size_t sent;
    int fd = -1, length = make_greeting(greeting, sizeof greeting, name);
    if (length < 0)
        return -1;
    ERR_clear_error();
    errno = EKEYREJECTED;
    struct pump *pump = make_pump();
    if (pump == NULL)
        return -1;
    if ((pump->tcp = connect_tcp(place)) >= 0 && shake_hands(pump) == 0 &&
        SSL_write_ex(pump->ssl, greeting, (size_t)length, &sent) == 1)
        fd = start_pump(pump);
    if (fd < 0) {
        int error = errno;
        end_pump(pump);
        errno = error;
    }
    return fd;
}
