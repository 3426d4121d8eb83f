/* Connects to the app, wherever in the pod it listens: 127.0.0.1, ::1, then the pod's own addresses.
 *
 * Its packets carry the traffic class by which the gate knows that they are no activity; the kernel answers
 * a hibernated app's SYN with a reset, so a connect never hangs on a sleeper.
 *
 * Called by probe.c, grpc.c and mapping.c.
 */
#define _GNU_SOURCE
#include "upstream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bounds.h"
#include "say.h"

enum { OWN_MAX = 4 };

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

/* The pod's own addresses, without loopback and link-local ones; returns how many. Read anew each time, since
 * a pod that moved has others. */
static unsigned read_own(union address own[OWN_MAX])
{
	struct ifaddrs *all, *at;
	unsigned number = 0;

	if (getifaddrs(&all))
		return 0;
	for (at = all; at && number < OWN_MAX; at = at->ifa_next) {
		const union address *here = (const void *)at->ifa_addr;

		if (!here || at->ifa_flags & IFF_LOOPBACK)
			continue;
		if (here->any.sa_family == AF_INET)
			own[number++].v4 = here->v4;
		else if (here->any.sa_family == AF_INET6 && !IN6_IS_ADDR_LINKLOCAL(&here->v6.sin6_addr))
			own[number++].v6 = here->v6;
	}
	freeifaddrs(all);
	return number;
}

/* The address to try as that number; 0 if there is no more. */
static int address_of(unsigned number, uint16_t port, union address *address)
{
	static union address own[OWN_MAX];
	static unsigned own_number;

	*address = (union address){ 0 };
	if (number == 2)
		own_number = read_own(own);
	if (number == 0)
		address->v4 = (struct sockaddr_in){ AF_INET, 0, { htonl(INADDR_LOOPBACK) }, { 0 } };
	else if (number == 1)
		address->v6 = (struct sockaddr_in6){ .sin6_family = AF_INET6, .sin6_addr = in6addr_loopback };
	else if (number - 2 < own_number)
		*address = own[number - 2];
	else
		return 0;
	if (address->any.sa_family == AF_INET)
		address->v4.sin_port = htons(port);
	else
		address->v6.sin6_port = htons(port);
	return 1;
}

/* 1 if connected, 0 if it goes on, -1 if it was refused. */
static int try_address(struct upstream *upstream, const union address *address)
{
	int v6 = address->any.sa_family == AF_INET6, class = TRAFFIC_CLASS;
	int fd = socket(address->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	/* Before the SYN: it has to carry the class too. Unmarked it would wake whom it asks after. */
	if (setsockopt(fd, v6 ? IPPROTO_IPV6 : IPPROTO_IP, v6 ? IPV6_TCLASS : IP_TOS, &class, sizeof class) ||
	    (connect(fd, &address->any, v6 ? sizeof address->v6 : sizeof address->v4) &&
	     errno != EINPROGRESS)) {
		close(fd);
		return -1;
	}
	upstream->stream = (struct stream){ .fd = fd };
	return 0;
}

void upstream_start(struct upstream *upstream, uint16_t port)
{
	*upstream = (struct upstream){
		.stream = { .fd = -1 },
		.port = port,
		.deadline = now_ms() + CONNECT_MS,
	};
}

/* What became of the present attempt: 1, BLOCKED or FAILED. */
static int attempt_result(struct stream *stream)
{
	union address peer = { 0 }, own = { 0 };
	socklen_t size = sizeof(int);
	int error = 0;

	getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error == ECONNRESET) /* it accepted, and has thought better of it since */
		return 1;
	if (error)
		return FAILED;
	size = sizeof peer;
	if (getpeername(stream->fd, &peer.any, &size)) {
		stream->wants |= EPOLLOUT;
		return BLOCKED;
	}
	/* A port without a listener, in the range of ephemeral ones: the socket may have met itself. */
	size = sizeof own;
	getsockname(stream->fd, &own.any, &size);
	return memcmp(&own, &peer, sizeof own) ? 1 : FAILED;
}

int upstream_connect(struct upstream *upstream)
{
	union address address;

	if (upstream->connected)
		return 1;
	for (;;) {
		if (upstream->stream.fd >= 0) {
			int result = attempt_result(&upstream->stream);

			upstream->connected = result == 1;
			if (result == BLOCKED && now_ms() >= upstream->deadline)
				result = FAILED;
			else if (result != FAILED)
				return result;
			stream_close(&upstream->stream, 1);
			if (now_ms() >= upstream->deadline)
				return FAILED;
		}
		do {
			if (!address_of(upstream->next++, upstream->port, &address))
				return FAILED;
		} while (try_address(upstream, &address) < 0);
	}
}

void upstream_close(struct upstream *upstream)
{
	stream_close(&upstream->stream, 0);
	upstream->connected = 0;
}
