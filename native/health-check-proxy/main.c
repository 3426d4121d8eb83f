/* health-check-proxy: answers a pod's health probes, also while the containers that they ask after sleep.
 *
 * Why it exists: a probe of the app's own port would wake it, or keep it awake, or fail while it sleeps. Probes
 * are pointed at this program's ports instead. While a container is awake it passes them on; while it is
 * hibernated it gives the last answer that the container itself gave. HTTP, HTTPS, gRPC and TCP probes come
 * through the same port, and are told apart by what they say.
 *
 * Why C: each pod has one, and hibernation is there to save memory (docs/architecture.md has the figures).
 *
 * Who calls it: in a cluster it is the sidecar architect-health-check-proxy that the admission webhook adds;
 * elsewhere architectd starts it in the pod's network namespace.
 *
 * usage: health-check-proxy --map NAME:SHADOWPORT:APPPORT...
 *
 * One thread, one loop: whatever is ready or due gets as far as it can without waiting.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "arguments.h"
#include "bounds.h"
#include "mapping.h"
#include "probe.h"
#include "say.h"

enum { EVENTS = 64 };

/* What an event is about, beside the number of the mapping or the probe. */
enum about { LISTENER, LOOK, CLIENT, APP };

static struct mapping mappings[MAPPINGS];
static int mappings_number;
static struct probe probes[CONNECTIONS];
static int loop = -1;

/* Has epoll watch for these events from now on; 0 for not at all. */
static void watch(int fd, uint32_t *watched, uint32_t events, enum about what, int number)
{
	struct epoll_event event = { .events = events, .data.u64 = (uint64_t)what << 32 | (uint32_t)number };
	int change = !*watched ? EPOLL_CTL_ADD : events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL;

	if (events == *watched)
		return;
	if (epoll_ctl(loop, change, fd, &event))
		fail(1, "cannot watch a connection: %s", strerror(errno));
	*watched = events;
}

static void watch_stream(struct stream *stream, uint32_t more, enum about what, int number)
{
	if (stream->fd >= 0)
		watch(stream->fd, &stream->watched, stream->wants ? stream->wants | more : more, what, number);
}

static void step(struct probe *probe)
{
	int number = (int)(probe - probes), asked;

	probe_step(probe);
	if (probe->phase == FREE)
		return;
	asked = probe->phase == ASKED_HTTP1 || probe->phase == ASKED_GRPC;
	watch_stream(&probe->client, asked ? EPOLLRDHUP : 0, CLIENT, number);
	watch_stream(&probe->app.stream, 0, APP, number);
}

static struct probe *free_probe(void)
{
	for (int i = 0; i < CONNECTIONS; i++)
		if (probes[i].phase == FREE)
			return &probes[i];
	return NULL;
}

static void accept_clients(struct mapping *mapping)
{
	int fd;

	while ((fd = accept4(mapping->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		struct probe *probe = free_probe();
		struct stream surplus = { .fd = fd };

		if (probe) {
			probe_begin(probe, mapping, fd);
			step(probe);
		} else {
			stream_close(&surplus, 1);
		}
	}
}

static void look(struct mapping *mapping)
{
	int number = (int)(mapping - mappings);

	mapping_look(mapping);
	watch_stream(&mapping->look.stream, 0, LOOK, number);
	watch(mapping->listener, &mapping->watched, mapping->open ? EPOLLIN : 0, LISTENER, number);
}

static enum about about(const struct epoll_event *event)
{
	return (enum about)(event->data.u64 >> 32);
}

static void handle(const struct epoll_event *event)
{
	int number = (int)(uint32_t)event->data.u64;

	switch (about(event)) {
	case LISTENER:
		accept_clients(&mappings[number]);
		break;
	case LOOK:
		look(&mappings[number]);
		break;
	case CLIENT:
		if (event->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
			probes[number].client_closed = 1;
		step(&probes[number]);
		break;
	case APP:
		step(&probes[number]);
		break;
	}
}

/* What is due by now; returns when the next is, as epoll_wait() takes it. */
static int run_due(void)
{
	long long now = now_ms(), next = -1;

	for (int i = 0; i < CONNECTIONS; i++) {
		if (probes[i].phase != FREE && probes[i].wake <= now)
			step(&probes[i]);
		if (probes[i].phase != FREE && (next < 0 || probes[i].wake < next))
			next = probes[i].wake;
	}
	for (int i = 0; i < mappings_number; i++) {
		long long due;

		look(&mappings[i]); /* a probe may have opened or closed its port */
		due = mapping_due(&mappings[i]);
		if (due >= 0 && (next < 0 || due < next))
			next = due;
	}
	if (next < 0)
		return -1;
	return next > now ? (int)(next - now) : 0;
}

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS];

	mappings_number = arguments_read(argc, argv, mappings);
	/* As a container's first process it would not be ended by a signal that it does not handle. */
	signal(SIGTERM, end);
	signal(SIGINT, end);
	signal(SIGPIPE, SIG_IGN);
	loop = epoll_create1(EPOLL_CLOEXEC);
	if (loop < 0)
		fail(1, "epoll: %s", strerror(errno));
	for (int i = 0; i < mappings_number; i++)
		mapping_begin(&mappings[i]);
	for (;;) {
		int number = epoll_wait(loop, events, EVENTS, run_due());

		/* New clients last: one may take the place of a probe that other events here are about. */
		for (int i = 0; i < number; i++)
			if (about(&events[i]) != LISTENER)
				handle(&events[i]);
		for (int i = 0; i < number; i++)
			if (about(&events[i]) == LISTENER)
				handle(&events[i]);
	}
}
