/* A connection's bytes, plain or in TLS; nothing here ever waits. */
#ifndef PROXY_STREAM_H
#define PROXY_STREAM_H

#include <openssl/types.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct stream {
	int fd; /* -1: none */
	SSL *tls;
	uint32_t wants;   /* EPOLLIN, EPOLLOUT: what an operation is blocked on */
	uint32_t watched; /* what epoll watches it for */
};

/* In the place of a length. */
enum { BLOCKED = -1, FAILED = -2 };

/* Bytes read, 0 at the end, BLOCKED or FAILED. */
ssize_t stream_read(struct stream *stream, void *bytes, size_t size);
/* The same of the first byte of one that is not in TLS, which stays to be read. */
ssize_t stream_peek(struct stream *stream, char *byte);
/* Bytes written (some), BLOCKED or FAILED. */
ssize_t stream_write(struct stream *stream, const void *bytes, size_t length);
/* Makes a TLS connection of it: 1 when done, BLOCKED or FAILED. A second call goes on with it. */
int stream_accept_tls(struct stream *stream);
/* The same towards a server; name is for SNI, empty for none. */
int stream_connect_tls(struct stream *stream, const char *name, int http2);
/* What a client named in its ClientHello; empty if nothing. */
const char *stream_server_name(const struct stream *stream);
/* Says that nothing more comes; what the other side still sends can be read. */
void stream_finish(struct stream *stream);
/* Closes it, with a reset if it is to look like nobody had accepted it. */
void stream_close(struct stream *stream, int reset);

#endif
