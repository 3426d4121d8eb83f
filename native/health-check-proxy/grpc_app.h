/* One gRPC call to the app. */
#ifndef PROXY_GRPC_APP_H
#define PROXY_GRPC_APP_H

#include "h2.h"

enum { MESSAGE_MAX = 4096, STATUS_MESSAGE_MAX = 512 };

/* The statuses that are the proxy's own (gRPC's statuscodes.md). */
enum { GRPC_OK = 0, GRPC_DEADLINE_EXCEEDED = 4, GRPC_UNIMPLEMENTED = 12, GRPC_UNAVAILABLE = 14 };

/* What a call ends with. */
struct grpc_answer {
	int status;
	size_t text_length, message_length;
	char text[STATUS_MESSAGE_MAX]; /* percent-encoded, as it travels */
	uint8_t message[MESSAGE_MAX];  /* with its prefix of five bytes */
};

struct grpc_app {
	struct h2 h2;
	const uint8_t *question; /* the message to send, and how much of it is left */
	size_t question_left;
	struct grpc_answer answer;
	int answered;  /* it has told a gRPC status */
	int over;      /* the app has ended the call */
	int too_long;
};

/* Begins a call with these fields and this message, which have to stay until grpc_app_free(). */
int grpc_app_begin(struct grpc_app *app, const struct fields *fields, const void *message, size_t length);
/* 1 when the answer is whole, BLOCKED, or FAILED if none comes. */
int grpc_app_step(struct grpc_app *app, struct stream *stream);
void grpc_app_free(struct grpc_app *app);

#endif
