/* A probe from its first packet to its last.
 *
 * The client's first bytes tell what it speaks: a TLS record, an HTTP/2 preface, an HTTP/1 request line.
 * One that closes without a word was a TCP probe. Anything else is closed. The app is connected to at once,
 * whatever comes: that is what a TCP probe asks for, and it tells the mapping whether the app accepts.
 *
 * Called by main.c's loop. Every step may be called at any time: it tries, and what is blocked says what on.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "asleep.h"
#include "bounds.h"
#include "grpc.h"
#include "http1.h"
#include "say.h"

enum { TLS_HANDSHAKE = 0x16 }; /* the content type of a ClientHello's record, RFC 8446, 5.1 */

enum progress { ENDED, WAITING, GOING_ON };

void probe_begin(struct probe *probe, struct mapping *mapping, int fd)
{
	*probe = (struct probe){
		.phase = RECOGNISING,
		.mapping = mapping,
		.client = { .fd = fd },
		.app = { .stream = { .fd = -1 } },
		.deadline = now_ms() + LIFETIME_MS,
	};
	probe_app_again(probe);
}

static void end(struct probe *probe, int reset)
{
	if (probe->http1)
		http1_free(probe->http1);
	if (probe->grpc)
		grpc_free(probe->grpc);
	stream_close(&probe->client, reset);
	upstream_close(&probe->app);
	*probe = (struct probe){ .phase = FREE };
}

/* ---- the app's side ----------------------------------------------------------------------------- */

void probe_app_again(struct probe *probe)
{
	upstream_close(&probe->app);
	probe->app_phase = APP_ASLEEP;
	if (!asleep(probe->mapping->container)) {
		probe->app_phase = APP_CONNECTING;
		upstream_start(&probe->app, probe->mapping->app_port);
	}
}

static void look_again(struct probe *probe)
{
	if (probe->app_phase != APP_ASLEEP && probe->wake > now_ms() + ASLEEP_EVERY_MS)
		probe->wake = now_ms() + ASLEEP_EVERY_MS;
}

int probe_app_sleeps(struct probe *probe)
{
	if (probe->app_phase != APP_ASLEEP && asleep(probe->mapping->container)) {
		probe->app_phase = APP_ASLEEP;
		upstream_close(&probe->app);
	}
	return probe->app_phase == APP_ASLEEP;
}

static void app_refuses(struct probe *probe)
{
	if (!probe_app_sleeps(probe))
		probe->app_phase = APP_REFUSES;
}

static void connect_app(struct probe *probe)
{
	int result;

	if (probe->app_phase != APP_CONNECTING)
		return;
	result = upstream_connect(&probe->app);
	if (result == BLOCKED) {
		if (probe->wake > probe->app.deadline)
			probe->wake = probe->app.deadline;
		return;
	}
	if (result == 1)
		probe->app_phase = APP_CONNECTED;
	else
		app_refuses(probe);
	if (probe->app_phase != APP_ASLEEP)
		mapping_accepts(probe->mapping, probe->app_phase == APP_CONNECTED);
}

enum app_phase probe_app(struct probe *probe, int http2)
{
	int result = 1;

	if (probe->app_phase == APP_CONNECTED) {
		if (probe->client.tls)
			result = stream_connect_tls(&probe->app.stream, stream_server_name(&probe->client),
						    http2);
		if (result == 1)
			probe->app_phase = APP_READY;
		else if (result == FAILED)
			app_refuses(probe);
	}
	return probe->app_phase;
}

/* ---- the client's side -------------------------------------------------------------------------- */

unsigned probe_take_first(struct probe *probe, char bytes[4])
{
	unsigned length = probe->first_length;

	memcpy(bytes, probe->first, length);
	probe->first_length = 0;
	return length;
}

static int all_of(const char *bytes, unsigned length, char low, char high)
{
	for (unsigned i = 0; i < length; i++)
		if (bytes[i] < low || bytes[i] > high)
			return 0;
	return 1;
}

static enum progress speak(struct probe *probe)
{
	const char *space = memchr(probe->first, ' ', probe->first_length);

