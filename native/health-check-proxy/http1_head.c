/* Reads the heads of HTTP/1 messages and the framing of their bodies (RFC 9112).
 *
 * Why a parser of our own: Debian 12 has no library of this kind that is still kept up (http-parser was given up
 * by its makers, and Debian 13 has llhttp instead), and little is needed: a probe's proxy closes every
 * connection after one answer, so it has to find the end of a message, and no second one after it.
 *
 * Called by http1.c.
 */
#define _GNU_SOURCE
#include "http1_head.h"

#include <string.h>
#include <strings.h>

enum { METHOD_MAX = 32 };

static int is(struct span span, const char *name)
{
	return span.length == strlen(name) && !strncasecmp(span.at, name, span.length);
}

static struct span trimmed(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t'))
		at++;
	while (end > at && (end[-1] == ' ' || end[-1] == '\t'))
		end--;
	return (struct span){ at, end - at };
}

/* The next line, without its end. A lone LF ends one too (RFC 9112, 2.2). 0 if there is no whole line. */
static int next_line(const char **at, const char *end, struct span *line)
{
	const char *found = memchr(*at, '\n', end - *at);

	if (!found)
		return 0;
	*line = (struct span){ *at, found - *at };
	if (line->length && found[-1] == '\r')
		line->length--;
	*at = found + 1;
	return 1;
}

static int is_text(struct span line)
{
	for (size_t i = 0; i < line.length; i++) {
		unsigned char c = line.at[i];

		if ((c < ' ' && c != '\t') || c == 127)
			return 0;
	}
	return 1;
}

static int is_token(struct span span)
{
	static const char others[] = "!#$%&'*+-.^_`|~";

	for (size_t i = 0; i < span.length; i++) {
		unsigned char c = span.at[i], letter = c | 32;

		if (!(letter >= 'a' && letter <= 'z') && !(c >= '0' && c <= '9') && (!c || !strchr(others, c)))
			return 0;
	}
	return span.length > 0;
}

static int split_field(struct span line, struct span *name, struct span *value)
{
	const char *colon = memchr(line.at, ':', line.length);

	if (!colon)
		return 0;
	*name = (struct span){ line.at, colon - line.at };
	*value = trimmed(colon + 1, line.at + line.length);
	/* Neither a space before the colon nor a line that goes on with the one before: both are ways to make
	 * two readers see two messages. */
	return is_token(*name);
}

static int read_length(struct span value, uint64_t *length)
{
	*length = 0;
	for (size_t i = 0; i < value.length; i++) {
		if (value.at[i] < '0' || value.at[i] > '9' || i == 18)
			return 0;
		*length = *length * 10 + (value.at[i] - '0');
	}
	return value.length > 0;
}

struct framing_fields {
	int lengths, codings;
	uint64_t length;
};

static int read_field(struct head *head, struct span name, struct span value, struct framing_fields *framing)
{
	uint64_t length;

	if (is(name, "host")) {
		head->host = value;
	} else if (is(name, "expect")) {
		head->expects_continue = is(value, "100-continue");
	} else if (is(name, "transfer-encoding")) {
		/* Others than chunked, or more than one, nobody sends to or from a health check. */
		if (!is(value, "chunked") || framing->codings++)
			return 0;
	} else if (is(name, "content-length")) {
		if (!read_length(value, &length) || (framing->lengths++ && length != framing->length))
			return 0;
		framing->length = length;
	}
	return 1;
}

/* Fields and the empty line, from at on. As http1_read_request(). */
static int read_fields(const char *bytes, const char *at, const char *end, struct head *head,
		       struct framing_fields *framing)
{
	struct span line, name, value;

	head->fields.at = at;
	for (;;) {
		const char *start = at;

		if (!next_line(&at, end, &line))
			return 0;
		if (!line.length) {
			head->fields.length = start - head->fields.at;
			head->length = at - bytes;
			return framing->lengths && framing->codings ? -1 : 1;
		}
		if (!is_text(line) || !split_field(line, &name, &value) ||
		    !read_field(head, name, value, framing))
			return -1;
	}
}

/* The first line's three words; the last may hold spaces, and may be missing. */
static int split_first(struct span line, struct span words[3])
{
	const char *at = line.at, *end = line.at + line.length;

	if (!is_text(line))
		return 0;
	for (int i = 0; i < 3; i++) {
		const char *space = i < 2 ? memchr(at, ' ', end - at) : NULL;

		if (!space)
			space = end;
		words[i] = (struct span){ at, space - at };
		at = space < end ? space + 1 : end;
	}
	return words[0].length && words[1].length;
}

static int is_http1(struct span version)
{
	return version.length == 8 && !memcmp(version.at, "HTTP/1.", 7) && version.at[7] >= '0' &&
	       version.at[7] <= '9';
}

