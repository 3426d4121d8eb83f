/* Passes one HTTP/1 request on to the app and its answer back, or answers from memory.
 *
 * The request is read whole, then sent with its headers but with `Connection: close`. An answer with up to
 * BODY_KEPT bytes of body is passed on when it is whole, so that until then the memory can still take the place
 * of an app that is put to sleep in the middle; a longer one is passed on as it comes.
 *
 * Called by probe.c.
 */
#define _GNU_SOURCE
#include "http1.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "answers.h"
#include "bounds.h"
#include "http1_head.h"
#include "probe.h"
#include "say.h"

enum { REQUEST_FIRST = 2048, ANSWER_ROOM = HEAD_MAX + BODY_KEPT + 4096, REPLY_ROOM = 256 };

/* At one go, before other connections have their turn. */
enum { STEPS = 64 };

static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";

struct http1 {
	struct probe *probe;
	enum { READING, WAITING, SENDING, AWAITING, PASSING, REPLYING } phase;
	/* The request, as it came, then as it is sent. */
	char *request;
	size_t request_length, request_room, request_sent;
	struct head asked;
	int head_read, to_head;
	struct question question;
	/* The app's answer: bytes that have come and are not passed on yet. */
	char *answer;
	size_t answer_length, answer_seen, answer_passed;
	struct head told;
	int told_read, whole;
	uint64_t body_left;
	struct chunks chunks;
	/* What is kept of it. */
	char *kept_head, kept_body[BODY_KEPT];
	size_t kept_head_length, kept_length;
	/* The proxy's own reply. */
	char *reply;
	size_t reply_length, reply_sent;
};

struct http1 *http1_new(struct probe *probe)
{
	struct http1 *http1 = allocate(NULL, sizeof *http1);
	char first[4];

	memset(http1, 0, sizeof *http1);
	http1->probe = probe;
	http1->request_room = REQUEST_FIRST;
	http1->request = allocate(NULL, http1->request_room);
	http1->request_length = probe_take_first(probe, first);
	memcpy(http1->request, first, http1->request_length);
	return http1;
}

void http1_free(struct http1 *http1)
{
	free(http1->request);
	free(http1->answer);
	free(http1->kept_head);
	free(http1->reply);
	free(http1);
}

static void keep(struct http1 *http1)
{
	/* As the kubelet judges: 200 to 399. */
	int good = http1->kept_head[9] == '2' || http1->kept_head[9] == '3';

	mapping_answered(http1->probe->mapping, &http1->question, good, http1->kept_head,
			 http1->kept_head_length, http1->kept_body, http1->kept_length);
}

/* ---- the proxy's own replies -------------------------------------------------------------------- */

/* head: status line and fields, each with its CRLF. */
static int reply(struct http1 *http1, const void *head, size_t head_length, const void *body,
		 size_t body_length, int of_memory)
{
	char more[REPLY_ROOM];
	int length, no_body = http1->to_head;

	if (head_length > 12) {
		const char *status = (const char *)head + 9;

		no_body |= !memcmp(status, "204", 3) || !memcmp(status, "304", 3);
	}
	length = snprintf(more, sizeof more, "%sConnection: close\r\n",
			  of_memory ? "Architect-Hibernated: true\r\n" : "");
	if (!no_body)
		length += snprintf(more + length, sizeof more - length, "Content-Length: %zu\r\n", body_length);
	length += snprintf(more + length, sizeof more - length, "\r\n");
	http1->reply = allocate(http1->reply, head_length + length + body_length);
	memcpy(http1->reply, head, head_length);
	memcpy(http1->reply + head_length, more, length);
	if (!no_body && body_length)
		memcpy(http1->reply + head_length + length, body, body_length);
	http1->reply_length = head_length + length + (no_body ? 0 : body_length);
	http1->phase = REPLYING;
	return 1;
}

static int reply_text(struct http1 *http1, const char *status, const char *text, int keep, int of_memory)
{
	char head[REPLY_ROOM], body[REPLY_ROOM];
	int head_length = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\n", status);
	int body_length = snprintf(body, sizeof body, "health-check-proxy: %s %s\n",
				   http1->probe->mapping->container, text);

	if (keep)
		mapping_answered(http1->probe->mapping, &http1->question, 0, head, head_length, body, body_length);
	return reply(http1, head, head_length, body, body_length, of_memory);
}

