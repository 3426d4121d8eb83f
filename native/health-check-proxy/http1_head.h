/* HTTP/1 messages: what a probe's proxy has to know of them. Pure: bytes in, facts out. */
#ifndef PROXY_HTTP1_HEAD_H
#define PROXY_HTTP1_HEAD_H

#include <stddef.h>
#include <stdint.h>

struct span {
	const char *at;
	size_t length;
};

enum framing { NO_BODY, BY_LENGTH, CHUNKED, UNTIL_CLOSED };

struct head {
	struct span first[3];   /* method, target, version; or version, status, reason */
	struct span host;       /* empty without the field */
	struct span fields;     /* all fields' lines */
	size_t length;          /* of the head, with the empty line after it */
	enum framing framing;
	uint64_t body_length;   /* BY_LENGTH */
	int status;             /* of an answer */
	int expects_continue;   /* a request that wants to be told to go on */
	int answers_head;       /* an answer to HEAD: the length it tells is not its own body's */
};

/* Both: 1 if the bytes hold a whole head, 0 if there has to be more, -1 if they are no HTTP/1 message. */
int http1_read_request(const char *bytes, size_t length, struct head *head);
int http1_read_answer(const char *bytes, size_t length, int to_head, struct head *head);

/* Which fields stay when a message is passed on (a request) or kept (an answer). Writes their lines, each
 * ending in CRLF; returns their length, or size + 1 if they do not fit. */
size_t http1_copy_fields(const struct head *head, char *to, size_t size);

/* The place in a body of CHUNKED framing, RFC 9112, 7.1. */
struct chunks {
	enum { SIZE, EXTENSION, DATA, DATA_END, TRAILER, TRAILER_LINE, CHUNKS_END, CHUNKS_BAD } state;
	unsigned digits;
	uint64_t left;
};

/* Next run of body bytes: returns how many bytes of the framing and of the run were used up, and where the
 * run is, if there is one. */
size_t http1_chunk(struct chunks *chunks, const char *bytes, size_t length, struct span *run);

#endif