int http1_read_request(const char *bytes, size_t length, struct head *head)
{
	struct framing_fields framing = { 0 };
	const char *at = bytes;
	struct span line;
	int result;

	*head = (struct head){ 0 };
	if (!next_line(&at, bytes + length, &line))
		return 0;
	if (!split_first(line, head->first) || !is_token(head->first[0]) ||
	    head->first[0].length > METHOD_MAX || !is_http1(head->first[2]))
		return -1;
	result = read_fields(bytes, at, bytes + length, head, &framing);
	head->framing = framing.codings ? CHUNKED : framing.length ? BY_LENGTH : NO_BODY;
	head->body_length = framing.length;
	return result;
}

int http1_read_answer(const char *bytes, size_t length, int to_head, struct head *head)
{
	struct framing_fields framing = { 0 };
	const char *at = bytes;
	struct span line;
	uint64_t status;
	int result;

	*head = (struct head){ .answers_head = to_head };
	if (!next_line(&at, bytes + length, &line))
		return 0;
	if (!split_first(line, head->first) || !is_http1(head->first[0]) || head->first[1].length != 3 ||
	    !read_length(head->first[1], &status) || status < 100)
		return -1;
	head->status = (int)status;
	result = read_fields(bytes, at, bytes + length, head, &framing);
	if (to_head || status < 200 || status == 204 || status == 304)
		head->framing = NO_BODY;
	else if (framing.codings)
		head->framing = CHUNKED;
	else
		head->framing = framing.lengths ? BY_LENGTH : UNTIL_CLOSED;
	head->body_length = framing.length;
	return result;
}

/* What belongs to one connection, or is told anew (RFC 9110, 7.6.1). */
static int stays(const struct head *head, struct span name)
{
	static const char *const hops[] = { "connection", "keep-alive", "proxy-connection", "upgrade",
					    "http2-settings", "expect", "te", "trailer" };

	for (size_t i = 0; i < sizeof hops / sizeof *hops; i++)
		if (is(name, hops[i]))
			return 0;
	if (!head->status || head->answers_head)
		return 1;
	return !is(name, "content-length") && !is(name, "transfer-encoding");
}

size_t http1_copy_fields(const struct head *head, char *to, size_t size)
{
	const char *at = head->fields.at, *end = at + head->fields.length;
	struct span line, name, value;
	size_t used = 0;

	while (next_line(&at, end, &line)) {
		if (!split_field(line, &name, &value) || !stays(head, name))
			continue;
		if (line.length + 2 > size - used)
			return size + 1;
		memcpy(to + used, line.at, line.length);
		memcpy(to + used + line.length, "\r\n", 2);
		used += line.length + 2;
	}
	return used;
}

static int hexadecimal(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 32;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static void size_byte(struct chunks *chunks, char c)
{
	int digit = hexadecimal(c);

	if (digit >= 0 && chunks->digits < 15) {
		chunks->left = chunks->left << 4 | (unsigned)digit;
		chunks->digits++;
	} else if (!chunks->digits || digit >= 0) {
		chunks->state = CHUNKS_BAD;
	} else if (c == '\n') {
		chunks->state = chunks->left ? DATA : TRAILER;
	} else {
		chunks->state = EXTENSION;
	}
}

static void framing_byte(struct chunks *chunks, char c)
{
	switch (chunks->state) {
	case SIZE:
		size_byte(chunks, c);
		break;
	case EXTENSION:
		if (c == '\n')
			chunks->state = chunks->left ? DATA : TRAILER;
		break;
	case DATA_END:
		if (c == '\n')
			*chunks = (struct chunks){ .state = SIZE };
		else if (c != '\r')
			chunks->state = CHUNKS_BAD;
		break;
	case TRAILER:
		if (c == '\n')
			chunks->state = CHUNKS_END;
		else if (c != '\r')
			chunks->state = TRAILER_LINE;
		break;
	case TRAILER_LINE:
		if (c == '\n')
			chunks->state = TRAILER;
		break;
	default:
		break;
	}
}

size_t http1_chunk(struct chunks *chunks, const char *bytes, size_t length, struct span *run)
{
	size_t used = 0;

	*run = (struct span){ bytes, 0 };
	while (used < length && chunks->state != DATA && chunks->state < CHUNKS_END)
		framing_byte(chunks, bytes[used++]);
	if (used < length && chunks->state == DATA) {
		*run = (struct span){ bytes + used, length - used };
		if (run->length >= chunks->left) {
			run->length = chunks->left;
			chunks->state = DATA_END;
		}
		chunks->left -= run->length;
		used += run->length;
	}
	return used;
}
