/* The pump between nghttp2, which knows no sockets, and a stream.
 *
 * Called by grpc.c for the client's side and by grpc_app.c for the app's.
 */
#include "h2.h"

#include <string.h>

#include "bounds.h"

enum { READ_SIZE = 4096 };

static int write_all(struct h2 *h2, struct stream *stream)
{
	for (;;) {
		ssize_t written;

		if (!h2->out_length) {
			ssize_t length = nghttp2_session_mem_send(h2->session, &h2->out);

			if (length <= 0)
				return length ? FAILED : 1;
			h2->out_length = length;
		}
		written = stream_write(stream, h2->out, h2->out_length);
		if (written < 0)
			return (int)written;
		h2->out += written;
		h2->out_length -= written;
	}
}

int h2_receive(struct h2 *h2, const void *bytes, size_t length)
{
	h2->received += length;
	if (h2->received > REQUEST_MAX)
		return FAILED; /* no health check is that long */
	return nghttp2_session_mem_recv(h2->session, bytes, length) < 0 ? FAILED : 1;
}

int h2_step(struct h2 *h2, struct stream *stream)
{
	uint8_t bytes[READ_SIZE];
	ssize_t length;
	int result;

	for (;;) {
		result = write_all(h2, stream);
		if (result == FAILED)
			return FAILED;
		if (!nghttp2_session_want_read(h2->session) && !nghttp2_session_want_write(h2->session))
			return 1;
		if (result == BLOCKED)
			/* Before it reads its answers the other side is asked for nothing more: its
			 * questions would pile up here. */
			return BLOCKED;
		length = stream_read(stream, bytes, sizeof bytes);
		if (length <= 0)
			return (int)length;
		if (h2_receive(h2, bytes, length) == FAILED) {
			write_all(h2, stream); /* the GOAWAY that says why */
			return FAILED;
		}
	}
}

void h2_free(struct h2 *h2)
{
	nghttp2_session_del(h2->session);
	*h2 = (struct h2){ 0 };
}

int fields_add(struct fields *fields, const void *name, size_t name_length, const void *value,
	       size_t value_length)
{
	uint8_t *at = fields->bytes + fields->used;

	if (fields->number == FIELDS_MAX || name_length + value_length > FIELDS_ROOM - fields->used)
		return 0;
	memcpy(at, name, name_length);
	memcpy(at + name_length, value, value_length);
	fields->used += name_length + value_length;
	fields->nv[fields->number++] = (nghttp2_nv){
		.name = at,
		.namelen = name_length,
		.value = at + name_length,
		.valuelen = value_length,
		.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE,
	};
	return 1;
}

nghttp2_nv h2_field(const char *name, const char *value)
{
	return (nghttp2_nv){
		.name = (uint8_t *)name,
		.namelen = strlen(name),
		.value = (uint8_t *)value,
		.valuelen = strlen(value),
	};
}
