/* Tells architectd that an app must not be put to sleep now.
 *
 * Why it exists: a sleeper is answered for with its last answer. One that failed a single probe and then
 * slept would fail every probe after it, and be restarted for that with its state lost; one that was never
 * healthy would never be. So a datagram socket has the abstract name architect/failing/CONTAINER/SHADOWPORT
 * (unix(7)) until the app has been seen healthy, and from a failure on until it is again: architectd looks for
 * it before it hibernates (src/architect/adapters/healthproxy.py). Nothing is ever sent.
 *
 * Called by mapping.c.
 */
#define _GNU_SOURCE
#include "failing.h"

#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void failing_tell(int *fd, const char *container, uint16_t shadow_port, int failing)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	/* The first byte stays 0: that is what makes the name abstract. */
	int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "architect/failing/%s/%d", container,
			      shadow_port);

	if (!failing && *fd >= 0) {
		close(*fd);
		*fd = -1;
	}
	if (!failing || *fd >= 0 || length >= (int)sizeof name.sun_path - 1)
		return;
	*fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (*fd >= 0 && bind(*fd, (void *)&name, offsetof(struct sockaddr_un, sun_path) + 1 + length)) {
		close(*fd);
		*fd = -1;
	}
}
