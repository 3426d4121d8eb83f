/* Tells the pod that a container's program is away, without a daemon, a mount or a privilege.
 *
 * Why: health-check-proxy, a process of the pod itself, answers probes from memory while the program
 * sleeps, and must know a sleeper from one that has ended or hangs. Names of unix(7)'s abstract kind
 * belong to a network namespace, which the keeper shares with the pod: a datagram socket has the name
 * architect/asleep/CONTAINER from the beginning of a dump until the program runs again, so that
 * connect(2) to it succeeds exactly then. Nothing is ever sent.
 *
 * Called by the keeper, which is in the container's namespaces whenever its phase changes.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "asleep.h"

static int asleep_fd = -1;

void asleep_begin(const char *container)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	/* The first byte is zero: the name is not of a file. */
	int room = sizeof address.sun_path - 1;
	int length = snprintf(address.sun_path + 1, (size_t)room, "architect/asleep/%s", container);

	asleep_end();
	if (!*container || length >= room)
		return;
	asleep_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (bind(asleep_fd, (struct sockaddr *)&address,
		 (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)))
		asleep_end();
}

void asleep_end(void)
{
	if (asleep_fd >= 0)
		close(asleep_fd);
	asleep_fd = -1;
}
