/* criu-hook: CRIU runs this program at each step of a dump (--action-script).
 *
 * Why it exists: a dump must be committed, or given up, at exactly one instant: when every image is
 * written and the program is still frozen (CRIU's "post-dump" step). The daemon decides that, and this
 * program carries its answer: exit 0 lets CRIU end the program, anything else makes CRIU thaw it as if
 * nothing had happened. A daemon that is gone counts as "no". CRIU itself is never killed: killed
 * between its parasite's arrival and departure it would take the program with it.
 *
 * Called by CRIU, which inherits ARCHITECT_HOOK_SOCKET from the daemon and sets CRTOOLS_SCRIPT_ACTION.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { LET_IT_END = 0, THAW_IT = 1 };

int main(void)
{
	const char *action = getenv("CRTOOLS_SCRIPT_ACTION");
	const char *path = getenv("ARCHITECT_HOOK_SOCKET");
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char verdict = 'n';
	ssize_t got;
	int daemon;

	if (!action || strcmp(action, "post-dump"))
		return LET_IT_END;
	if (!path || strlen(path) >= sizeof address.sun_path)
		return THAW_IT;
	strcpy(address.sun_path, path);
	daemon = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (daemon < 0 || connect(daemon, (struct sockaddr *)&address, sizeof address))
		return THAW_IT;
	do
		got = read(daemon, &verdict, 1);
	while (got < 0 && errno == EINTR);
	return got == 1 && verdict == 'y' ? LET_IT_END : THAW_IT;
}
