/* A mapping's port is open exactly while the app's is.
 *
 * Why it exists: a TCP probe asks nothing, it looks whether a connect succeeds, and the kernel answers that
 * before any program learns of it. So the port has to be closed while the app's is: it stays bound, and
 * listens only while the app accepts, or did when it was last seen awake. Whether the app still accepts, each
 * probe's own connection to it shows: the first probe after the app has stopped finds the port open and is
 * reset, the next one is refused. While the port is closed the proxy looks by itself, for probes cannot.
 *
 * Called by main.c's loop; told by probe.c and grpc.c what they have seen.
 */
#define _GNU_SOURCE
#include "mapping.h"

#include <errno.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#include "asleep.h"
#include "bounds.h"
#include "failing.h"
#include "say.h"

static int bound_socket(uint16_t port)
{
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any };
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1, off = 0;
	int has_v6 = fd >= 0;

	if (!has_v6)
		fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	/* Connections of a proxy that was here before may still be waiting for their end. */
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (has_v6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	if (bind(fd, has_v6 ? (void *)&v6 : (void *)&v4, has_v6 ? sizeof v6 : sizeof v4))
		return -1;
	return fd;
}

static _Noreturn void fail_port(const struct mapping *mapping)
{
	fail(1, "cannot listen on shadowPort %d of container %s: %s%s", mapping->shadow_port,
	     mapping->container, strerror(errno),
	     errno == EADDRINUSE ? "; give the mapping a port that nothing in the pod listens on" : "");
}

static void open_port(struct mapping *mapping)
{
	if (!mapping->open && listen(mapping->listener, BACKLOG))
		fail_port(mapping);
	mapping->open = 1;
}

static void plan_look(struct mapping *mapping)
{
	long long now = now_ms();

	mapping->look_at = now + (now - mapping->closed_at < LOOK_SOON_FOR_MS ? LOOK_SOON_MS : LOOK_LATER_MS);
}

static void tell_failing(struct mapping *mapping)
{
	failing_tell(&mapping->failing, mapping->container, mapping->shadow_port,
		     !mapping->seen || !mapping->open || mapping->failed);
}

/* A port that another one is bound to, but does not listen on, is seen to be taken only by listening. A SYN
 * that comes in that moment is dropped, so that it is sent again, and not taken for an app that accepts. */
static void try_port(const struct mapping *mapping)
{
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog filter = { .len = 1, .filter = &nothing };
	int listener = mapping->listener, off = 0;

	setsockopt(listener, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter);
	if (listen(listener, BACKLOG) || shutdown(listener, SHUT_RD))
		fail_port(mapping);
	setsockopt(listener, SOL_SOCKET, SO_DETACH_FILTER, &off, sizeof off);
}

void mapping_begin(struct mapping *mapping)
{
	mapping->failing = -1;
	mapping->closed_at = now_ms();
	mapping->look = (struct upstream){ .stream = { .fd = -1 } };
	mapping->listener = bound_socket(mapping->shadow_port);
	if (mapping->listener < 0)
		fail_port(mapping);
	try_port(mapping);
	tell_failing(mapping);
}

void mapping_answered(struct mapping *mapping, const struct question *question, int good, const void *head,
		      size_t head_length, const void *body, size_t body_length)
{
	answers_keep(&mapping->answers, question, head, head_length, body, body_length);
	mapping->failed = !good;
	tell_failing(mapping);
}

void mapping_accepts(struct mapping *mapping, int accepts)
{
	if (mapping->open != accepts || !mapping->seen)
		say("port %d of container %s %s connections, so port %d %s", mapping->app_port,
		    mapping->container, accepts ? "accepts" : "does not accept", mapping->shadow_port,
		    accepts ? "does" : "does not");
	mapping->seen = 1;
	if (accepts) {
		open_port(mapping);
	} else {
		/* The way to stop listening and keep the port: __inet_shutdown(), net/ipv4/af_inet.c. */
		if (mapping->open) {
			shutdown(mapping->listener, SHUT_RD);
			mapping->closed_at = now_ms();
		}
		mapping->open = 0;
		plan_look(mapping);
	}
	tell_failing(mapping);
}

void mapping_look(struct mapping *mapping)
{
	int result;

	if (mapping->open && !mapping->looking)
		return;
	if (!mapping->looking) {
		if (now_ms() < mapping->look_at)
			return;
		if (asleep(mapping->container)) {
			mapping->look_at = now_ms() + LOOK_LATER_MS;
			/* Started beside a sleeper: that it cannot be known is to be said, not to be hidden. */
			if (!mapping->seen)
				open_port(mapping);
			return;
		}
		upstream_start(&mapping->look, mapping->app_port);
		mapping->looking = 1;
	}
	mapping->look.stream.wants = 0;
	result = upstream_connect(&mapping->look);
	if (result == BLOCKED)
		return;
	upstream_close(&mapping->look);
	mapping->looking = 0;
	plan_look(mapping);
	if (result == 1)
		mapping_accepts(mapping, 1);
	else if (!mapping->seen && !asleep(mapping->container))
		mapping_accepts(mapping, 0);
}

long long mapping_due(const struct mapping *mapping)
{
	if (mapping->looking)
		return mapping->look.deadline;
	return mapping->open ? -1 : mapping->look_at;
}
