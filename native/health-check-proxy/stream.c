/* One interface to a connection's bytes, whether they are in TLS or not.
 *
 * Called by probe.c, http1.c and grpc.c for the client's side, and with upstream.c for the app's.
 */
#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tls.h"

/* What a refused TLS operation is about: 0 at the other side's end, BLOCKED or FAILED. */
static int tls_result(struct stream *stream, int result)
{
	int error = SSL_get_error(stream->tls, result);

	ERR_clear_error();
	switch (error) {
	case SSL_ERROR_WANT_READ:
		stream->wants |= EPOLLIN;
		return BLOCKED;
	case SSL_ERROR_WANT_WRITE:
		stream->wants |= EPOLLOUT;
		return BLOCKED;
	case SSL_ERROR_ZERO_RETURN:
		return 0;
	default:
		return FAILED;
	}
}

static int plain_result(struct stream *stream, uint32_t event)
{
	if (errno != EAGAIN && errno != EINTR)
		return FAILED;
	stream->wants |= event;
	return BLOCKED;
}

ssize_t stream_read(struct stream *stream, void *bytes, size_t size)
{
	ssize_t length;

	if (stream->tls) {
		length = SSL_read(stream->tls, bytes, (int)size);
		return length > 0 ? length : tls_result(stream, (int)length);
	}
	length = recv(stream->fd, bytes, size, 0);
	return length >= 0 ? length : plain_result(stream, EPOLLIN);
}

ssize_t stream_peek(struct stream *stream, char *byte)
{
	ssize_t length = recv(stream->fd, byte, 1, MSG_PEEK);

	return length >= 0 ? length : plain_result(stream, EPOLLIN);
}

ssize_t stream_write(struct stream *stream, const void *bytes, size_t length)
{
	ssize_t written;

	if (stream->tls) {
		written = SSL_write(stream->tls, bytes, (int)length);
		if (written > 0)
			return written;
		written = tls_result(stream, (int)written);
		return written ? written : FAILED;
	}
	written = send(stream->fd, bytes, length, MSG_NOSIGNAL);
	return written >= 0 ? written : plain_result(stream, EPOLLOUT);
}

static int shake_hands(struct stream *stream, int result)
{
	if (result == 1)
		return 1;
	result = tls_result(stream, result);
	return result ? result : FAILED;
}

int stream_accept_tls(struct stream *stream)
{
	if (!stream->tls && !(stream->tls = tls_server(stream->fd)))
		return FAILED;
	return shake_hands(stream, SSL_accept(stream->tls));
}

int stream_connect_tls(struct stream *stream, const char *name, int http2)
{
	if (!stream->tls && !(stream->tls = tls_client(stream->fd, name, http2)))
		return FAILED;
	return shake_hands(stream, SSL_connect(stream->tls));
}

const char *stream_server_name(const struct stream *stream)
{
	const char *name = SSL_get_servername(stream->tls, TLSEXT_NAMETYPE_host_name);

	return name ? name : "";
}

void stream_finish(struct stream *stream)
{
	if (stream->tls && SSL_is_init_finished(stream->tls)) {
		SSL_shutdown(stream->tls);
		ERR_clear_error();
	}
	shutdown(stream->fd, SHUT_WR);
}

void stream_close(struct stream *stream, int reset)
{
	struct linger at_once = { .l_onoff = 1, .l_linger = 0 };

	if (stream->tls)
		SSL_free(stream->tls);
	if (stream->fd >= 0) {
		if (reset)
			setsockopt(stream->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
		close(stream->fd); /* which also ends epoll's watch */
	}
	*stream = (struct stream){ .fd = -1 };
}
