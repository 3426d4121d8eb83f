/* Answers gRPC health checks (grpc.health.v1.Health/Check), through the app or from memory.
 *
 * HTTP/2 of the client ends here and begins anew towards the app, a connection for each call: headers, message,
 * status and its text are passed on, and the answer is remembered by the message that was asked with, which is
 * the service's name. Other calls are answered with UNIMPLEMENTED, and Watch with them: it never ends, and a
 * probe does not use it.
 *
 * Called by probe.c.
 */
#define _GNU_SOURCE
#include "grpc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "answers.h"
#include "bounds.h"
#include "grpc_app.h"
#include "h2.h"
#include "probe.h"
#include "say.h"

static const char check_path[] = "/grpc.health.v1.Health/Check";

/* HealthCheckResponse{status: NOT_SERVING}, not compressed, two bytes long. */
static const uint8_t serving[] = { 0, 0, 0, 0, 2, 0x08, 1 };
static const uint8_t not_serving[] = { 0, 0, 0, 0, 2, 0x08, 2 };

struct grpc {
	struct probe *probe;
	struct h2 h2;
	enum { IDLE, READING, WAITING, AWAITING, ANSWERING } phase;
	int32_t stream;
	int calls;     /* the app was connected to for the first of them before it came */
	int is_check, from_memory;
	struct fields fields;
	uint8_t message[QUESTION_MAX / 2]; /* the question, with its prefix of five bytes */
	size_t message_length;
	struct question question;
	struct grpc_app app;
	struct grpc_answer answer;
	size_t sent;   /* of the answer's message */
	char status[8];
};

/* ---- the client's side of HTTP/2 ---------------------------------------------------------------- */

static int begin_call(nghttp2_session *session, const nghttp2_frame *frame, void *context)
{
	struct grpc *grpc = context;

	if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
		return 0;
	if (grpc->phase != IDLE) /* a client that has not read the settings yet */
		return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id,
						 NGHTTP2_REFUSED_STREAM);
	grpc->phase = READING;
	grpc->stream = frame->hd.stream_id;
	grpc->is_check = grpc->from_memory = 0;
	grpc->fields.number = grpc->fields.used = 0;
	grpc->message_length = grpc->sent = 0;
	return 0;
}

static int refuse_call(nghttp2_session *session, int32_t stream)
{
	return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream, NGHTTP2_ENHANCE_YOUR_CALM);
}

static int take_field(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
		      size_t name_length, const uint8_t *value, size_t length, uint8_t flags, void *context)
{
	struct grpc *grpc = context;

	(void)flags;
	if (frame->hd.stream_id != grpc->stream || grpc->phase != READING)
		return 0;
	if (name_length == 5 && !memcmp(name, ":path", 5))
		grpc->is_check = length == sizeof check_path - 1 && !memcmp(value, check_path, length);
	if (!fields_add(&grpc->fields, name, name_length, value, length))
		return refuse_call(session, grpc->stream);
	return 0;
}

static int take_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *bytes,
		     size_t length, void *context)
{
	struct grpc *grpc = context;

	(void)flags;
	if (stream != grpc->stream || grpc->phase != READING)
		return 0;
	if (length > sizeof grpc->message - grpc->message_length)
		return refuse_call(session, stream);
	memcpy(grpc->message + grpc->message_length, bytes, length);
	grpc->message_length += length;
	return 0;
}

static int take_frame(nghttp2_session *session, const nghttp2_frame *frame, void *context)
{
	struct grpc *grpc = context;

	(void)session;
	if (grpc->phase == READING && frame->hd.stream_id == grpc->stream &&
	    frame->hd.flags & NGHTTP2_FLAG_END_STREAM &&
	    (frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS))
		grpc->phase = WAITING;
	return 0;
}

static void keep(struct grpc *grpc);
static void answer_failure(struct grpc *grpc, int status, const char *text);

/* The app has failed in the eyes of a client that goes before it has its answer. */
static void client_left(struct grpc *grpc)
{
	if ((grpc->phase == WAITING || grpc->phase == AWAITING) && grpc->is_check &&
	    !probe_app_sleeps(grpc->probe)) {
		answer_failure(grpc, GRPC_DEADLINE_EXCEEDED, "did not answer in the time that the client had");
		keep(grpc);
	}
}

static int end_call(nghttp2_session *session, int32_t stream, uint32_t error, void *context)
{
	struct grpc *grpc = context;

	(void)session, (void)error;
	if (stream != grpc->stream)
		return 0;
	client_left(grpc);
	grpc_app_free(&grpc->app);
	grpc->phase = IDLE;
	grpc->stream = 0;
	return 0;
}

