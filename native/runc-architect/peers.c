/* The two peers of runc-architect: the daemon, which decides, and a container's keeper, which acts.
 *
 * The daemon may be away at any moment; each caller in verbs.c says what then holds. Requests to the
 * daemon are one line of JSON, replies one line that begins with "ok" or "error"; the keeper's protocol
 * is in common/control.h.
 */
#define _GNU_SOURCE
#include "peers.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "../common/control.h"

/* A paused container's keeper is frozen with it and cannot answer; runc can deal with that by itself. */
enum { KEEPER_TIMEOUT_S = 3 };

static int connect_to(const char *path, int type, int timeout_s)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	if (strlen(path) >= sizeof address.sun_path)
		return -1;
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (fd >= 0 && timeout_s)
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ .tv_sec = timeout_s },
			   sizeof(struct timeval));
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Appends ,"key":"value" with the escapes that JSON asks for. Returns the new length. */
static size_t put_text(char *out, size_t at, size_t room, const char *key, const char *value)
{
	if (!value)
		return at;
	at += snprintf(out + at, room - at, "%s\"%s\":\"", at > 1 ? "," : "", key);
	for (; *value && at + 8 < room; value++) {
		unsigned char letter = *value;

		if (letter < 0x20) {
			at += snprintf(out + at, room - at, "\\u%04x", letter);
			continue;
		}
		if (letter == '"' || letter == '\\')
			out[at++] = '\\';
		out[at++] = letter;
	}
	out[at++] = '"';
	return at;
}

static int send_all(int fd, const char *text, size_t length)
{
	while (length) {
		ssize_t sent = send(fd, text, length, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			return -1;
		text += sent;
		length -= sent;
	}
	return 0;
}

static int receive_line(int fd, char *line, size_t room)
{
	size_t have = 0;

	while (have + 1 < room) {
		ssize_t got = recv(fd, line + have, room - have - 1, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return -1;
		have += got;
		line[have] = 0;
		if (line[have - 1] == '\n') {
			line[have - 1] = 0;
			return 0;
		}
	}
	return -1;
}

int daemon_ask(const struct request *request, char *reply, size_t room)
{
	char line[2 * MESSAGE_MAX];
	size_t at = 0, limit = sizeof line - 64;
	int fd = connect_to(DAEMON_SOCKET, SOCK_STREAM, 0);

	if (fd < 0)
		return -1;
	line[at++] = '{';
	at = put_text(line, at, limit, "verb", request->verb);
	at = put_text(line, at, limit, "id", request->id);
	at = put_text(line, at, limit, "bundle", request->bundle);
	at = put_text(line, at, limit, "root", request->root);
	at = put_text(line, at, limit, "resources", request->resources);
	at = put_text(line, at, limit, "process", request->process);
	at += snprintf(line + at, sizeof line - at, ",\"signal\":%d,\"pid\":%d}\n", request->signal,
		       request->pid);
	if (send_all(fd, line, at) || receive_line(fd, reply, room)) {
		close(fd);
		return -1;
	}
	return fd;
}

int keeper_connect(const char *id)
{
	char path[sizeof((struct sockaddr_un *)0)->sun_path];

	if (strchr(id, '/') ||
	    snprintf(path, sizeof path, CONTAINERS_DIR "/%s/ctl", id) >= (int)sizeof path)
		return -1;
	return connect_to(path, SOCK_SEQPACKET, KEEPER_TIMEOUT_S);
}

int keeper_ask(int keeper, const char *text, char *reply, size_t room)
{
	ssize_t got;

	if (send(keeper, text, strlen(text), MSG_NOSIGNAL) < 0)
		return -1;
	do
		got = recv(keeper, reply, room - 1, 0);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return -1;
	reply[got] = 0;
	return 0;
}

void keeper_await_exit(int keeper)
{
	char reply[MESSAGE_MAX];
	ssize_t got;

	do
		got = recv(keeper, reply, sizeof reply, 0);
	while (got > 0 || (got < 0 && (errno == EINTR || errno == EAGAIN)));
}
