/* Asks the app one gRPC question over a connection of its own and collects the answer.
 *
 * Called by grpc.c. The protocol: gRPC over HTTP/2 (grpc/doc/PROTOCOL-HTTP2.md).
 */
#include "grpc_app.h"

#include <stdlib.h>
#include <string.h>

#include "say.h"

static ssize_t send_message(nghttp2_session *session, int32_t stream, uint8_t *bytes, size_t room,
			    uint32_t *flags, nghttp2_data_source *source, void *context)
{
	struct grpc_app *app = context;
	size_t length = app->question_left < room ? app->question_left : room;

	(void)session, (void)stream, (void)source;
	memcpy(bytes, app->question, length);
	app->question += length;
	app->question_left -= length;
	if (!app->question_left)
		*flags |= NGHTTP2_DATA_FLAG_EOF;
	return (ssize_t)length;
}

static int is(const uint8_t *name, size_t length, const char *wanted)
{
	return length == strlen(wanted) && !memcmp(name, wanted, length);
}

static int take_field(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
		      size_t name_length, const uint8_t *value, size_t length, uint8_t flags, void *context)
{
	struct grpc_app *app = context;
	struct grpc_answer *answer = &app->answer;

	(void)session, (void)frame, (void)flags;
	if (is(name, name_length, "grpc-status") && length > 0 && length < 3) {
		answer->status = 0;
		for (size_t i = 0; i < length; i++)
			answer->status = answer->status * 10 + (value[i] - '0');
		app->answered = value[0] >= '0' && value[0] <= '9' && value[length - 1] >= '0' &&
				value[length - 1] <= '9';
	} else if (is(name, name_length, "grpc-message")) {
		answer->text_length = length < sizeof answer->text ? length : sizeof answer->text;
		memcpy(answer->text, value, answer->text_length);
	}
	return 0;
}

static int take_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *bytes,
		     size_t length, void *context)
{
	struct grpc_app *app = context;
	struct grpc_answer *answer = &app->answer;

	(void)session, (void)flags, (void)stream;
	if (length > sizeof answer->message - answer->message_length) {
		app->too_long = 1;
		return 0;
	}
	memcpy(answer->message + answer->message_length, bytes, length);
	answer->message_length += length;
	return 0;
}

static int end_call(nghttp2_session *session, int32_t stream, uint32_t error, void *context)
{
	struct grpc_app *app = context;

	(void)stream, (void)error;
	app->over = 1;
	nghttp2_session_terminate_session(session, NGHTTP2_NO_ERROR);
	return 0;
}

static nghttp2_session_callbacks *callbacks(void)
{
	static nghttp2_session_callbacks *made;

	if (made)
		return made;
	if (nghttp2_session_callbacks_new(&made))
		fail(1, "no memory for HTTP/2: raise the memory limit of this container");
	nghttp2_session_callbacks_set_on_header_callback(made, take_field);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made, take_data);
	nghttp2_session_callbacks_set_on_stream_close_callback(made, end_call);
	return made;
}

int grpc_app_begin(struct grpc_app *app, const struct fields *fields, const void *message, size_t length)
{
	static const nghttp2_settings_entry settings[] = { { NGHTTP2_SETTINGS_ENABLE_PUSH, 0 } };
	nghttp2_data_provider provider = { .read_callback = send_message };

	memset(app, 0, sizeof *app);
	app->question = message;
	app->question_left = length;
	if (nghttp2_session_client_new(&app->h2.session, callbacks(), app))
		return FAILED;
	if (nghttp2_submit_settings(app->h2.session, NGHTTP2_FLAG_NONE, settings, 1) ||
	    nghttp2_submit_request(app->h2.session, NULL, fields->nv, fields->number, &provider, NULL) < 0)
		return FAILED;
	return 1;
}

int grpc_app_step(struct grpc_app *app, struct stream *stream)
{
	int result = h2_step(&app->h2, stream);

	if (app->over)
		return app->answered && !app->too_long ? 1 : FAILED;
	return result == BLOCKED ? BLOCKED : FAILED;
}

void grpc_app_free(struct grpc_app *app)
{
	h2_free(&app->h2);
}