static nghttp2_session_callbacks *callbacks(void)
{
	static nghttp2_session_callbacks *made;

	if (made)
		return made;
	if (nghttp2_session_callbacks_new(&made))
		fail(1, "no memory for HTTP/2: raise the memory limit of this container");
	nghttp2_session_callbacks_set_on_begin_headers_callback(made, begin_call);
	nghttp2_session_callbacks_set_on_header_callback(made, take_field);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made, take_data);
	nghttp2_session_callbacks_set_on_frame_recv_callback(made, take_frame);
	nghttp2_session_callbacks_set_on_stream_close_callback(made, end_call);
	return made;
}

struct grpc *grpc_new(struct probe *probe)
{
	static const nghttp2_settings_entry settings[] = {
		{ NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, 1 },
		{ NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, FIELDS_ROOM },
	};
	struct grpc *grpc = allocate(NULL, sizeof *grpc);
	char first[4];
	unsigned length;

	memset(grpc, 0, sizeof *grpc);
	grpc->probe = probe;
	if (nghttp2_session_server_new(&grpc->h2.session, callbacks(), grpc) ||
	    nghttp2_submit_settings(grpc->h2.session, NGHTTP2_FLAG_NONE, settings, 2))
		fail(1, "no memory for HTTP/2: raise the memory limit of this container");
	length = probe_take_first(probe, first);
	h2_receive(&grpc->h2, first, length); /* the beginning of the preface, as it has to be */
	return grpc;
}

void grpc_free(struct grpc *grpc)
{
	grpc_app_free(&grpc->app);
	h2_free(&grpc->h2);
	free(grpc);
}

/* ---- answers ------------------------------------------------------------------------------------ */

static ssize_t send_message(nghttp2_session *session, int32_t stream, uint8_t *bytes, size_t room,
			    uint32_t *flags, nghttp2_data_source *source, void *context)
{
	struct grpc *grpc = context;
	struct grpc_answer *answer = &grpc->answer;
	size_t left = answer->message_length - grpc->sent, length = left < room ? left : room;
	nghttp2_nv trailers[2] = { h2_field("grpc-status", grpc->status), h2_field("grpc-message", "") };

	(void)source;
	memcpy(bytes, answer->message + grpc->sent, length);
	grpc->sent += length;
	if (grpc->sent < answer->message_length)
		return (ssize_t)length;
	trailers[1].value = (uint8_t *)answer->text;
	trailers[1].valuelen = answer->text_length;
	*flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
	if (nghttp2_submit_trailer(session, stream, trailers, answer->text_length ? 2 : 1))
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	return (ssize_t)length;
}

static void submit_answer(struct grpc *grpc)
{
	struct grpc_answer *answer = &grpc->answer;
	nghttp2_data_provider provider = { .read_callback = send_message };
	nghttp2_nv fields[5];
	size_t number = 0;

	snprintf(grpc->status, sizeof grpc->status, "%d", answer->status);
	fields[number++] = h2_field(":status", "200");
	fields[number++] = h2_field("content-type", "application/grpc");
	if (grpc->from_memory)
		fields[number++] = h2_field("architect-hibernated", "true");
	if (!answer->message_length) {
		fields[number++] = h2_field("grpc-status", grpc->status);
		fields[number] = h2_field("grpc-message", "");
		fields[number].value = (uint8_t *)answer->text;
		fields[number].valuelen = answer->text_length;
		number += answer->text_length > 0;
	}
	nghttp2_submit_response(grpc->h2.session, grpc->stream, fields, number,
				answer->message_length ? &provider : NULL);
	grpc->phase = ANSWERING;
}

static void answer_failure(struct grpc *grpc, int status, const char *text)
{
	struct grpc_answer *answer = &grpc->answer;

	answer->status = status;
	answer->message_length = 0;
	answer->text_length = snprintf(answer->text, sizeof answer->text, "health-check-proxy: %s %s",
				       grpc->probe->mapping->container, text);
}

static void ask(struct grpc *grpc)
{
	struct question *question = &grpc->question;
	const char *scheme = grpc->probe->client.tls ? "grpcs " : "grpc ";

	question->length = 0;
	question_add(question, scheme, strlen(scheme));
	question_add(question, grpc->message, grpc->message_length);
}

static int is_serving(const struct grpc_answer *answer)
{
	return answer->status == GRPC_OK && answer->message_length == sizeof serving &&
	       !memcmp(answer->message, serving, sizeof serving);
}

static void keep(struct grpc *grpc)
{
	const struct grpc_answer *answer = &grpc->answer;
	size_t head_length = sizeof answer->status + answer->text_length;
	char head[sizeof answer->status + sizeof answer->text];

	memcpy(head, &answer->status, sizeof answer->status);
	memcpy(head + sizeof answer->status, answer->text, answer->text_length);
	ask(grpc);
	mapping_answered(grpc->probe->mapping, &grpc->question, is_serving(answer), head, head_length,
			 answer->message, answer->message_length);
}