static int reply_failure(struct http1 *http1, const char *status, const char *text)
{
	return reply_text(http1, status, text, 1, 0);
}

static int reply_from_memory(struct http1 *http1)
{
	const struct answer *answer = answers_find(&http1->probe->mapping->answers, &http1->question);

	/* The proxy is younger than the sleep: only what is healthy is put to sleep (failing.c). */
	if (!answer && !http1->probe->mapping->answers.asks)
		return reply_text(http1, "200 OK", "is hibernated, and was healthy when it fell asleep", 0, 1);
	if (!answer)
		return reply_text(http1, "503 Service Unavailable",
				  "is hibernated and was never asked this while it was awake", 0, 1);
	return reply(http1, answer_head(answer), answer->head_length, answer_body(answer), answer->body_length,
		     1);
}

/* Whether it is the app that everybody waits for. */
static int awaits_app(const struct http1 *http1)
{
	if (http1->phase == PASSING)
		return !http1->whole && http1->answer_passed == http1->answer_seen;
	return http1->phase > READING && http1->phase < PASSING;
}

/* The client gave up before it had its answer: to it the app had failed. */
static int client_left(struct http1 *http1)
{
	if (awaits_app(http1) && !probe_app_sleeps(http1->probe))
		reply_failure(http1, "504 Gateway Timeout", "did not answer in the time that the client had");
	else if (http1->phase == PASSING)
		keep(http1); /* it has seen enough of it */
	return FAILED;
}

/* ---- the request -------------------------------------------------------------------------------- */

static void ask(struct http1 *http1)
{
	struct question *question = &http1->question;
	const char *scheme = http1->probe->client.tls ? "https " : "http ";

	question->length = 0;
	question_add(question, scheme, strlen(scheme));
	question_add(question, http1->asked.first[0].at, http1->asked.first[0].length);
	question_add(question, " ", 1);
	question_add(question, http1->asked.first[1].at, http1->asked.first[1].length);
	question_add(question, " ", 1);
	question_add(question, http1->asked.host.at, http1->asked.host.length);
}

/* The request as it is sent: everything but what belongs to the client's own connection. */
static void rewrite(struct http1 *http1)
{
	static const char closing[] = "Connection: close\r\n\r\n";
	const struct head *asked = &http1->asked;
	const char *body = http1->request + asked->length;
	size_t first = asked->fields.at - http1->request, room = http1->request_length * 2 + sizeof closing, used;
	char *new = allocate(NULL, room);

	memcpy(new, http1->request, first);
	used = first + http1_copy_fields(asked, new + first, room - first);
	memcpy(new + used, closing, sizeof closing - 1);
	used += sizeof closing - 1;
	memcpy(new + used, body, asked->body_length);
	free(http1->request);
	http1->request = new;
	http1->request_length = used + asked->body_length;
	http1->request_room = room;
}

static int read_request(struct http1 *http1)
{
	struct head *asked = &http1->asked;
	ssize_t length;

	if (!http1->head_read) {
		int result = http1_read_request(http1->request, http1->request_length, asked);

		if (result < 0)
			return reply_text(http1, "400 Bad Request", "was asked in no valid HTTP/1.1", 0, 0);
		http1->head_read = result;
		http1->to_head = result && asked->first[0].length == 4 && !memcmp(asked->first[0].at, "HEAD", 4);
		if (result && asked->framing == CHUNKED)
			return reply_text(http1, "411 Length Required", "is to be asked with a length", 0, 0);
		if (result && asked->body_length > REQUEST_MAX - asked->length)
			return reply_text(http1, "413 Content Too Large", "was asked too much at once", 0, 0);
		if (result && asked->expects_continue && asked->body_length)
			/* A few bytes on a new connection: its buffer has room for them. */
			stream_write(&http1->probe->client, go_on, sizeof go_on - 1);
	}
	if (http1->head_read && http1->request_length >= asked->length + asked->body_length) {
		ask(http1);
		rewrite(http1);
		http1->phase = WAITING;
		return 1;
	}
	if (!http1->head_read && http1->request_length >= HEAD_MAX)
		return reply_text(http1, "431 Request Header Fields Too Large", "was asked too much at once", 0,
				  0);
	if (http1->request_length == http1->request_room) {
		http1->request_room *= 2;
		http1->request = allocate(http1->request, http1->request_room);
		if (http1->head_read) /* its spans point into what has moved */
			http1_read_request(http1->request, http1->request_length, asked);
	}
	length = stream_read(&http1->probe->client, http1->request + http1->request_length,
			     http1->request_room - http1->request_length);
	if (length <= 0)
		return length == BLOCKED ? BLOCKED : FAILED;
	http1->request_length += length;
	return 1;
}

