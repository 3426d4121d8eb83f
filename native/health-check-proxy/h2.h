/* An HTTP/2 session of nghttp2 over a stream, and what a gRPC call is made of. */
#ifndef PROXY_H2_H
#define PROXY_H2_H

#include <nghttp2/nghttp2.h>
#include <stddef.h>
#include <stdint.h>

#include "stream.h"

struct h2 {
	nghttp2_session *session;
	const uint8_t *out; /* of nghttp2's, not yet written */
	size_t out_length;
	size_t received;
};

/* Reads and writes what can be. 1 when neither side wants anything more, 0 at the other side's end, BLOCKED or
 * FAILED. */
int h2_step(struct h2 *h2, struct stream *stream);
/* The same with bytes that were read before there was a session. */
int h2_receive(struct h2 *h2, const void *bytes, size_t length);
void h2_free(struct h2 *h2);

/* Header fields in a bounded piece of memory. */
enum { FIELDS_MAX = 32, FIELDS_ROOM = 8192 };

struct fields {
	size_t number, used;
	nghttp2_nv nv[FIELDS_MAX];
	uint8_t bytes[FIELDS_ROOM];
};

/* 0 if there is no more room. */
int fields_add(struct fields *fields, const void *name, size_t name_length, const void *value,
	       size_t value_length);

/* A literal or otherwise lasting field for nghttp2. */
nghttp2_nv h2_field(const char *name, const char *value);

#endif
