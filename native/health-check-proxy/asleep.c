/* Whether a container is hibernated, without a daemon, a mount or a privilege.
 *
 * The container's keeper, which lives in the same network namespace, has a datagram socket with the abstract
 * name "architect/asleep/NAME" exactly while the container sleeps: the kernel lets one connect to it then, and
 * says ECONNREFUSED else (unix(7)). Nothing is ever sent.
 *
 * Called by probe.c for every connection and while it waits for the app, and by mapping.c.
 */
#define _GNU_SOURCE
#include "asleep.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "say.h"

int asleep(const char *container)
{
	static int told;
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), refused;
	/* The first byte stays 0: that is what makes the name abstract. */
	int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "architect/asleep/%s", container);

	refused = fd < 0 || connect(fd, (void *)&name, offsetof(struct sockaddr_un, sun_path) + 1 + length);
	if (refused && errno != ECONNREFUSED && !told++)
		say("cannot tell whether %s sleeps, so it is taken to be awake: %s", container, strerror(errno));
	if (fd >= 0)
		close(fd);
	return !refused;
}