/* ---- the app ------------------------------------------------------------------------------------ */

static int wait_for_app(struct http1 *http1)
{
	switch (probe_app(http1->probe, 0)) {
	case APP_ASLEEP:
		return reply_from_memory(http1);
	case APP_REFUSES:
		return reply_failure(http1, "502 Bad Gateway", "did not accept the connection");
	case APP_READY:
		http1->phase = SENDING;
		return 1;
	default:
		return BLOCKED;
	}
}

static int send_request(struct http1 *http1)
{
	ssize_t sent;

	if (http1->request_sent == http1->request_length) {
		http1->answer = allocate(NULL, ANSWER_ROOM);
		http1->phase = AWAITING;
		return 1;
	}
	sent = stream_write(&http1->probe->app.stream, http1->request + http1->request_sent,
			    http1->request_length - http1->request_sent);
	if (sent == BLOCKED)
		return BLOCKED;
	if (sent == FAILED) /* it may have answered all the same, before it closed */
		http1->request_sent = http1->request_length;
	else
		http1->request_sent += sent;
	return 1;
}

static void keep_body(struct http1 *http1, struct span run)
{
	size_t room = BODY_KEPT - http1->kept_length;

	if (run.length > room)
		run.length = room;
	memcpy(http1->kept_body + http1->kept_length, run.at, run.length);
	http1->kept_length += run.length;
}

/* What to tell of this answer while the app sleeps: made now, since its bytes are passed on and gone. */
static void keep_head(struct http1 *http1)
{
	const struct head *told = &http1->told;
	size_t fields, status = told->first[1].length + told->first[2].length;
	char *head;

	if (status > HEAD_KEPT / 2)
		status = 3;
	else
		status = told->first[2].length ? status + 1 : 3;
	head = http1->kept_head = allocate(NULL, HEAD_KEPT);
	memcpy(head, "HTTP/1.1 ", 9);
	memcpy(head + 9, told->first[1].at, status);
	memcpy(head + 9 + status, "\r\n", 2);
	http1->kept_head_length = 9 + status + 2;
	fields = http1_copy_fields(told, head + http1->kept_head_length, HEAD_KEPT - http1->kept_head_length);
	if (fields <= HEAD_KEPT - http1->kept_head_length)
		http1->kept_head_length += fields;
}

/* Reads a head out of what has come. 1 if there was one, 0 if more has to come, -1 if it is none. */
static int read_head(struct http1 *http1)
{
	struct head *told = &http1->told;
	int result = http1_read_answer(http1->answer + http1->answer_seen,
				       http1->answer_length - http1->answer_seen, http1->to_head, told);

	if (result < 0 || told->status == 101 || (!result && http1->answer_length >= HEAD_MAX))
		return -1;
	if (!result)
		return 0;
	if (told->status < 200) { /* an interim answer: the client gets it with the final one */
		http1->answer_seen += told->length;
		return read_head(http1);
	}
	keep_head(http1);
	http1->answer_seen += told->length;
	http1->body_left = told->body_length;
	http1->whole = told->framing == NO_BODY || (told->framing == BY_LENGTH && !told->body_length);
	http1->told_read = 1;
	return 1;
}

/* Goes through what has come of the body. -1 if its framing is wrong. */
static int read_body(struct http1 *http1)
{
	while (http1->answer_seen < http1->answer_length && !http1->whole) {
		size_t length = http1->answer_length - http1->answer_seen;
		struct span run = { http1->answer + http1->answer_seen, length };

		switch (http1->told.framing) {
		case CHUNKED:
			length = http1_chunk(&http1->chunks, run.at, length, &run);
			if (http1->chunks.state == CHUNKS_BAD)
				return -1;
			http1->whole = http1->chunks.state == CHUNKS_END;
			break;
		case BY_LENGTH:
			if (run.length > http1->body_left)
				length = run.length = http1->body_left;
			http1->body_left -= length;
			http1->whole = !http1->body_left;
			break;
		default:
			break;
		}
		keep_body(http1, run);
		http1->answer_seen += length;
	}
	return 0;
}