	/* Of HTTP's own methods the shortest ones have three letters. */
	if (!all_of(probe->first, space ? space - probe->first : probe->first_length, 'A', 'Z'))
		return ENDED;
	if (probe->first_length < sizeof probe->first)
		return GOING_ON;
	if (!memcmp(probe->first, "PRI ", 4)) {
		probe->grpc = grpc_new(probe);
		probe->phase = ASKED_GRPC;
	} else {
		probe->http1 = http1_new(probe);
		probe->phase = ASKED_HTTP1;
	}
	return GOING_ON;
}

static enum progress recognise(struct probe *probe)
{
	ssize_t length;
	char byte;

	if (!probe->client.tls && !probe->first_length) {
		length = stream_peek(&probe->client, &byte);
		/* Not to be asked a second time below: a ClientHello that comes in between would be read as
		 * a request line. */
		if (length == BLOCKED)
			return WAITING;
		if (length == 1 && byte == TLS_HANDSHAKE) {
			probe->phase = SHAKING;
			return GOING_ON;
		}
	}
	length = stream_read(&probe->client, probe->first + probe->first_length,
			     sizeof probe->first - probe->first_length);
	if (length == BLOCKED)
		return WAITING;
	if (length > 0) {
		probe->first_length += length;
		return speak(probe);
	}
	if (length == FAILED && probe->client.tls)
		return ENDED;
	/* A TCP probe. Closed at once, since its answer was given by the kernel; epoll would go on about it. */
	stream_close(&probe->client, 0);
	probe->phase = ONLY_TCP;
	return GOING_ON;
}

static enum progress shake_hands(struct probe *probe)
{
	switch (stream_accept_tls(&probe->client)) {
	case 1:
		probe->phase = RECOGNISING;
		return GOING_ON;
	case BLOCKED:
		return WAITING;
	default:
		return ENDED;
	}
}

static enum progress linger(struct probe *probe)
{
	char rest[4096];
	ssize_t length;

	/* Closed with unread bytes in it, a socket would reset the client, and with it the answer. Here the
	 * bytes matter no more, so TLS is not asked. */
	length = recv(probe->client.fd, rest, sizeof rest, 0);
	probe->client.wants |= EPOLLIN;
	return length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR) ? ENDED : WAITING;
}

static enum progress answered(struct probe *probe, int result)
{
	if (result == BLOCKED) {
		look_again(probe);
		return WAITING;
	}
	if (result == FAILED)
		return ENDED;
	upstream_close(&probe->app);
	stream_finish(&probe->client);
	probe->deadline = now_ms() + LINGER_MS;
	probe->phase = LINGERING;
	return GOING_ON;
}

/* Only once it is known what was asked can a refusal be told in its own words; until then it is a reset. */
static int refused(const struct probe *probe)
{
	return probe->app_phase == APP_REFUSES && (probe->phase == RECOGNISING || probe->phase == SHAKING);
}

static enum progress advance(struct probe *probe)
{
	connect_app(probe);
	if (refused(probe))
		return ENDED;
	switch (probe->phase) {
	case RECOGNISING:
		return recognise(probe);
	case SHAKING:
		return shake_hands(probe);
	case ASKED_HTTP1:
		return answered(probe, http1_step(probe->http1));
	case ASKED_GRPC:
		return answered(probe, grpc_step(probe->grpc));
	case ONLY_TCP:
		return probe->app_phase == APP_CONNECTING ? WAITING : ENDED;
	case LINGERING:
		return linger(probe);
	default:
		return ENDED;
	}
}

/* The time is over: one that waits for the app is told so, all others are closed. */
static int too_late(struct probe *probe)
{
	if (now_ms() < probe->deadline)
		return 0;
	if (probe->late || (probe->phase != ASKED_HTTP1 && probe->phase != ASKED_GRPC))
		return 1;
	probe->late = 1;
	probe->deadline = now_ms() + LINGER_MS;
	return 0;
}

void probe_step(struct probe *probe)
{
	enum progress progress;

	if (probe->phase == FREE)
		return;
	do {
		if (too_late(probe)) {
			end(probe, 1);
			return;
		}
		probe->client.wants = probe->app.stream.wants = 0;
		probe->wake = probe->deadline;
		progress = advance(probe);
	} while (progress == GOING_ON);
	if (progress == ENDED)
		end(probe, probe->phase != LINGERING && probe->phase != ONLY_TCP);
}
