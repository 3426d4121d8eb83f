/* The pager's end of CRIU's lazy-pages.socket.
 *
 * Why it exists: a restore with --lazy-pages connects to this name in its working directory and sends, for
 * each process, its pid as a 4-byte integer and then its userfaultfd; a negative pid, without descriptor,
 * is a zombie. A magic word comes when all processes are about to run (CRIU 4: criu/uffd.c, send_uffd and
 * lazy_pages_finish_restore). CRIU waits for no answer: nothing it sends may get lost with a dying pager,
 * so it is received into shared memory. A userfaultfd that is still on its way in a socket is let go with
 * the socket, and its process reads zeros: no socket is closed before all has been taken out of it.
 *
 * Who calls it: pager.c.
 */
#define _GNU_SOURCE
#include "pager_criu.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "pager_shared.h"
#include "pager_tasks.h"

#define SOCKET_NAME "lazy-pages.socket"
/* LAZY_PAGES_RESTORE_FINISHED of CRIU: larger than any pid. */
enum { ALL_RUN = 0x52535446 };
/* How far to look for sockets of a killed pager; the keeper opens descriptors from the lowest up. */
enum { DESCRIPTORS_MAX = 1 << 16 };

static void close_socket(int32_t *place)
{
	int fd = *place;

	/* Off the record first: killed in between, it is found by its name. */
	COMMIT(*place, -1);
	if (fd >= 0)
		close(fd);
}

/* Where CRIU looks for the socket. */
static int meeting_place(void)
{
	return shared->work >= 0 ? shared->work : shared->directory;
}

int criu_listen(void)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = SOCKET_NAME };
	int fd, error = 0;

	/* By the relative name: a path may be too long for a socket, and /proc that of the container. */
	if (fchdir(meeting_place()))
		return -errno;
	unlink(SOCKET_NAME);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&name, sizeof name) || listen(fd, 1))
		error = -errno;
	chdir("/");
	if (error && fd >= 0)
		close(fd);
	if (!error)
		COMMIT(shared->listener, fd);
	return error;
}

int criu_accept(void)
{
	int fd = accept4(shared->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return 0;
	COMMIT(shared->connection, fd);
	close_socket(&shared->listener);
	return 1;
}

/* The descriptor in a greeting, or -1. The kernel writes the header last. */
static int greeted_fd(const struct greeting *greeting)
{
	const struct cmsghdr *header = (const struct cmsghdr *)greeting->control;
	int fd;

	if (header->cmsg_len != CMSG_LEN(sizeof fd) || header->cmsg_type != SCM_RIGHTS)
		return -1;
	memcpy(&fd, CMSG_DATA(header), sizeof fd);
	return fd;
}

/* Returns 1 when greeting->pid is known, 0 if nothing has come yet, or -errno. */
static int receive_pid(struct greeting *greeting)
{
	ssize_t length;

	if (greeting->pid)
		return 1;
	length = recv(shared->connection, &greeting->pid, sizeof greeting->pid, MSG_DONTWAIT);
	if (length == sizeof greeting->pid)
		return 1;
	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	return length ? -EPROTO : -ECONNRESET;
}

/* The same for the descriptor. */
static int receive_fd(struct greeting *greeting)
{
	struct iovec byte = { &greeting->byte, 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1,
				  .msg_control = greeting->control,
				  .msg_controllen = sizeof greeting->control };
	ssize_t length;

	if (greeted_fd(greeting) >= 0)
		return 1;
	length = recvmsg(shared->connection, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (!length)
		return -ECONNRESET;
	return greeted_fd(greeting) >= 0 ? 1 : -EPROTO;
}

static void forget_greeting(void)
{
	/* The descriptor first: a pid without one is just a greeting that is not complete. */
	memset(shared->greeting.control, 0, sizeof shared->greeting.control);
	COMMIT(shared->greeting.pid, 0);
}

/* Takes one message. Returns 1, 0 if it is not complete yet, or -errno. */
static int receive(void)
{
	struct greeting *greeting = &shared->greeting;
	int result = receive_pid(greeting);

	if (result <= 0 || greeting->pid == ALL_RUN)
		return result;
	if (greeting->pid > 0) {
		result = receive_fd(greeting);
		if (result <= 0)
			return result;
		result = tasks_adopt(greeting->pid, greeted_fd(greeting));
		if (result)
			return result;
	}
	forget_greeting();
	return 1;
}

enum criu_news criu_read(int *error)
{
	int result;

	do
		result = receive();
	while (result > 0 && shared->greeting.pid != ALL_RUN);
	if (result < 0) {
		*error = -result;
		return CRIU_LOST;
	}
	return result ? CRIU_RUNNING : CRIU_NONE;
}

int criu_drain(void)
{
	int result;

	if (shared->listener >= 0)
		criu_accept();
	if (shared->connection < 0)
		return 1;
	do
		result = receive();
	while ((result > 0 && shared->greeting.pid != ALL_RUN) || result == -ESRCH);
	return result != 0;
}

void criu_hang_up(void)
{
	if (meeting_place() >= 0)
		unlinkat(meeting_place(), SOCKET_NAME, 0);
	close_socket(&shared->listener);
	close_socket(&shared->connection);
	forget_greeting();
}

/* Whether fd is one of this pager's sockets: bound to the name, or accepted by one that is. */
static int is_ours(int fd, int *listens)
{
	struct sockaddr_un name = { 0 };
	socklen_t length = sizeof name, size = sizeof *listens;

	if (getsockname(fd, (struct sockaddr *)&name, &length) || name.sun_family != AF_UNIX ||
	    length <= offsetof(struct sockaddr_un, sun_path) || strcmp(name.sun_path, SOCKET_NAME))
		return 0;
	return !getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, listens, &size);
}

void criu_recover(void)
{
	struct rlimit limit;

	shared->listener = shared->connection = -1;
	if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur > DESCRIPTORS_MAX)
		limit.rlim_cur = DESCRIPTORS_MAX;
	for (int fd = 0; fd < (int)limit.rlim_cur; fd++) {
		int listens;

		if (!is_ours(fd, &listens))
			continue;
		if (listens && shared->listener < 0)
			shared->listener = fd;
		else if (!listens && shared->connection < 0)
			shared->connection = fd;
		else
			close(fd);
	}
	if (shared->connection >= 0)
		close_socket(&shared->listener);
}