static void answer_from_memory(struct grpc *grpc)
{
	const struct answer *kept;
	struct grpc_answer *answer = &grpc->answer;

	ask(grpc);
	kept = answers_find(&grpc->probe->mapping->answers, &grpc->question);
	grpc->from_memory = 1;
	if (kept) {
		memcpy(&answer->status, answer_head(kept), sizeof answer->status);
		answer->text_length = kept->head_length - sizeof answer->status;
		memcpy(answer->text, answer_head(kept) + sizeof answer->status, answer->text_length);
		answer->message_length = kept->body_length;
		memcpy(answer->message, answer_body(kept), kept->body_length);
	} else {
		/* As in http1.c: a proxy without any memory is younger than the sleep of a healthy app. */
		const uint8_t *message = grpc->probe->mapping->answers.asks ? not_serving : serving;

		answer->status = GRPC_OK;
		answer->text_length = 0;
		answer->message_length = sizeof not_serving;
		memcpy(answer->message, message, sizeof not_serving);
	}
	submit_answer(grpc);
}

static int app_failed(struct grpc *grpc, int status, const char *text)
{
	if (probe_app_sleeps(grpc->probe)) {
		answer_from_memory(grpc);
	} else {
		answer_failure(grpc, status, text);
		keep(grpc);
		submit_answer(grpc);
	}
	return 1;
}

/* ---- the app ------------------------------------------------------------------------------------ */

static int wait_for_app(struct grpc *grpc)
{
	struct probe *probe = grpc->probe;

	if (!grpc->is_check) {
		answer_failure(grpc, GRPC_UNIMPLEMENTED, "is only asked for grpc.health.v1.Health/Check here");
		submit_answer(grpc);
		return 1;
	}
	if (probe->app_phase == APP_ASLEEP) {
		answer_from_memory(grpc);
		return 1;
	}
	switch (probe_app(probe, 1)) {
	case APP_REFUSES:
		return app_failed(grpc, GRPC_UNAVAILABLE, "did not accept the connection");
	case APP_READY:
		break;
	default:
		return BLOCKED;
	}
	grpc->phase = AWAITING;
	if (grpc_app_begin(&grpc->app, &grpc->fields, grpc->message, grpc->message_length) == FAILED)
		return app_failed(grpc, GRPC_UNAVAILABLE, "could not be asked this");
	return 1;
}

static int await_answer(struct grpc *grpc)
{
	int result = grpc_app_step(&grpc->app, &grpc->probe->app.stream);

	if (result == BLOCKED)
		return BLOCKED;
	if (result == FAILED)
		return app_failed(grpc, GRPC_UNAVAILABLE, "closed the connection without a gRPC status");
	grpc->answer = grpc->app.answer;
	keep(grpc);
	submit_answer(grpc);
	return 1;
}

/* Before each further call a new connection to the app. */
static void connect_again(struct grpc *grpc)
{
	if (grpc->calls++)
		probe_app_again(grpc->probe);
	grpc->probe->wake = 0;
}

static void watch_app(struct grpc *grpc)
{
	struct probe *probe = grpc->probe;

	if (grpc->phase != WAITING && grpc->phase != AWAITING)
		return;
	if (probe->late)
		app_failed(grpc, GRPC_DEADLINE_EXCEEDED, "did not answer in time");
	else if (probe_app_sleeps(probe) && grpc->is_check)
		answer_from_memory(grpc);
}

int grpc_step(struct grpc *grpc)
{
	struct probe *probe = grpc->probe;
	int result;

	if (probe->client_closed) {
		client_left(grpc);
		return FAILED;
	}
	watch_app(grpc);
	if (probe->late)
		nghttp2_session_terminate_session(grpc->h2.session, NGHTTP2_NO_ERROR);
	for (;;) {
		int before = grpc->phase;

		result = h2_step(&grpc->h2, &probe->client);
		if (result == 0 || result == FAILED)
			client_left(grpc);
		if (result != BLOCKED)
			return result == 1 ? 1 : FAILED;
		if (grpc->phase == WAITING && before != WAITING && before != AWAITING) {
			connect_again(grpc);
			return BLOCKED; /* to be called again at once, with the app's side begun */
		}
		if (grpc->phase == WAITING)
			result = wait_for_app(grpc);
		else if (grpc->phase == AWAITING)
			result = await_answer(grpc);
		else
			return BLOCKED;
		if (result == BLOCKED)
			return BLOCKED;
	}
}