static int broken_answer(struct http1 *http1, const char *why)
{
	int passing = http1->phase == PASSING;

	if (!probe_app_sleeps(http1->probe))
		reply_failure(http1, "502 Bad Gateway", why);
	else if (!passing)
		reply_from_memory(http1);
	/* Part of the real one is on its way: all that can be done is what the app did, to break off. */
	return passing ? FAILED : 1;
}

/* Takes in what the app sends. 1 when something came, BLOCKED, or what broken_answer() says. */
static int read_answer(struct http1 *http1)
{
	ssize_t length = stream_read(&http1->probe->app.stream, http1->answer + http1->answer_length,
				     ANSWER_ROOM - http1->answer_length);

	if (length == BLOCKED)
		return BLOCKED;
	if (length == FAILED)
		return broken_answer(http1, "broke the connection off before its answer was whole");
	if (!length) {
		if (!http1->told_read || http1->told.framing != UNTIL_CLOSED)
			return broken_answer(http1, "closed the connection before its answer was whole");
		http1->whole = 1;
		return 1;
	}
	http1->answer_length += length;
	if (!http1->told_read) {
		int result = read_head(http1);

		if (result <= 0)
			return result ? broken_answer(http1, "answered in no valid HTTP/1.1") : 1;
	}
	return read_body(http1) ? broken_answer(http1, "answered in no valid HTTP/1.1") : 1;
}

static int await_answer(struct http1 *http1)
{
	int result = 1;

	if (!http1->whole)
		result = read_answer(http1);
	if (result != 1 || http1->phase == REPLYING)
		return result;
	if (http1->whole || (http1->told_read && http1->kept_length == BODY_KEPT) ||
	    http1->answer_length == ANSWER_ROOM)
		http1->phase = PASSING;
	return 1;
}

static int pass_answer(struct http1 *http1)
{
	ssize_t passed;

	/* answer_seen and not answer_length: what stands after the end of an answer belongs to nothing. */
	if (http1->answer_passed == http1->answer_seen) {
		if (http1->whole) {
			keep(http1);
			return 2;
		}
		http1->answer_length = http1->answer_seen = http1->answer_passed = 0;
		return read_answer(http1);
	}
	passed = stream_write(&http1->probe->client, http1->answer + http1->answer_passed,
			      http1->answer_seen - http1->answer_passed);
	if (passed < 0)
		return passed == BLOCKED ? BLOCKED : client_left(http1);
	http1->answer_passed += passed;
	return 1;
}

static int send_reply(struct http1 *http1)
{
	ssize_t sent;

	if (http1->reply_sent == http1->reply_length)
		return 2;
	sent = stream_write(&http1->probe->client, http1->reply + http1->reply_sent,
			    http1->reply_length - http1->reply_sent);
	if (sent < 0)
		return (int)sent;
	http1->reply_sent += sent;
	return 1;
}

/* 1 to be called again, 2 when the client has everything, BLOCKED or FAILED. */
static int advance(struct http1 *http1)
{
	switch (http1->phase) {
	case READING:
		return read_request(http1);
	case WAITING:
		return wait_for_app(http1);
	case SENDING:
		return send_request(http1);
	case AWAITING:
		return await_answer(http1);
	case PASSING:
		return pass_answer(http1);
	default:
		return send_reply(http1);
	}
}

int http1_step(struct http1 *http1)
{
	struct probe *probe = http1->probe;
	int result, steps = 0;

	if (probe->client_closed && http1->phase > READING)
		return client_left(http1);
	if (probe->late && http1->phase == READING)
		return FAILED;
	if (http1->phase > READING && http1->phase < REPLYING && !http1->whole) {
		int part_passed = http1->phase == PASSING, sleeps = probe_app_sleeps(probe);

		if (sleeps)
			reply_from_memory(http1);
		else if (probe->late)
			reply_failure(http1, "504 Gateway Timeout", "did not answer in time");
		if (part_passed && (sleeps || probe->late))
			return FAILED; /* the rest will not come, and it is too late for another answer */
	}
	do {
		result = advance(http1);
	} while (result == 1 && ++steps < STEPS);
	if (result == 1) { /* an endless answer, say: others have their turn too */
		probe->wake = 0;
		return BLOCKED;
	}
	return result == 2 ? 1 : result;
}
